"""Mutated pictures: read, or refused with words, within bounds of time and memory."""

from __future__ import annotations

import io
import random
import re
import struct
import warnings
import zlib

import pytest
from fuzz.limits import within_limits
from PIL import Image

from vpt.errors import ImageError
from vpt.images import load_image

MODES = {
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "MPO": ("RGB",),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
}
OPTIONS = {
    "JPEG": ({}, {"progressive": True}, {"restart_marker_blocks": 1}),
    "PNG": ({}, {"compress_level": 0}),
    "TIFF": (
        *({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}),
        *({"compression": "packbits"}, {"compression": "jpeg"}, {"compression": "group4"}),
        {"big_tiff": True},
    ),
    "WEBP": ({}, {"lossless": True}),
}
# libtiff ends the process for some others.
WRITTEN_FOR = {"group4": ("1",), "jpeg": ("L", "RGB")}
ANIMATED = ("GIF", "MPO", "PNG", "TIFF", "WEBP")
SHAPES = (  # (W, H) in headers: usual, at the limits, beyond them
    *((0, 5), (1, 1), (1, 300), (300, 300), (2000, 1000), (65_500, 7), (7, 65_501), (65_535, 1000)),
    *((2**24 - 1, 1), (1, 2**24 - 1), (89_478_485, 1), (20_000, 10_000), (2**31 - 1, 2)),
    *((2**32 - 1, 2**32 - 1), (8192, 8192)),
)


def valid_files():
    """Small files of every format, mode and option that Pillow writes."""
    chance = random.Random(0)
    files = []
    for kind, modes in MODES.items():
        for mode in modes:
            image = _image(mode, (chance.randint(1, 40), chance.randint(1, 40)))
            for options in OPTIONS.get(kind, ({},)):
                only = WRITTEN_FOR.get(options.get("compression"), modes)
                if mode not in only:
                    continue
                for is_animated in (False, True) if kind in ANIMATED else (False,):
                    exif = Image.Exif()
                    exif[0x0112], exif[0x010F] = chance.randint(1, 8), "x" * chance.randint(0, 30)
                    more = {"exif": exif} if kind not in ("BMP", "GIF", "PPM") else {}
                    if is_animated:
                        more |= {"save_all": True, "append_images": [image, image.copy()]}
                    buffer = io.BytesIO()
                    try:
                        image.save(buffer, kind, **options, **more)
                    except (OSError, ValueError, KeyError, RuntimeError):
                        continue  # Pillow does not write this mode so
                    files.append(buffer.getvalue())
    return files


def _image(mode, size):
    noise = Image.effect_noise(size, 60)
    if mode in ("I;16", "I", "F"):
        return noise.convert("I").convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", [noise] * 3)
    return noise.convert("RGB").convert(mode)


def mutate(data, files, chance):
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        kind = chance.randrange(10)
        if kind < 2:
            for _ in range(chance.choice((1, 2, 20))):
                data[chance.randrange(len(data))] = chance.randrange(256)
        elif kind == 2:  # near the start, where the headers are
            data[chance.randrange(min(len(data), 64))] = chance.choice((0, 1, 127, 128, 255))
        elif kind == 3:
            del data[chance.randrange(1, len(data) + 1) :]
        elif kind == 4:
            data += chance.choice(files)
        elif kind == 5:
            at, length = chance.randrange(len(data)), chance.randrange(1, 60)
            data[at:at] = data[at : at + length] * chance.choice((1, 2, 50))
        elif kind == 6:
            at = chance.randrange(len(data))
            del data[at : at + chance.randrange(1, 30)]
        elif kind == 7:
            _more_scans(data, chance)
            data = _other_exif(data, chance)
        else:
            _other_sides(data, chance)
        data = data or bytearray(b"\0")
    return bytes(_with_sums(data) if chance.random() < 0.5 else data)


def _other_sides(data, chance):
    """Change width and height in the header, or in the first directory of tags."""
    shape = chance.choice(SHAPES) if chance.random() < 0.2 else chance.choice(SHAPES[:-1])
    if data[:2] == b"\xff\xd8" and (found := re.search(rb"\xff[\xc0-\xc2]\0", data)):
        places, size, order = (found.start() + 7, found.start() + 5), 2, "big"
    elif data[:2] in (b"II", b"MM"):
        tags = (re.search(rb"%b\x01[\x03\x04]\x00" % tag, data) for tag in (b"\0", b"\x01"))
        places, size, order = [found.start() + 8 for found in tags if found], 4, "little"
    elif data[:1] == b"P":
        data[2:2] = b"\n%d %d " % shape
        return
    elif data[12:16] == b"VP8X":
        places, size, order = (24, 27), 3, "little"
    else:
        places, size, order = {
            b"\x89PNG": ((16, 20), 4, "big"),
            b"GIF8": ((6, 8), 2, "little"),
            b"RIFF": ((26, 28), 2, "little"),
        }.get(bytes(data[:4]), ((18, 22), 4, "little"))
    for place, side in zip(places, shape, strict=False):
        if place + size <= len(data):
            data[place : place + size] = (side % 256**size).to_bytes(size, order)


def _more_scans(data, chance):
    """Repeat the last scan of a JPEG; the picture is larger, so that each takes its time."""
    start, found = data.rfind(b"\xff\xda"), re.search(rb"\xff\xc2\0", data)
    if found and start > found.start() and len(data) > found.start() + 9:
        data[found.start() + 5 : found.start() + 9] = struct.pack(">HH", 2000, 2000)
        data[start:start] = data[start:-2] * chance.choice((1, 50, 3000))


def _other_exif(data, chance):
    """Put a block of odd tags where a JPEG has one, else anywhere."""
    tags = [
        struct.pack(
            "<HHLL",
            chance.choice((0x0112, 0x011A, 0x8769, 0x8825, chance.randrange(65536))),
            chance.randrange(20),
            chance.choice((0, 1, 2, 100, 2**16, 2**31, 2**32 - 1)),
            chance.choice((0, 1, 8, 14, 200, 2**31)),
        )
        for _ in range(chance.choice((0, 1, 5, 300)))
    ]
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags)
    block += struct.pack("<L", chance.choice((0, 8, 2**31)))
    if data[:2] == b"\xff\xd8":
        data[2:2] = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    elif data[:4] == b"\x89PNG":
        data[33:33] = struct.pack(">L", len(block) - 6) + b"eXIf" + block[6:] + bytes(4)
    elif data[:4] == b"RIFF":
        data += b"EXIF" + struct.pack("<L", len(block)) + block
    else:
        at = chance.randrange(len(data))
        data[at : at + len(block)] = block
    return data


def _with_sums(data):
    """The chunks of a PNG with right check sums, so that what is in them is read."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        (length,) = struct.unpack_from(">L", data, at)
        end = at + 8 + length
        if end + 4 <= len(data):
            struct.pack_into(">L", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data


def check(seeds):
    files = valid_files()
    assert len(files) > 60
    num_read = 0
    for seed in seeds:
        chance = random.Random(seed)
        data = mutate(chance.choice(files), files, chance)
        with within_limits(f"picture {seed}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, which goes on
            try:
                loaded = load_image(data)
            except ImageError as exc:
                assert len(str(exc)) < 500, seed
                continue
            except Exception as exc:
                raise AssertionError(f"picture of seed {seed}") from exc
        assert loaded.pixels.mode == "RGB" and loaded.num_frames >= 1, seed
        num_read += 1
    assert 0.05 < num_read / len(seeds) < 0.95


def test_a_mutated_picture_is_read_or_refused():
    check(range(100))


@pytest.mark.slow
def test_many_mutated_pictures_are_read_or_refused():
    check(range(10_000))
