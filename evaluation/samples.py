"""Samples: images, question, accepted answers, and the box of the evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpt.boxes import Box, PixelBox
from vpt.errors import PromptError
from vpt.images import LoadedImage, from_pixels, load_image, locate_image


@dataclass(frozen=True)
class ImageRef:
    """An image that a sample is about, not opened yet."""

    source: str | bytes  # path, or the bytes of an image file
    name: str  # to show; the path for a path
    crop: PixelBox | None = None  # XYXY in pixels of the image as stored, where only a part counts

    def read_bytes(self) -> bytes:
        """The content of the file; empty if it cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        with suppress(OSError):
            return Path(self.source).read_bytes()
        return b""

    def open(self) -> LoadedImage:
        """Load it; raises ``ImageError`` if it cannot be read."""
        image = load_image(self.source)
        return image if self.crop is None else from_pixels(image.pixels.crop(self.crop), self.name)


@dataclass(frozen=True)
class Sample:
    """One question of a split."""

    id: str  # unique in its split, and the same in each run
    images: tuple[ImageRef, ...]
    question: str  # as the data has it, without placeholders and prompts
    answers: tuple[str, ...] = ()  # accepted ones; several people's where the data has them
    choices: tuple[str, ...] = ()  # texts of the options A, B, ...
    box: Box | None = None  # of the evidence, XYXY in pixels of the first image
    group: str = ""  # for a break-down within the split, such as a question's family
    facts: Mapping[str, Any] = field(default_factory=dict)  # further values that scores need


@dataclass(frozen=True)
class BadRow:
    """A row that is not a valid sample; it is counted as a failure, never dropped."""

    id: str
    problem: str


def hash_samples(samples: Iterable[Sample | BadRow]) -> str:
    """A short hash over questions, options, answers, boxes and image files, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        facts = {**vars(sample), "images": None}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        for image in sample.images if isinstance(sample, Sample) else ():
            digest.update(f"{image.crop}".encode() + image.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ImageRoots:
    """Folders of the images that a file names."""

    root: Path | None = None  # of relative paths; else the folder that a format expects
    moved: tuple[tuple[str, str], ...] = ()  # (FROM, TO) for a start of paths, longest FROM first

    @classmethod
    def parse(cls, options: Sequence[str]) -> ImageRoots:
        """Read values of ``--images``: each ``FROM=TO``, or a folder."""
        root: Path | None = None
        moved: dict[str, str] = {}
        for option in options:
            start, equals, target = option.partition("=")
            if option and (Path(option).is_dir() or not equals):
                if root is not None:
                    raise PromptError(
                        f"--images: {root} and {option} are both for relative paths; give one"
                    )
                root = Path(_folder(option))
            elif not start or not target:
                raise PromptError(
                    "--images: expected a folder, or FROM=TO with something on both sides, "
                    f"got {option!r}"
                )
            elif moved.setdefault(start.rstrip("/"), _folder(target)) != target:
                raise PromptError(f"--images: {start} is moved twice; give it once")
        return cls(root, tuple(sorted(moved.items(), key=lambda item: -len(item[0]))))

    def find(self, path: str, folder: Path) -> str:
        """The path of an image, relative to ``folder`` if :attr:`root` is ``None``."""
        for start, target in self.moved:  # FROM without the slash at its end: "/" is ""
            if path == start or path.startswith(f"{start}/"):
                return str(Path(target) / path[len(start) :].lstrip("/"))
        return locate_image(path, self.root or folder)


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise PromptError(f"--images: there is no folder {text}")
    return text
