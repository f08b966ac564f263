"""Pictures of a run: what the model saw, where it looked again, and what it said."""

from vpt.picture.layout import draw

__all__ = ["draw"]
