"""The one door through which pictures come in: decode safely, orient, limit, hash."""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vpt.errors import ImageError

# What may reach a decoder. JPEG includes MPO (two JPEGs in one file, as phones write them), PPM
# the rest of its family.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class ImageLimits:
    """How much one picture may ask for, checked before it is decoded.

    Attributes:
        max_pixels: width times height. The default is Pillow's own bomb threshold, a quarter of a
            GiB of RGB; to go above it, raise ``PIL.Image.MAX_IMAGE_PIXELS`` too.
        max_bytes: size of the encoded file.

    Raises:
        ImageError: if a limit is not positive.
    """

    max_pixels: int = 89_478_485
    max_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or self.max_bytes < 1:
            raise ImageError(f"expected limits of at least 1, got {self}")


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A picture as the rest of the runtime sees it.

    Attributes:
        pixels: mode RGB, upright, without metadata. Shared by all readers: do not draw on it.
        digest: SHA-256 in hex over mode, size and RGB bytes: it names the content.
        source: the path, ``"<bytes>"``, ``"<stream>"``, ``"<PIL image>"`` or ``"<array>"``.
        orientation: EXIF orientation as stored, 1 to 8; 1 if there was none or an invalid one.
        num_frames: frames or pages in the file, of which ``pixels`` is the first; 1 for pictures
            that were in memory already.
    """

    pixels: Image.Image
    digest: str
    source: str
    orientation: int = 1
    num_frames: int = 1

    @property
    def size_wh(self) -> tuple[int, int]:
        """``(W, H)`` in original pixels, after EXIF orientation."""
        return self.pixels.size


def load_image(
    source: "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]",
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str | None = None,
) -> LoadedImage:
    """Read a picture of any kind into upright RGB, or say why that cannot be.

    - EXIF orientation is applied; metadata and colour profiles are dropped.
    - Transparency of any kind is laid onto white.
    - Grey, 1-bit, palette, CMYK, YCbCr and LAB pixels are converted; of 16-bit ones the high byte
      is kept. Floats and 32-bit integers are refused: their range would be a guess.
    - Of animations and documents the first frame is taken, and ``num_frames`` tells.
    - A damaged or cut-off file is an error, never part of a picture.

    Args:
        source: path or bytes of a file in one of `FORMATS`; a binary stream, read from where it
            stands and left open; a PIL image, taken at the frame it stands at and left as it is;
            or an array ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (RGBA),
            uint8. Remote pictures are not fetched.
        limits: checked before decoding.
        name: to call it by in messages and as ``source``; by default what ``source`` there says.

    Raises:
        ImageError: if the source is missing, no picture, damaged, too large or of an unknown kind.
    """
    if isinstance(source, Image.Image):
        return _finish(source, name or "<PIL image>", limits)
    if isinstance(source, np.ndarray):
        return _finish(_from_array(source), name or "<array>", limits)
    name, data = _read(source, limits.max_bytes, name)
    with _open(data, name) as image:
        return _finish(image, name, limits, is_file=True)


def from_pixels(pixels: Image.Image, source: str) -> LoadedImage:
    """Name the content of an RGB picture made by the program itself, such as a crop.

    Raises:
        ImageError: if the picture is empty or not RGB.
    """
    if pixels.mode != "RGB" or not min(pixels.size):
        got = f"mode {pixels.mode} and size {pixels.size}"
        raise ImageError(f"expected RGB pixels of at least 1x1, got {got}; use load_image")
    return LoadedImage(pixels, _digest(pixels), source)


def fit_for_tower(
    image: Image.Image,
    *,
    min_side: int = 28,
    max_aspect_ratio: int = 200,
    max_side: int | None = None,
) -> Image.Image:
    """Bring a picture into the shape Qwen2-VL's tower accepts, the way LLaMA-Factory does.

    Too long a side shrinks the whole picture, too short a side is stretched, and so is a shape
    beyond ``max_aspect_ratio``, to 180:1. Always nearest neighbour, and in this order. Follows
    https://github.com/hiyouga/LLaMA-Factory `data/mm_plugin.py`, ``_preprocess_image``.

    Args:
        image: any size, any mode.
        min_side: pixels; 28 is patch size 14 times ``spatial_merge_size`` 2.
        max_aspect_ratio: longer side over shorter; above 200 transformers' ``smart_resize`` raises.
        max_side: pixels, or None for no limit. Only the first step keeps to it.

    Returns:
        A new picture, or the very same object if it fits already.
    """
    width, height = image.size
    if max_side is not None and max(width, height) > max_side:
        factor = max_side / max(width, height)
        width, height = max(int(width * factor), 1), max(int(height * factor), 1)
        image = image.resize((width, height), Image.Resampling.NEAREST)
    if min(width, height) < min_side:
        width, height = max(width, min_side), max(height, min_side)
        image = image.resize((width, height), Image.Resampling.NEAREST)
    if width / height > max_aspect_ratio:
        image = image.resize((height * 180, height), Image.Resampling.NEAREST)
    elif height / width > max_aspect_ratio:
        image = image.resize((width, width * 180), Image.Resampling.NEAREST)
    return image


def _read(
    source: "str | os.PathLike[str] | bytes | BinaryIO", max_bytes: int, name: str | None
) -> tuple[str, bytes]:
    """Return a name for the source and its bytes, reading no more than is allowed."""
    if isinstance(source, bytes):
        name, data = name or "<bytes>", source
    elif isinstance(source, (str, os.PathLike)):
        name, data = name or os.fspath(source), _read_file(os.fspath(source), max_bytes + 1)
    elif hasattr(source, "read"):
        name, data = name or "<stream>", source.read(max_bytes + 1)
        if not isinstance(data, bytes):
            raise ImageError(f"{name} gave {type(data).__name__}, not bytes; open it in mode 'rb'")
    else:
        kind = f"{type(source).__module__}.{type(source).__qualname__}"
        raise ImageError(
            f"expected a path, bytes, binary stream, PIL image or numpy array, got {kind}"
        )
    if len(data) > max_bytes:
        raise ImageError(f"{_short(name)} is larger than the limit of {max_bytes} bytes; shrink it")
    if not data:
        raise ImageError(f"{_short(name)} is empty; expected a picture")
    return name, data


def _read_file(path: str, num_bytes: int) -> bytes:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", path):
        raise ImageError(f"{_short(path)} is a URL; remote pictures are not fetched, pass a file")
    try:
        if Path(path).is_file() or not Path(path).exists():
            with Path(path).open("rb") as file:
                return file.read(num_bytes)
    except FileNotFoundError as exc:
        raise ImageError(f"{_short(path)} does not exist; check the path") from exc
    except (OSError, ValueError) as exc:  # ValueError: a null byte in the path
        reason = getattr(exc, "strerror", exc)
        raise ImageError(f"{_short(path)} cannot be read: {reason}; pass a file") from exc
    raise ImageError(f"{_short(path)} is a folder or device, not a file; pass one picture")


def _short(name: str) -> str:
    """Quote a name for a message; base64 that was taken for a path must not flood the log."""
    return repr(name if len(name) <= 100 else f"{name[:80]}...")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what decoders raise into ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageError(f"{_short(name)} has too many pixels: {exc}") from exc
    except Exception as exc:  # a broken file provokes OSError, SyntaxError, struct.error and others
        raise ImageError(f"{_short(name)} cannot be decoded, it may be damaged: {exc}") from exc


def _open(data: bytes, name: str) -> Image.Image:
    """Open a file without decoding its pixels."""
    with _decoding(name):
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as exc:
            if b"<svg" in data[:1024].lower():
                raise ImageError(f"{_short(name)} is an SVG drawing; render it to PNG") from exc
            formats = ", ".join(FORMATS)
            raise ImageError(f"{_short(name)} is no picture we read; expected {formats}") from exc


def _check_size(image: Image.Image, name: str, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{_short(name)} has too many pixels: {width}x{height}, "
            f"the limit is {limits.max_pixels}; make it smaller"
        )
    if not width * height:
        raise ImageError(f"{_short(name)} has no pixels: {width}x{height}; expected at least 1x1")


def _finish(
    image: Image.Image, name: str, limits: ImageLimits, *, is_file: bool = False
) -> LoadedImage:
    """Decode, orient, convert and hash an opened picture."""
    _check_size(image, name, limits)
    with _decoding(name):
        num_frames: int = getattr(image, "n_frames", 1) if is_file else 1
        # Read it before decoding: Pillow turns a TIFF while decoding, and then forgets the tag.
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        upright = ImageOps.exif_transpose(image)  # always a copy
        pixels = _to_rgb(upright, image.format, name)
    pixels.info.clear()  # place and time of a photo must not travel on
    orientation = orientation if orientation in range(1, 9) else 1
    return LoadedImage(pixels, _digest(pixels), name, orientation, num_frames)


def _to_rgb(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    # Older Pillows read 16-bit PNG as mode I; all read 16-bit PGM so, scaled to 65535.
    is_16_bit = image.mode == "I" and file_format in ("PNG", "PPM")
    if is_16_bit or image.mode.startswith("I;16"):
        values = np.asarray(image)
        is_clear = values == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(is_clear, 255, values >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "float"
        raise ImageError(
            f"{_short(name)} has {kind} pixels of unknown range; scale them to 0..255 first"
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _from_array(array: NDArray[Any]) -> Image.Image:
    """Wrap ``[H, W]`` or ``[H, W, C]`` uint8, without copying where Pillow can do so."""
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise ImageError(
            "expected a uint8 array of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], "
            f"got {array.dtype} {list(array.shape)}"
        )
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def _digest(pixels: Image.Image) -> str:
    header = f"{pixels.mode} {pixels.width}x{pixels.height}\n".encode()
    return hashlib.sha256(header + pixels.tobytes()).hexdigest()
