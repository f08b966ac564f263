"""Renderers of a run: text, pictures and HTML of its images, calls and answer."""
