"""Opens the picture that a held-out question is about, for lmms-eval."""

from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question; its path is relative to the current folder."""
    with Image.open(doc["image"]) as picture:
        return [picture.convert("RGB")]
