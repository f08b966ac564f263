"""The pictures of a page: small copies as data URIs, each held once however often it is shown."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass

from PIL import Image

ROOM_WH = (320, 260)  # in which every picture fits
_SMALL = 64  # pixels; up to this a PNG is smaller than a JPEG, and sharp
_MOST_GROWTH = 8


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page.

    Attributes:
        key: in the page's table of pictures.
        width: at which it is shown, in CSS pixels.
        height: likewise.
        is_grown: whether it is shown larger than it is, so that its pixels are to be seen.
    """

    key: str
    width: int
    height: int
    is_grown: bool = False


class PictureTable:
    """All pictures of a page.

    Attributes:
        uris: key -> data URI.
    """

    def __init__(self) -> None:
        self.uris: dict[str, str] = {}
        self._keys: dict[str, str] = {}  # hash of the encoded bytes -> key
        self._known: dict[str, Thumbnail] = {}

    def add(self, picture: Image.Image, digest: str | None = None) -> Thumbnail:
        """Shrink a picture and hold it; an equal one is held once.

        Args:
            picture: RGB.
            digest: names its content, if known: such a picture is shrunk once.
        """
        if digest is None:
            return self._shrink(picture)
        if digest not in self._known:
            self._known[digest] = self._shrink(picture)
        return self._known[digest]

    def _shrink(self, picture: Image.Image) -> Thumbnail:
        width, height = shown_size(picture.size)
        small = picture
        if picture.width > width:
            small = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
        kind = "png" if max(small.size) <= _SMALL else "jpeg"
        buffer = io.BytesIO()
        small.save(buffer, format=kind, quality=80, optimize=True)
        key = self._hold(kind, buffer.getvalue())
        return Thumbnail(key, width, height, is_grown=width >= 2 * small.width)

    def _hold(self, kind: str, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._keys:
            key = self._keys[digest] = f"p{len(self._keys)}"
            self.uris[key] = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
        return self._keys[digest]


def shown_size(size_wh: tuple[int, int]) -> tuple[int, int]:
    """``(W, H)`` at which a picture is shown: as large as `ROOM_WH` allows, no side below 1."""
    scale = min(ROOM_WH[0] / size_wh[0], ROOM_WH[1] / size_wh[1], _MOST_GROWTH)
    return max(round(size_wh[0] * scale), 1), max(round(size_wh[1] * scale), 1)
