"""The images that data names: opened once each, on several threads, to learn size and health."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vpt.errors import ImageError
from vpt.images import load_image, place_image

_CHUNK = 256  # paths handed to the threads at a time


@dataclass(frozen=True)
class ImageFacts:
    """What opening an image file told.

    Attributes:
        size_wh: ``(W, H)`` after EXIF orientation; ``None`` if it cannot be used.
        problem: why not; empty if it can.
        is_missing: there is no such file.
    """

    size_wh: tuple[int, int] | None
    problem: str = ""
    is_missing: bool = False


Images = Mapping[str, ImageFacts]
"""Path as in the data, without crop suffix -> what is known of the file."""


def measure_images(
    paths: Iterable[str], root: Path | None, num_threads: int | None = None
) -> Iterator[tuple[str, ImageFacts]]:
    """Open every distinct image, whole, so that damage is found too.

    Args:
        paths: without crop suffix.
        root: folder of relative paths.
        num_threads: by default one per processor.

    Yields:
        ``(path, facts)``, in the order of their first mention.
    """
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        for start in range(0, len(distinct), _CHUNK):
            chunk = distinct[start : start + _CHUNK]
            yield from zip(chunk, pool.map(lambda path: _measure(path, root), chunk), strict=True)


def _measure(path: str, root: Path | None) -> ImageFacts:
    try:
        return ImageFacts(load_image(place_image(path, root)).size_wh)
    except ImageError as exc:
        return ImageFacts(None, str(exc), isinstance(exc.__cause__, FileNotFoundError))
