"""Depth maps and boxes as token text, and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt.errors import DataError, RegionError
from vpt.protocol.calls import format_depth, format_pixel_box, parse_depth, parse_pixel_boxes
from vpt.protocol.tokens import DEPTH_END, DEPTH_START, depth_tokens, pixel_tokens

CODES = list(range(100))
pixels = st.integers(0, 335)
boxes = st.tuples(pixels, pixels, pixels, pixels).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def test_the_released_tokens_are_there():
    assert depth_tokens()[:3] == ["<DEPTH_START>", "<DEPTH_END>", "<DEPTH_0>"]
    assert depth_tokens()[-1] == "<DEPTH_127>" and len(set(depth_tokens())) == 130
    assert pixel_tokens()[0] == "<PIXEL_0>" and pixel_tokens()[-1] == "<PIXEL_335>"
    assert len(pixel_tokens()) == 336


@settings(deadline=None)  # machines differ
@given(st.lists(st.integers(0, 127), min_size=100, max_size=100))
def test_text_of_codes_reads_back(codes):
    text = format_depth(codes)
    assert text.startswith("<DEPTH_START><DEPTH_") and text.endswith("<DEPTH_END>")
    assert parse_depth(text) == tuple(codes)


def test_text_uses_only_the_tokens_of_the_table():
    inner = format_depth(CODES).replace("><", "> <").split()
    assert len(inner) == 102 and set(inner) <= set(depth_tokens())


def test_space_between_tokens_does_not_matter():
    spaced = f" {DEPTH_START} " + " ".join(f"<DEPTH_{c}>" for c in CODES) + f"\n{DEPTH_END}\n"
    assert parse_depth(spaced) == tuple(CODES)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (CODES[:99], "expected a depth map of 100 codes, got 99"),
        ([], "expected a depth map of 100 codes, got 0"),
        ([*CODES[:99], 128], "unknown depth code 128; the codebook has 0 to 127"),
        ([-1, *CODES[1:]], "unknown depth code -1"),
    ],
)
def test_codes_that_are_no_map_are_refused(codes, message):
    with pytest.raises(DataError, match=message):
        format_depth(codes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected <DEPTH_START> ... <DEPTH_END>, got ''"),
        (format_depth(CODES)[:-1], "expected <DEPTH_START> ... <DEPTH_END>, got '<DEPTH_START>"),
        (DEPTH_START + DEPTH_END, "of 100 codes, got 0"),
        (format_depth(CODES).replace("<DEPTH_7>", ""), "of 100 codes, got 99"),
        (format_depth(CODES).replace("<DEPTH_7>", "<DEPTH_999>"), "unknown depth code 999"),
        (format_depth(CODES).replace("<DEPTH_7>", "<DEPTH_07>"), "only codes .* got '<DEPTH_07>'"),
        (format_depth(CODES).replace("<DEPTH_7>", "near"), "expected only codes .* got 'near'"),
        (format_depth(CODES) * 2, "expected only codes"),
    ],
)
def test_text_that_is_no_map_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        parse_depth(text)


@settings(deadline=None)  # machines differ
@given(st.lists(boxes, max_size=5), st.sampled_from(["", ", ", " and "]))
def test_boxes_in_text_are_found_and_counted(found, between):
    text = "There are " + between.join(format_pixel_box(box) for box in found) + " cats."
    assert parse_pixel_boxes(text) == tuple(found)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 336, 5), "expected a box within 0 to 335"),
        ((5, 0, 4, 5), "left to right and top to bottom"),
        ((0, 0, 5), "expected left, top, right, bottom, got 3 numbers"),
    ],
)
def test_boxes_outside_the_image_are_refused(box, message):
    with pytest.raises(RegionError, match=message):
        format_pixel_box(box)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<PIXEL_1><PIXEL_2><PIXEL_3>", "expected four pixel tokens per box, got 3"),
        ("a <PIXEL_1> <PIXEL_2> b", "got 2 in '<PIXEL_1> <PIXEL_2> '"),
        ("<PIXEL_1><PIXEL_2><PIXEL_3><PIXEL_400>", "expected a box within 0 to 335"),
    ],
)
def test_pixel_tokens_that_are_no_box_are_refused(text, message):
    with pytest.raises(RegionError, match=message):
        parse_pixel_boxes(text)


def test_text_without_pixel_tokens_holds_no_box():
    assert parse_pixel_boxes("No cat, <PIXEL_x>.") == ()
