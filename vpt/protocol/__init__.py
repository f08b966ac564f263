"""What model and runtime say to each other: tokens, calls, regions, rows."""
