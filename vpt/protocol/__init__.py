"""The protocol between model and runtime: tokens, calls, content, grammar, rows."""
