"""The one intake of images: decode safely, orient, limit, hash."""

import bisect
import glob
import hashlib
import io
import os
import re
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from vpt.errors import ImageError, VPTError
from vpt.media import fetch, is_url, read_data_uri, short

if TYPE_CHECKING:
    from torch import Tensor

    ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any] | Tensor

# Formats that may reach a decoder. JPEG includes MPO (two JPEGs in one file, as phones write them),
# PPM the rest of its family.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".heic", ".heif", ".avif", ".jxl"),  # cannot be read, and are reported instead of left out
)

# Other kinds of files that people pass, by their first bytes, each with what to do.
_OTHER_KINDS = (
    (rb"....ftyp(hei|hev|mif1|msf1)", "is a HEIC photo; convert it to JPEG or PNG"),
    (rb"....ftypavi[fs]", "is an AVIF image; convert it to JPEG or PNG"),
    (rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3", "is a video; pass a single frame as JPEG or PNG"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "is a JPEG 2000 image; convert it to JPEG or PNG"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "is a JPEG XL image; convert it to JPEG or PNG"),
    (rb"8BPS", "is a Photoshop document; export it as PNG"),
    (rb"\s*%PDF", "is a PDF document; render its page to PNG"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the image; run `git lfs pull`"),
    (rb"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (rb"PK\x03\x04", "is a ZIP archive; unpack it first"),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)",
        "is an HTML page, not an image; download the image itself",
    ),
    (rb"(?i).*<svg", "is an SVG drawing; render it to PNG"),
)


_HOST = re.compile(r"[\w.:-]+")


@dataclass(frozen=True)
class ImageLimits:
    """Limits of one image. All but the time are checked before its pixels are decoded.

    An image takes at most 20 bytes of memory per pixel at its peak, in addition to its file:
    1.4 GB at the default limits. WebP needs the most; most images take half of it.

    Attributes:
        max_pixels: width times height. To go above Pillow's own limit of 89,478,485, raise
            ``PIL.Image.MAX_IMAGE_PIXELS`` too.
        max_bytes: size of the encoded file.
        max_side: longer side, in pixels.
        max_cpu_s: CPU seconds of decoding and conversion. Checked at every block of a file and
            every strip of pixels, so that it is exceeded by one of these at most; compressed
            TIFF is decoded as one block.
        allowed_media_domains: hosts from which remote images are fetched, such as
            ``("upload.wikimedia.org",)``; ``("*",)`` permits every public host. None by default.
        max_fetch_s: seconds to fetch a remote image, redirects included; a name server that is
            slow to answer is not interrupted.

    Raises:
        ImageError: if a limit is not positive, or the hosts are not a list of names.
    """

    max_pixels: int = 64 * 2**20
    max_bytes: int = 64 * 2**20
    max_side: int = 65_500
    max_cpu_s: float = 4.0
    allowed_media_domains: Sequence[str] = ()
    max_fetch_s: float = 10.0

    def __post_init__(self) -> None:
        sizes = (self.max_pixels, self.max_bytes, self.max_side)
        if min(sizes) < 1 or not min(self.max_cpu_s, self.max_fetch_s) > 0:
            raise ImageError(f"expected limits of at least 1, got {self}")
        hosts: Any = self.allowed_media_domains
        is_list = isinstance(hosts, list | tuple) and all(isinstance(one, str) for one in hosts)
        if not is_list or any(one != "*" and not _HOST.fullmatch(one) for one in hosts):
            raise ImageError(
                "allowed_media_domains must be a list of host names, such as "
                f"['upload.wikimedia.org'], or ['*'], not {hosts!r}"
            )
        object.__setattr__(self, "allowed_media_domains", tuple(hosts))


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A decoded image, ready for the model.

    Attributes:
        pixels: mode RGB, upright, without metadata. Shared by all readers: do not draw on it.
        digest: SHA-256 in hex over mode, size and RGB bytes: it identifies the content.
        source: the path or URL, ``"<data URI>"``, ``"<bytes>"``, ``"<stream>"``,
            ``"<PIL image>"``, ``"<array>"`` or ``"<tensor>"``.
        orientation: EXIF orientation as stored, 1 to 8; 1 if there was none or an invalid one.
        num_frames: frames or pages in the file, of which ``pixels`` is the first; 1 for images
            that were in memory already.
    """

    pixels: Image.Image
    digest: str
    source: str
    orientation: int = 1
    num_frames: int = 1

    def __repr__(self) -> str:
        return f"LoadedImage({self.source!r}, {self.size_wh[0]}x{self.size_wh[1]})"

    @property
    def size_wh(self) -> tuple[int, int]:
        """``(W, H)`` in original pixels, after EXIF orientation."""
        return self.pixels.size


def load_image(
    source: "ImageSource",
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str | None = None,
) -> LoadedImage:
    """Read an image of any kind into upright RGB.

    - EXIF orientation is applied; metadata and colour profiles are dropped.
    - Transparency of any kind is laid onto white.
    - Grey, 1-bit, palette, CMYK, YCbCr and LAB pixels are converted; of 16-bit ones the high byte
      is kept. Floats and 32-bit integers are refused: their range would be a guess.
    - Of animations and documents the first frame is taken; ``num_frames`` counts all.
    - A damaged or cut-off file is an error, never part of an image.

    Args:
        source: path or bytes of a file in one of `FORMATS`; a data URI of base64; an http or https
            URL whose host ``limits`` permit; a binary stream, read from its position and left
            open; a PIL image, of which the current frame is taken; an array ``[H, W]``,
            ``[H, W, 1]``, ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (RGBA), uint8; or a torch tensor
            ``[H, W]``, ``[1, H, W]``, ``[3, H, W]`` or ``[4, H, W]``, uint8, or float in 0..1.
        limits: checked before decoding.
        name: of the image in messages and ``LoadedImage.source``, instead of the default there.

    Raises:
        ImageError: if the source is missing, not an image, damaged, too large or of unknown kind.
    """
    if (torch := sys.modules.get("torch")) and isinstance(source, torch.Tensor):
        name, source = name or "<tensor>", _from_tensor(source)
    if isinstance(source, np.ndarray):
        name, source = name or "<array>", _from_array(source)
    if isinstance(source, Image.Image):
        task = _Task(name or "<PIL image>", limits)
        with task.decoding():
            task.check_size(source.size)
            return _finish(source, task)
    name, data = _read(source, limits, name)
    task = _Task(name, limits)
    with task.decoding(), _open(data, task, FORMATS) as image:
        # Of a TIFF Pillow would hold the tags of every page to count them.
        is_tiff = image.format == "TIFF"
        num_frames = _count_directories(data, task) if is_tiff else getattr(image, "n_frames", 1)
        return _finish(image, task, max(int(num_frames), 1))


@contextmanager
def open_image(
    source: "str | os.PathLike[str] | bytes | BinaryIO",
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    formats: tuple[str, ...] = FORMATS,
) -> Iterator[Image.Image]:
    """Open a file of values that RGB cannot hold, such as a depth map, as `load_image` does.

    ``formats`` are those of `FORMATS` that are expected. Yields the file as Pillow reads it, not
    decoded yet; what Pillow raises in the block becomes an ``ImageError``.
    """
    name, data = _read(source, limits, None)
    task = _Task(name, limits)
    with task.decoding(), _open(data, task, formats) as image:
        yield image


def find_images(folder_or_pattern: str | os.PathLike[str]) -> list[str]:
    """Paths of images, sorted by name.

    Args:
        folder_or_pattern: a folder, of which visible files with a suffix of `IMAGE_SUFFIXES` are
            taken, without subfolders; or a glob pattern, of which all files are taken.

    Raises:
        ImageError: if there are none.
    """
    source = Path(folder_or_pattern)
    if source.is_dir():
        files = [one for one in source.iterdir() if one.suffix.lower() in IMAGE_SUFFIXES]
        expected = f"visible files that end in {', '.join(IMAGE_SUFFIXES)}"
    else:
        files = [Path(one) for one in glob.glob(str(source), recursive=True)]  # noqa: PTH207 absolute ones too
        expected = "a folder of images, or a pattern such as 'photos/*.jpg'"
    found = sorted(str(one) for one in files if one.is_file() and one.name[0] != ".")
    if not found:
        raise ImageError(f"no images at {short(str(source))}; expected {expected}")
    return found


def locate_image(path: str, root: Path | None) -> str:
    """Path of an image that data names, relative to ``root``; a URL as it is, to be refused."""
    return path if is_url(path) else str(Path(root or "") / path)


def from_pixels(pixels: Image.Image, source: str) -> LoadedImage:
    """Wrap an RGB image made by the program itself, such as a crop; raise for another mode."""
    if pixels.mode != "RGB" or not min(pixels.size):
        got = f"mode {pixels.mode} and size {pixels.size}"
        raise ImageError(f"expected RGB pixels of at least 1x1, got {got}; use load_image")
    return LoadedImage(pixels, _digest(pixels), source)


def fit_for_tower(
    image: Image.Image,
    *,
    min_side: int,
    max_aspect_ratio: int = 200,
    max_side: int | None = None,
) -> Image.Image:
    """Resize an image to a shape that a Qwen-VL tower accepts, as LLaMA-Factory does.

    A side that is too long shrinks the whole image; one that is too short is stretched, and so is
    a shape beyond ``max_aspect_ratio``, to 180:1. Nearest neighbour, in this order. Follows
    https://github.com/hiyouga/LLaMA-Factory `data/mm_plugin.py`, ``_preprocess_image``.

    Args:
        image: any size, any mode; returned as it is if it fits already.
        min_side: pixels of one token: patch size times ``spatial_merge_size``.
        max_aspect_ratio: longer side over shorter; above 200 transformers' ``smart_resize`` raises.
        max_side: pixels, or None for no limit. Only the first step keeps to it.
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


def _read(source: Any, limits: ImageLimits, name: str | None) -> tuple[str, bytes]:
    """Return a name for the source and its bytes, reading no more than is allowed."""
    max_bytes = limits.max_bytes
    if isinstance(source, bytes):
        name, data = name or "<bytes>", source
    elif isinstance(source, str) and source[:5].lower() == "data:":
        name, data = name or "<data URI>", read_data_uri(source, max_bytes)
    elif isinstance(source, str) and is_url(source) and source[:5].lower() != "file:":
        hosts = limits.allowed_media_domains
        name, data = name or source, fetch(source, hosts, max_bytes, limits.max_fetch_s)
    elif isinstance(source, (str, os.PathLike)):
        name, data = name or os.fspath(source), _read_file(os.fspath(source), max_bytes + 1)
    elif hasattr(source, "read"):
        name, data = name or "<stream>", source.read(max_bytes + 1)
        if not isinstance(data, bytes):
            raise ImageError(f"{name} gave {type(data).__name__}, not bytes; open it in mode 'rb'")
    else:
        kind = f"{type(source).__module__}.{type(source).__qualname__}"
        raise ImageError(
            "expected a path, URL, bytes, binary stream, PIL image, numpy array or torch tensor, "
            f"got {kind}"
        )
    if len(data) > max_bytes:
        raise ImageError(f"{short(name)} is larger than the limit of {max_bytes} bytes; shrink it")
    if not data:
        raise ImageError(f"{short(name)} is empty; expected an image")
    return name, data


def _read_file(path: str, num_bytes: int) -> bytes:
    if path.lower().startswith("file:"):
        raise ImageError(f"{short(path)} is a file URL; pass the path alone")
    try:
        if Path(path).is_file() or not Path(path).exists():
            with Path(path).open("rb") as file:
                return file.read(num_bytes)
    except FileNotFoundError as exc:
        raise ImageError(f"{short(path)} does not exist; check the path") from exc
    except (OSError, ValueError) as exc:  # ValueError: a null byte in the path
        reason = getattr(exc, "strerror", exc)
        raise ImageError(f"{short(path)} cannot be read: {reason}; pass a file") from exc
    raise ImageError(f"{short(path)} is a folder or device, not a file; pass one image")


class _Task:
    """The decoding of one image: its name in messages, its limits, its clock."""

    def __init__(self, name: str, limits: ImageLimits) -> None:
        self.name = name
        self.limits = limits
        self._end = time.thread_time() + limits.max_cpu_s

    def error(self, problem: str) -> ImageError:
        return ImageError(f"{short(self.name)} {problem}")

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Turn what decoders raise into ImageError."""
        try:
            yield
        except VPTError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
            raise self.error(f"has too many pixels: {exc}") from exc
        except MemoryError as exc:
            raise self.error("needs more memory than there is; shrink it") from exc
        except Exception as exc:  # broken files provoke OSError, SyntaxError, struct.error, others
            raise self.error(f"cannot be decoded, it may be damaged: {exc}") from exc

    def check_time(self) -> None:
        if time.thread_time() > self._end:
            raise self.error(
                f"takes more than {self.limits.max_cpu_s:g} s of CPU time to decode; shrink it, or "
                "save it again as a plain JPEG or PNG"
            )

    def check_size(self, size_wh: tuple[int, int]) -> None:
        width, height = size_wh
        if not width * height:
            raise self.error(f"has no pixels: {width}x{height}; expected at least 1x1")
        if width * height > (most := self.limits.max_pixels):
            raise self.error(
                f"has too many pixels: {width}x{height}, the limit is {most}; make it smaller"
            )
        if max(size_wh) > (longest := self.limits.max_side):
            raise self.error(
                f"is too long: {width}x{height}, the limit of a side is {longest}; make it smaller"
            )

    def check_scans(self, num_scans: float) -> None:
        if num_scans > _MOST_SCANS:
            raise self.error(
                f"is a JPEG of more than {_MOST_SCANS} scans; save it again as a plain JPEG or PNG"
            )


class _Reader(io.BytesIO):
    """The bytes of a file; each read checks the clock, which makes decoders interruptible."""

    def __init__(self, data: bytes, task: _Task) -> None:
        super().__init__(data)
        self._task = task
        self.stops: list[int] = []  # ascending; a read that starts before one ends there

    def read(self, size: int | None = -1) -> bytes:
        self._task.check_time()
        position = self.tell()
        index = bisect.bisect_right(self.stops, position)
        if index < len(self.stops):
            room = self.stops[index] - position
            size = room if size is None or size < 0 else min(size, room)
        return super().read(size)


def _open(data: bytes, task: _Task, formats: tuple[str, ...]) -> Image.Image:
    """Open a file without decoding its pixels, once the cost of opening itself is known."""
    reader = _Reader(data, task)
    scans: list[int] = []
    if data.startswith(b"\xff\xd8"):
        scans, exif = _jpeg_scans(data, task)
        task.check_scans(len(scans))
        _count_directories(exif, task)
    elif data.startswith((b"II", b"MM")):
        _count_directories(data, task)
    elif (size_wh := _webp_size(data)) is not None:
        task.check_size(size_wh)
    try:
        image = Image.open(reader, formats=formats)
    except UnidentifiedImageError as exc:
        for pattern, advice in _OTHER_KINDS:
            if re.match(pattern, data[:1024], re.DOTALL):
                raise task.error(advice) from exc
        problem = "is not a supported image format, or is damaged; expected "
        raise task.error(problem + ", ".join(formats)) from exc
    task.check_size(image.size)
    if image.format == "TIFF":
        _check_tiff(image, data, task)
    reader.stops = scans
    return image


# A progressive JPEG is gone through once per scan; encoders write about 10. libtiff and djpeg
# suggest 100 as the limit.
_MOST_SCANS = 64
_IN_SCAN = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # a marker, among entropy-coded data


def _jpeg_scans(data: bytes, task: _Task, start: int = 0) -> tuple[list[int], bytes]:
    """Return where the scans of a JPEG begin, up to one more than allowed, and its EXIF block."""
    task.check_time()
    scans: list[int] = []
    exif = b""
    while len(scans) <= _MOST_SCANS and (found := _IN_SCAN.search(data, start)):
        task.check_time()
        start, marker = found.end(), data[found.start() + 1]
        if marker == 0xD9 and scans:
            break
        if marker in (0x01, 0xD8, 0xD9):
            continue
        end = start + int.from_bytes(data[start : start + 2], "big")
        if marker == 0xDA:
            scans.append(found.start())
        elif marker == 0xE1 and data[start + 2 : start + 8] == _EXIF_START:
            exif += data[start + 8 : end]
        start = max(end, start)
    return scans, exif


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """``(W, H)`` of a WebP canvas, which Pillow would allocate before it knows the size."""
    head = data[:30]
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    if head[12:16] == b"VP8X":
        width, height = head[24:27], head[27:30]
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", head, 26)
    return max(width & 0x3FFF, 1), max(height & 0x3FFF, 1)


_EXIF_START = b"Exif\0\0"
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TAG_BYTES |= {16: 8, 17: 8, 18: 8}
_SUB_DIRECTORIES = (0x8769, 0x8825, 0xA005)  # Exif, GPS, Interop
_MOST_VALUES = 2**19  # in one tag; an image of the greatest height has a strip per row and band


def _count_directories(data: bytes, task: _Task) -> int:
    """Count the pages of a TIFF or EXIF block, before Pillow copies the values of their tags.

    Refuses tags that share bytes, so that they hold many times what the file does.
    """
    for _ in range(4):  # Pillow takes away any number, one at a time
        data = data.removeprefix(_EXIF_START)
    if data.startswith(_EXIF_START):
        raise task.error("has damaged EXIF; save it again without metadata")
    order = "<" if data[:1] == b"I" else ">"
    is_big = data[2:3] == b"+"  # as Pillow decides it
    first, codes = (8, ("Q", "Q", "HHQQ")) if is_big else (4, ("L", "H", "HHLL"))
    offset_code, count_code, entry_code = (order + code for code in codes)
    entry_size = struct.calcsize(entry_code)
    num_pages = total = 0
    seen: set[int] = set()
    try:
        todo = [(struct.unpack_from(offset_code, data, first)[0], True)]
        while todo:
            task.check_time()
            offset, is_page = todo.pop()
            if not 0 < offset < len(data) or offset in seen:
                continue
            seen.add(offset)
            num_pages += is_page
            (num_tags,) = struct.unpack_from(count_code, data, offset)
            start = offset + struct.calcsize(count_code)
            end = min(start + num_tags * entry_size, len(data))
            entries = struct.iter_unpack(entry_code, data[start : end - (end - start) % entry_size])
            for tag, kind, count, value in entries:
                unit = _TAG_BYTES.get(kind, 0)
                size = unit * count
                total += size if size <= len(data) else 0  # Pillow ends at one that is too long
                if total > 4 * len(data) + 2**20 or (
                    unit > 1 and _MOST_VALUES < count <= len(data)
                ):
                    raise task.error(
                        "has tags that hold more than the file does; save it again without metadata"
                    )
                if tag in _SUB_DIRECTORIES:
                    todo.append((value, False))
            if is_page:
                todo.append((struct.unpack_from(offset_code, data, end)[0], True))
    except struct.error:  # cut off: Pillow reads the rest, or reports it
        pass
    return num_pages


def _check_tiff(image: Image.Image, data: bytes, task: _Task) -> None:
    """Check tiles, and the scans of JPEGs inside, both of which libtiff takes as they are."""
    tags = getattr(image, "tag_v2", {})
    tile_wh = tags.get(322, 1), tags.get(323, 1)
    most = max(task.limits.max_pixels, 2**20)  # small images have large tiles
    if tile_wh[0] * tile_wh[1] > most:
        raise task.error(f"has tiles of {tile_wh[0]}x{tile_wh[1]}; save it as PNG")
    if image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        starts = [*tags.get(273, ()), *tags.get(324, ())]
        num_scans = {start: len(_jpeg_scans(data, task, start)[0]) for start in set(starts)}
        task.check_scans(sum(map(num_scans.__getitem__, starts)) / max(len(starts), 1))


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image, task: _Task) -> int:
    """EXIF orientation as stored, 1 to 8; 1 if there is none or an invalid one."""
    exif = image.info.get("exif", b"")
    if not exif and (text := image.info.get("Raw profile type exif")):  # as ImageMagick writes it
        exif = bytes.fromhex("".join(str(text).split("\n")[3:]))
    if isinstance(exif, bytes):
        _count_directories(exif, task)
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _finish(image: Image.Image, task: _Task, num_frames: int = 1) -> LoadedImage:
    """Decode, orient, convert and hash an opened image, with few copies of it at a time."""
    # Pillow turns a TIFF while decoding, and forgets the tag; of a PNG it can follow the pixels.
    stored = _orientation(image, task) if image.format == "TIFF" else 0
    image.load()
    left = _orientation(image, task)
    pixels = _to_rgb(image, task)
    if left in _TRANSPOSE:
        pixels = pixels.transpose(_TRANSPOSE[left])
    return LoadedImage(pixels, _digest(pixels), task.name, stored or left, num_frames)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The rows of an image from the top, about a million pixels at a time, as copies."""
    num_rows = max(2**20 // image.width, 1)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        yield top, image.crop((0, top, image.width, bottom))


def _to_rgb(image: Image.Image, task: _Task) -> Image.Image:
    """A new image, without metadata: place and time of a photo must not travel on."""
    # Older Pillows read 16-bit PNG as mode I; all read 16-bit PGM so, scaled to 65535.
    is_16_bit = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if image.mode in ("I", "F") and not is_16_bit:
        kind = "32-bit integer" if image.mode == "I" else "float"
        raise task.error(f"has {kind} pixels of unknown range; scale them to 0..255 first")
    pixels = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        task.check_time()
        if is_16_bit:
            values = np.asarray(strip)
            is_clear = values == image.info.get("transparency", -1)
            strip = Image.fromarray(np.where(is_clear, 255, values >> 8).astype(np.uint8))
        if strip.has_transparency_data:
            white = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(white, strip.convert("RGBA"))
        pixels.paste(strip.convert("RGB"), (0, top))
    return pixels


def _from_array(array: NDArray[Any]) -> Image.Image:
    """Wrap ``[H, W]`` or ``[H, W, C]`` uint8, without copying where Pillow can do so."""
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise ImageError(
            "expected a uint8 array of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], "
            f"got {array.dtype} {list(array.shape)}"
        )
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def _from_tensor(tensor: Any) -> NDArray[Any]:
    """``[H, W]`` or ``[H, W, C]`` uint8 of a torch tensor ``[C, H, W]``, uint8 or float in 0..1."""
    is_float = tensor.is_floating_point()
    is_image = tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[0] in (1, 3, 4))
    if not is_image or not tensor.numel() or not (is_float or str(tensor.dtype) == "torch.uint8"):
        raise ImageError(
            "expected a tensor of shape [H, W], [1, H, W], [3, H, W] or [4, H, W], uint8 or float, "
            f"got {tensor.dtype} {list(tensor.shape)}; pass the images of a batch as a list, and "
            "permute [H, W, C] to [C, H, W]"
        )
    if is_float:
        tensor = tensor.detach().float()
        if not bool(((tensor >= 0) & (tensor <= 1)).all()):
            raise ImageError(
                "expected float pixels in 0..1; divide them by 255, undo normalisation"
            )
        tensor = (tensor * 255).round().byte()
    array: NDArray[Any] = tensor.cpu().numpy()
    return array if array.ndim == 2 else np.ascontiguousarray(array.transpose(1, 2, 0))


def _digest(pixels: Image.Image) -> str:
    digest = hashlib.sha256(f"{pixels.mode} {pixels.width}x{pixels.height}\n".encode())
    for _, strip in _strips(pixels):
        digest.update(strip.tobytes())
    return digest.hexdigest()
