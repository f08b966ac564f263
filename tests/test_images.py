"""Image intake: each policy of the door, and each way it says no."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.limits import within_limits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps

from vpt.errors import ImageError
from vpt.images import ImageLimits, fit_for_tower, from_pixels, load_image

ORIENTATION = 0x0112
WHITE, RED = (255, 255, 255), (255, 0, 0)
small_rgb = hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(3)))


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(size_wh: tuple[int, int], depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A hand-made PNG, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size_wh, depth, color, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def colors(source: Any) -> list[tuple[int, int, int]]:
    pixels = np.asarray(load_image(source).pixels)
    return [tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()]


def noise(size_wh: tuple[int, int] = (64, 48)) -> Image.Image:
    shape = (size_wh[1], size_wh[0], 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


# Sources


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = noise()
    data = encode(image)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    stream = io.BytesIO(data)
    sources = [str(path), path, data, stream, image, np.asarray(image)]
    loaded = [load_image(source) for source in sources]
    assert {one.digest for one in loaded} == {loaded[0].digest}
    assert [one.source for one in loaded] == [
        *([str(path)] * 2),
        *("<bytes>", "<stream>", "<PIL image>", "<array>"),
    ]
    assert not stream.closed
    for one in loaded:
        assert (one.pixels.mode, one.size_wh) == ("RGB", (64, 48))
        assert (one.orientation, one.num_frames) == (1, 1)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 1), (7, 7, 7)), ((2, 1, 1), (7, 7, 7)), ((2, 1, 3), (7, 7, 7)), ((2, 1, 4), (248,) * 3)],
)
def test_arrays_of_every_shape_are_read(
    shape: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    array = np.full(shape, 7, dtype=np.uint8)
    assert colors(array) == [expected] * 2
    assert colors(np.flip(array, 0)) == [expected] * 2


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\]"),
        (np.zeros((4, 4), dtype=bool), r"bool \[4, 4\]"),
        (np.zeros((4, 4), dtype=np.uint16), r"uint16 \[4, 4\]"),
        (np.zeros((3, 4, 5), dtype=np.uint8), r"uint8 \[3, 4, 5\]"),
        (np.zeros((1, 4, 4, 3), dtype=np.uint8), r"uint8 \[1, 4, 4, 3\]"),
        (np.zeros(4, dtype=np.uint8), r"uint8 \[4\]"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"uint8 \[0, 4, 3\]"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, got: str) -> None:
    with pytest.raises(ImageError, match=r"expected a uint8 array of shape \[H, W\].*got " + got):
        load_image(array)


def test_other_kinds_of_source_are_refused() -> None:
    with pytest.raises(ImageError, match=r"expected a path, URL, bytes.*got builtins\.int"):
        load_image(3)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="<stream> gave str, not bytes; open it in mode 'rb'"):
        load_image(io.StringIO("text"))  # type: ignore[arg-type]


def test_missing_file_is_named() -> None:
    with pytest.raises(ImageError, match=r"'no/such\.png' does not exist; check the path"):
        load_image("no/such.png")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^'[^']*' is a folder or device, not a file; pass one"):
        load_image(tmp_path)


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000])
def test_impossible_path_cannot_be_read(path: str) -> None:
    with pytest.raises(ImageError, match=r"cannot be read: .*; pass a file") as caught:
        load_image(path)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("tensor", "mode"),
    [
        (torch.full((3, 4, 6), 51, dtype=torch.uint8), "RGB"),
        (torch.full((3, 4, 6), 0.2), "RGB"),
        (torch.full((3, 4, 6), 0.2, dtype=torch.bfloat16, requires_grad=True), "RGB"),
        (torch.full((1, 4, 6), 0.2), "L"),
        (torch.full((4, 6), 51, dtype=torch.uint8), "L"),
        (torch.cat([torch.full((3, 4, 6), 0.2), torch.ones(1, 4, 6)]), "RGBA"),
    ],
)
def test_tensors_are_read_as_torchvision_makes_them(tensor: torch.Tensor, mode: str) -> None:
    color = {"RGB": (51,) * 3, "L": 51, "RGBA": (51, 51, 51, 255)}[mode]
    expected = load_image(Image.new(mode, (6, 4), color))
    loaded = load_image(tensor)
    assert (loaded.digest, loaded.source) == (expected.digest, "<tensor>")


def test_channels_of_a_tensor_come_first() -> None:
    tensor = torch.rand(3, 5, 7)
    expected = (tensor.permute(1, 2, 0).numpy() * 255).round()
    assert (np.asarray(load_image(tensor).pixels) == expected).all()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(5, 7, 3), r"got torch\.float32 \[5, 7, 3\]; .*permute \[H, W, C\]"),
        (torch.zeros(2, 3, 5, 7), r"\[2, 3, 5, 7\]; pass the images of a batch as a list"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), r"uint8 or float, got torch\.int64"),
        (torch.zeros(3, 0, 7), r"got torch\.float32 \[3, 0, 7\]"),
        (torch.full((3, 5, 7), 1.1), r"float pixels in 0\.\.1; divide them by 255"),
        (torch.full((3, 5, 7), float("nan")), r"float pixels in 0\.\.1"),
    ],
)
def test_other_tensors_are_refused(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        load_image(tensor)


@pytest.mark.parametrize("url", ["file:///c.png", "FILE:c.png"])
def test_a_file_url_is_named(url: str) -> None:
    with pytest.raises(ImageError, match=f"'{url}' is a file URL; pass the path alone"):
        load_image(url)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(ImageError, match=r"empty\.png' is empty; expected an image"):
        load_image(path)
    with pytest.raises(ImageError, match="'<bytes>' is empty"):
        load_image(b"")


def test_text_is_no_picture() -> None:
    expected = "is not a supported image format, or is damaged; expected BMP, GIF, JPEG, PNG"
    with pytest.raises(ImageError, match=f"'<bytes>' {expected}"):
        load_image(b"just some words")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\0\0\0\x18ftypheic", "is a HEIC photo; convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypmif1", "is a HEIC photo"),
        (b"\0\0\0\x1cftypavif", "is an AVIF image; convert it to JPEG or PNG"),
        (b"\0\0\0\x20ftypisom", "is a video; pass a single frame as JPEG or PNG"),
        (b"\x1aE\xdf\xa3", "is a video"),
        (b"\0\0\0\x0cjP  \r\n", "is a JPEG 2000 image; convert it"),
        (b"\xff\x0a\xfa", "is a JPEG XL image; convert it"),
        (b"8BPS\0\1", "is a Photoshop document; export it as PNG"),
        (b"%PDF-1.7", "is a PDF document; render its page to PNG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the image"),
        (b"\x1f\x8b\x08", "is compressed with gzip; unpack it first"),
        (b"PK\x03\x04", "is a ZIP archive; unpack it first"),
        (b"\n<!DOCTYPE html>\n<svg>", "is an HTML page, not an image; download the image itself"),
        (b'<?xml version="1.0"?>\n<SVG xmlns="x"/>', "is an SVG drawing; render it to PNG"),
    ],
)
def test_other_kinds_of_files_are_named_with_advice(
    start: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(start + b" " * 100)
    with pytest.raises(ImageError, match=f"photo.jpg' {message}"):
        load_image(path)


def test_exotic_formats_do_not_reach_their_decoders() -> None:
    for file_format in ("ICO", "TGA", "SGI", "PCX"):
        with pytest.raises(ImageError, match="is not a supported image format"):
            load_image(encode(noise(), file_format))


# Limits


def test_bomb_fails_before_decoding() -> None:
    bomb = png((60_000, 60_000), 8, 2, b"")
    assert len(bomb) < 100
    with pytest.raises(ImageError, match="'<bytes>' has too many pixels"):
        load_image(bomb)


def test_long_and_empty_picture_is_refused_at_once() -> None:
    bomb = png((89_478_485, 1), 8, 2, b"")
    with within_limits("bomb", 0.5), pytest.raises(ImageError, match="has too many pixels: 894784"):
        load_image(bomb)
    with pytest.raises(ImageError, match="is too long: 65501x1, the limit of a side is 65500; mak"):
        load_image(png((65_501, 1), 8, 2, b""))


def test_picture_between_our_limit_and_pillows_is_refused() -> None:
    header = png((11_000, 11_000), 8, 2, b"")  # more than Pillow's threshold, less than twice it
    with pytest.raises(ImageError, match="has too many pixels"):
        load_image(header)


@pytest.mark.parametrize("as_source", [encode, np.asarray, lambda image: image])
def test_pixel_limit_holds_for_every_source(as_source: Any) -> None:
    source = as_source(noise((11, 10)))
    assert load_image(source, limits=ImageLimits(max_pixels=110)).size_wh == (11, 10)
    with pytest.raises(ImageError, match="has too many pixels: 11x10, the limit is 109; make it"):
        load_image(source, limits=ImageLimits(max_pixels=109))


def test_byte_limit_holds_for_every_source(tmp_path: Path) -> None:
    data = encode(noise())
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        with pytest.raises(ImageError, match=f"is larger than the limit of {len(data) - 1} bytes"):
            load_image(source, limits=ImageLimits(max_bytes=len(data) - 1))
    assert load_image(path, limits=ImageLimits(max_bytes=len(data))).size_wh == (64, 48)


def test_limits_must_be_positive() -> None:
    with pytest.raises(ImageError, match="limits of at least 1, got ImageLimits"):
        ImageLimits(max_pixels=0)
    with pytest.raises(ImageError, match="limits of at least 1, got ImageLimits"):
        ImageLimits(max_bytes=0)
    with pytest.raises(ImageError, match="limits of at least 1, got ImageLimits"):
        ImageLimits(max_cpu_s=0)


@pytest.mark.parametrize("as_source", [encode, np.asarray, lambda image: image])
def test_limit_of_a_side_holds_for_every_source(as_source: Any) -> None:
    source = as_source(noise((11, 10)))
    assert load_image(source, limits=ImageLimits(max_side=11)).size_wh == (11, 10)
    with pytest.raises(ImageError, match="is too long: 11x10, the limit of a side is 10; make it"):
        load_image(source, limits=ImageLimits(max_side=10))


def test_webp_canvas_is_checked_before_it_is_allocated() -> None:
    animated = bytearray(
        encode(noise((8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    )
    assert animated[12:16] == b"VP8X"
    animated[24:27] = b"\xfe\xff\xff"
    with (
        within_limits("canvas", 0.5),
        pytest.raises(ImageError, match="too many pixels: 16777215x8"),
    ):
        load_image(bytes(animated))
    for lossless in (True, False):
        still = encode(noise((11, 10)), "WEBP", lossless=lossless)
        with pytest.raises(ImageError, match="too many pixels: 11x10"):
            load_image(still, limits=ImageLimits(max_pixels=100))


def test_jpeg_of_many_scans_is_refused() -> None:
    data = encode(noise((16, 16)), "JPEG", progressive=True)
    assert load_image(data).size_wh == (16, 16)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 60 + data[-2:]
    with pytest.raises(ImageError, match="is a JPEG of more than 64 scans; save it again as a pl"):
        load_image(bomb)
    thumbnail = b"\xff\xec" + struct.pack(">H", 2 + 2000) + b"\xff\xda" * 1000
    assert load_image(data[:2] + thumbnail + data[2:]).size_wh == (16, 16)  # not the picture's own


def test_scans_of_jpegs_inside_tiff_count_too() -> None:
    image = noise((64, 64))
    data = encode(image, "TIFF", compression="jpeg")
    assert load_image(data).size_wh == (64, 64)
    start, length = (Image.open(io.BytesIO(data)).tag_v2[tag][0] for tag in (273, 279))
    strip = encode(image.convert("YCbCr"), "JPEG", progressive=True)
    last = strip.rindex(b"\xff\xda")
    strip = strip[:last] + strip[last:-2] * 60 + strip[-2:]
    bomb = bytearray(data + strip)
    for old, new in ((start, len(data)), (length, len(strip))):
        at = bomb.rindex(struct.pack("<HHLL", 273 if old == start else 279, 4, 1, old))
        bomb[at : at + 12] = struct.pack("<HHLL", 273 if old == start else 279, 4, 1, new)
    with pytest.raises(ImageError, match="is a JPEG of more than 64 scans"):
        load_image(bytes(bomb))


@pytest.mark.parametrize("file_format", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_decoding_ends_at_the_deadline(file_format: str) -> None:
    data = encode(noise(), file_format)
    with pytest.raises(ImageError, match=r"takes more than 1e-09 s of CPU time to decode; shrink"):
        load_image(data, limits=ImageLimits(max_cpu_s=1e-9))


def test_scans_end_at_the_deadline() -> None:
    white = Image.new("L", (4000, 4000), "white")
    data = encode(white, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    slow = data[:last] + data[last:-2] * 50 + data[-2:]
    with (
        within_limits("scans", 0.7),
        pytest.raises(ImageError, match=r"more than 0.1 s of CPU time"),
    ):
        load_image(slow, limits=ImageLimits(max_cpu_s=0.1))


def tags_that_share_bytes(size: int) -> bytes:
    """A TIFF directory of which every tag holds the whole block."""
    num_tags = 2000
    tags = [struct.pack("<HHLL", tag, 7, size - 64, 8) for tag in range(1000, 1000 + num_tags)]
    block = b"II*\0" + struct.pack("<LH", 8, num_tags) + b"".join(tags) + bytes(4)
    return block.ljust(size, b"\0")


def test_tags_that_share_bytes_are_refused() -> None:
    block, message = tags_that_share_bytes(2_000_000), "has tags that hold more than the file does"
    with within_limits("TIFF", 0.5), pytest.raises(ImageError, match=message):
        load_image(block)
    for file_format in ("PNG", "WEBP"):
        data = encode(noise(), file_format, exif=b"Exif\0\0" + block)
        with within_limits(file_format, 0.5), pytest.raises(ImageError, match=message):
            load_image(data)
    short = tags_that_share_bytes(65_000)
    with pytest.raises(ImageError, match=message):
        load_image(encode(noise(), "JPEG", exif=b"Exif\0\0" + short))


def test_exif_of_many_starts_is_refused() -> None:
    data = encode(noise(), "PNG", exif=b"Exif\0\0" * 1_000_000)
    with within_limits("starts", 0.5), pytest.raises(ImageError, match="has damaged EXIF; save it"):
        load_image(data)


def test_out_of_memory_is_an_image_error() -> None:
    class Hungry(Image.Image):
        def load(self) -> Any:
            raise MemoryError

    image = Hungry()
    image._size, image._mode = (4, 4), "RGB"
    with pytest.raises(ImageError, match="'<PIL image>' needs more memory than there is; shrink"):
        load_image(image)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_peak_of_memory_is_as_documented(file_format: str) -> None:
    mode = "CMYK" if file_format == "JPEG" else "RGBA"
    options: dict[str, Any] = {
        "JPEG": {"progressive": True, "subsampling": 0},
        "WEBP": {"lossless": True, "method": 0},
        "TIFF": {"compression": "tiff_adobe_deflate", "strip_size": 2**30},
    }
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    chosen = options.get(file_format, {})
    data = encode(Image.new(mode, (8191, 8191), (9, 9, 9, 9)), file_format, exif=exif, **chosen)
    with within_limits(file_format, max_bytes=20 * 8192**2 + 10**8):
        assert load_image(data).size_wh == (8191, 8191)


def test_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="'<PIL image>' has no pixels: 0x5"):
        load_image(Image.new("RGB", (0, 5)))


# Damage


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "PPM", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_file_gives_no_partial_picture(file_format: str, share: float) -> None:
    data = encode(noise(), file_format)
    with pytest.raises(
        ImageError, match=r"cannot be decoded, it may be damaged|is not a supported"
    ):
        load_image(data[: int(len(data) * share)])


def test_truncated_pil_image_is_refused() -> None:
    data = encode(noise(), "JPEG")
    with pytest.raises(ImageError, match="'<PIL image>' cannot be decoded, it may be damaged"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]), st.data())
def test_damaged_bytes_give_a_picture_or_an_image_error(
    file_format: str, data: st.DataObject
) -> None:
    damaged = bytearray(encode(noise((8, 8)), file_format))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        loaded = load_image(bytes(damaged), limits=ImageLimits(max_pixels=10_000))
    except ImageError:
        return
    assert loaded.pixels.mode == "RGB"


# Orientation


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int, file_format: str) -> None:
    image = Image.new("RGB", (40, 30))
    image.paste(WHITE, (0, 0, 20, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    loaded = load_image(encode(image, file_format, exif=exif, **options))
    assert loaded.orientation == orientation
    image.getexif()[ORIENTATION] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image), dtype=int)
    difference = np.abs(np.asarray(loaded.pixels, dtype=int) - expected)
    assert loaded.pixels.size == (expected.shape[1], expected.shape[0])
    assert difference.mean() < 5
    again = load_image(loaded.pixels)
    assert (again.orientation, again.digest) == (1, loaded.digest)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_invalid_orientation_counts_as_none(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    loaded = load_image(encode(noise(), "JPEG", exif=exif))
    assert (loaded.orientation, loaded.size_wh) == (1, (64, 48))


def test_metadata_does_not_travel_on() -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    loaded = load_image(encode(noise(), "JPEG", exif=exif, comment=b"home", dpi=(72, 72)))
    assert loaded.pixels.info == {}
    assert not loaded.pixels.getexif()


# Modes


@pytest.mark.parametrize("mode", ["LA", "RGBA", "RGBa"])
def test_transparency_is_laid_onto_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 127))
    assert colors(image.convert(mode)) == [WHITE, (0, 0, 0), (128, 128, 128)]


def test_palette_with_alpha_is_laid_onto_white() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette(list(RED) * 256)
    image.putpixel((1, 0), (0, 255))
    assert colors(image) == [WHITE, RED]


@pytest.mark.parametrize("file_format", ["GIF", "PNG"])
def test_transparent_palette_is_laid_onto_white(file_format: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, *RED])
    image.putpixel((1, 0), 1)
    assert colors(encode(image, file_format, transparency=0)) == [WHITE, RED]
    assert colors(encode(image, file_format)) == [(0, 0, 255), RED]


def test_transparent_color_key_is_laid_onto_white() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), RED)
    assert colors(encode(image, transparency=(1, 2, 3))) == [WHITE, RED]
    gray = png((2, 1), 8, 0, b"\0\x07\x09", png_chunk(b"tRNS", b"\0\x07"))
    assert colors(gray) == [WHITE, (9, 9, 9)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_modes_without_transparency_keep_black_and_white(mode: str) -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), WHITE)
    if mode == "LAB":
        image = Image.new("LAB", (2, 1), (0, 128, 128))
        image.putpixel((1, 0), (255, 128, 128))
    converted = image if image.mode == mode else image.convert(mode)
    assert np.allclose(colors(converted), [(0, 0, 0), WHITE], atol=1)


def test_16_bit_gray_keeps_its_high_byte() -> None:
    values = np.array([[0, 0x1234, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    pgm = b"P5 3 1 65535\n" + values.astype(">u2").tobytes()
    for source in (image, encode(image, "PNG"), encode(image, "TIFF"), pgm):
        assert colors(source) == [(0, 0, 0), (0x12, 0x12, 0x12), WHITE]


def test_16_bit_gray_with_a_transparent_value_is_laid_onto_white() -> None:
    rows = b"\0" + struct.pack(">2H", 0x1234, 0x1235)
    data = png((2, 1), 16, 0, rows, png_chunk(b"tRNS", b"\x12\x34"))
    assert colors(data) == [WHITE, (0x12, 0x12, 0x12)]


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integer"), (np.float32, "float")])
def test_pixels_of_unknown_range_are_refused(dtype: Any, kind: str) -> None:
    image = Image.fromarray(np.zeros((2, 2), dtype=dtype))
    expected = f"has {kind} pixels of unknown range; scale them to 0..255 first"
    with pytest.raises(ImageError, match=f"'<PIL image>' {expected}"):
        load_image(image)
    with pytest.raises(ImageError, match=f"'<bytes>' {expected}"):
        load_image(encode(image, "TIFF"))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_first_frame_is_taken_and_the_others_counted(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    loaded = load_image(data)
    assert loaded.num_frames == 3
    assert loaded.digest == load_image(frames[0]).digest


def test_phone_picture_with_two_jpegs_is_read() -> None:
    data = encode(noise(), "MPO", save_all=True, append_images=[noise()])
    assert load_image(data).num_frames == 2


def test_tiff_whose_pages_form_a_circle_is_read() -> None:
    data = bytearray(encode(noise((8, 8)), "TIFF", save_all=True, append_images=[noise((8, 8))]))
    place = 4
    for _ in range(2):
        (page,) = struct.unpack_from("<L", data, place)
        place = page + 2 + 12 * struct.unpack_from("<H", data, page)[0]
    data[place : place + 4] = data[4:8]
    assert load_image(bytes(data)).num_frames == 2


def test_pil_image_is_taken_at_its_frame_and_left_as_it_is() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image = Image.open(io.BytesIO(data))
    image.seek(1)
    loaded = load_image(image)
    assert (colors(image)[0], loaded.num_frames, image.tell()) == ((0, 0, 255), 1, 1)


def test_source_is_never_changed() -> None:
    image = noise()
    image.info["note"] = "mine"
    image.getexif()[ORIENTATION] = 6
    before = image.tobytes()
    loaded = load_image(image)
    loaded.pixels.paste(RED, (0, 0, 9, 9))
    assert (image.tobytes(), image.size, image.info["note"]) == (before, (64, 48), "mine")
    assert image.getexif()[ORIENTATION] == 6
    array = np.zeros((4, 4), dtype=np.uint8)
    load_image(array).pixels.paste(RED, (0, 0, 2, 2))
    assert not array.any()


# Content


@given(small_rgb, small_rgb)
def test_digest_is_equal_exactly_if_the_pixels_are(a: np.ndarray, b: np.ndarray) -> None:
    assert (load_image(a).digest == load_image(b).digest) == np.array_equal(a, b)


def test_digest_tells_shapes_with_the_same_bytes_apart() -> None:
    array = np.zeros((2, 6, 3), dtype=np.uint8)
    shapes = [array, array.reshape(6, 2, 3), array.reshape(3, 4, 3), array.reshape(1, 12, 3)]
    assert len({load_image(shape).digest for shape in shapes}) == 4


@given(small_rgb)
def test_digest_is_the_same_through_lossless_formats(array: np.ndarray) -> None:
    image = Image.fromarray(array)
    encoded = [encode(image, file_format) for file_format in ("PNG", "BMP", "TIFF", "PPM")]
    encoded.append(encode(image, "WEBP", lossless=True, exact=True))
    assert {load_image(data).digest for data in encoded} == {load_image(array).digest}


def test_pixels_of_our_own_are_named_by_content() -> None:
    loaded = load_image(noise())
    crop = from_pixels(loaded.pixels.crop((0, 0, 64, 48)), "crop")
    assert (crop.digest, crop.source, crop.orientation) == (loaded.digest, "crop", 1)


@pytest.mark.parametrize(("mode", "size_wh"), [("L", (4, 4)), ("RGB", (0, 4))])
def test_pixels_of_our_own_must_be_rgb(mode: str, size_wh: tuple[int, int]) -> None:
    with pytest.raises(
        ImageError, match=rf"expected RGB pixels.*mode {mode} and size .*load_image"
    ):
        from_pixels(Image.new(mode, size_wh), "crop")


# The tower


@pytest.mark.parametrize(
    ("size_wh", "max_side", "expected"),
    [
        ((1, 1), None, (28, 28)),
        ((27, 100), None, (28, 100)),
        ((10_000, 1), None, (5040, 28)),
        ((1, 10_000), None, (28, 5040)),
        ((10_000, 1), 448, (448, 28)),
        ((5601, 28), None, (5040, 28)),
        ((1000, 333), 448, (448, 149)),
        ((333, 1000), 448, (149, 448)),
        ((100, 100), 20, (28, 28)),
        ((10_000, 40), 8000, (5760, 32)),
    ],
)
def test_odd_shapes_are_fitted_for_the_tower(
    size_wh: tuple[int, int], max_side: int | None, expected: tuple[int, int]
) -> None:
    assert fit_for_tower(Image.new("RGB", size_wh), min_side=28, max_side=max_side).size == expected


@pytest.mark.parametrize("size_wh", [(28, 28), (5600, 28), (448, 300)])
def test_picture_that_fits_the_tower_is_the_same_object(size_wh: tuple[int, int]) -> None:
    image = Image.new("RGB", size_wh)
    assert fit_for_tower(image, min_side=28) is image
    assert fit_for_tower(image, min_side=28, max_side=max(size_wh)) is image


def test_fitting_uses_nearest_pixels() -> None:
    image = Image.new("RGB", (2, 28))
    image.paste(WHITE, (1, 0, 2, 28))
    fitted = np.asarray(fit_for_tower(image, min_side=28))
    assert set(np.unique(fitted).tolist()) == {0, 255}


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.none() | st.integers(1, 3000),
    st.sampled_from([28, 32]),
)
def test_every_size_is_accepted_by_the_tower(
    w: int, h: int, max_side: int | None, min_side: int
) -> None:
    image = Image.new("1", (w, h))
    width, height = fit_for_tower(image, min_side=min_side, max_side=max_side).size
    assert min(width, height) >= min_side
    assert max(width, height) / min(width, height) <= 200
