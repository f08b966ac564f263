"""The demo: a page on which a model answers questions about images."""
