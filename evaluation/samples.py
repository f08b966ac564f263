"""A sample: what is asked about which images, what would be right, and where the evidence is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpt.boxes import Box, PixelBox
from vpt.images import LoadedImage, from_pixels, load_image


@dataclass(frozen=True)
class ImageRef:
    """An image that a sample is about, not opened yet.

    Attributes:
        source: path, or the bytes of an image file.
        name: to show; the path for a path.
        crop: XYXY in pixels of the image as stored, if the sample is about a part of it.
    """

    source: str | bytes
    name: str
    crop: PixelBox | None = None

    def open(self) -> LoadedImage:
        """Load it.

        Raises:
            ImageError: if it cannot be read.
        """
        image = load_image(self.source)
        return image if self.crop is None else from_pixels(image.pixels.crop(self.crop), self.name)


@dataclass(frozen=True)
class Sample:
    """One question of a split.

    Attributes:
        id: unique in its split, and the same in each run.
        images: in the order they are shown.
        question: as the data has it, without placeholders and prompts.
        answers: accepted ones; several people's answers where the data has them. Empty if the
            data has none.
        choices: texts of the options A, B, ...; empty if the question is open.
        box: of the evidence, XYXY in pixels of the first image.
        group: for a break-down within the split, such as a question's family.
        facts: what else scores need.
    """

    id: str
    images: tuple[ImageRef, ...]
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    box: Box | None = None
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadRow:
    """A row of which no sample could be made; it is counted, never dropped.

    Attributes:
        id: that a sample of the row would have had.
        problem: what is wrong with it.
    """

    id: str
    problem: str
