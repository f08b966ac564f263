"""Renderers of a run: words, pictures and HTML of what the model saw, called for and said."""
