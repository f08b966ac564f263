"""Opens the photos of a sample again, and makes sure that they are those the model saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vpt.errors import ImageError
from vpt.evaluation.records import Record
from vpt.images import LoadedImage, load_image
from vpt.trace.records import Trace
from vpt.view.album import Album, base_name

PhotoSource = Callable[[Record], Sequence[LoadedImage]]
"""Gives the images of a sample, in order; raises ``ImageError`` if it cannot."""


def open_by_name(record: Record) -> list[LoadedImage]:
    """Open a sample's images by their names, which are paths for most splits.

    Raises:
        ImageError: if one cannot be opened.
    """
    return [load_image(name) for name in record.images]


class PhotoShelf:
    """Opens photos, and keeps those of the last sample at hand.

    Args:
        source: of the photos.
    """

    def __init__(self, source: PhotoSource) -> None:
        self.source = source
        self._last: tuple[str, str] | None = None
        self._photos: Sequence[LoadedImage] = ()

    def album(self, record: Record, trace: Trace) -> Album:
        """The images of a run: thumbnails where the trace holds them, else the photos.

        Args:
            record: of the run.
            trace: of the record.

        Raises:
            ImageError: if a photo cannot be opened, or has changed since the run.
        """
        given = [image for image in trace.images if image.parent is None]
        if given and all(image.thumbnail for image in given):
            return Album(trace, None)
        photos = self.open(record)
        for seen, photo in zip(given, photos, strict=False):
            if seen.digest != photo.digest:
                raise ImageError(f"{base_name(seen.source)} is not the picture the model saw")
        return Album(trace, [photo.pixels for photo in photos])

    def open(self, record: Record) -> Sequence[LoadedImage]:
        """The photos of a sample.

        Raises:
            ImageError: if one cannot be opened.
        """
        if self._last != (record.split, record.id):
            self._photos = self.source(record)
            self._last = (record.split, record.id)
        return self._photos
