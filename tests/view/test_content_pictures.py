"""Depth maps and boxes in pictures, in the demo's timeline and views, and on the terminal."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from vpt.cli.ask import Screen
from vpt.demo.runs import draw_views, shown_results
from vpt.errors import ImageError
from vpt.images import from_pixels
from vpt.inference.events import ContentEvent
from vpt.trace.records import CallRecord, ContentRecord, ImageRecord, TokenRecord, Trace
from vpt.view.picture import draw, shown_in_panels
from vpt.view.renderers import CALL_COLOURS, VIRIDIS, Album, draw_look, marks_on
from vpt.view.timeline import timeline_html
from vpt.view.wording import content_text

RAMP = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))  # near on the right
BOXES = [(20, 30, 60, 90), (100, 10, 150, 60)]


def make_trace(decode=lambda codes: RAMP, size_wh=(200, 120), is_whole=True):
    """A map of four codes, two boxes, then a word."""
    tokens = ["<DEPTH_START>", *["<DEPTH_7>"] * 4, "<DEPTH_END>", *["<PIXEL_3>"] * 8, "two"]
    trace = Trace("How many?", "auto", stop_reason="stop", answer="two")
    trace.images = [ImageRecord("/a/photo.png", size_wh, "d")]
    trace.tokens = [TokenRecord(i, text, 0, 2.0) for i, text in enumerate(tokens)]
    trace.content = [
        ContentRecord("depth", 0, 0, 0, 6, is_whole, 12.0, codes=[7] * 4),
        ContentRecord("boxes", 0, 0, 6, 14, True, 16.0, boxes=[(0,) * 4] * 2, boxes_xyxy_px=BOXES),
    ]
    if decode is not None:
        trace.content[0].keep_depth_map(decode)
    trace.keep_thumbnails([from_pixels(photo(size_wh), "photo.png")])
    return trace


def photo(size_wh=(200, 120)):
    return Image.new("RGB", size_wh, "#808080")


def has_colour(picture, colour):
    rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return bool((np.asarray(picture) == rgb).all(-1).any())


# --- maps -------------------------------------------------------------------------------------


def test_near_is_yellow_far_is_violet_and_the_shape_is_that_of_the_image():
    trace = make_trace()
    look = draw_look(Album(trace), trace.content[0], (320, 320))
    picture = look.picture
    assert (look.kind, look.ends, look.photo.size) == ("depth", ("far", "near"), picture.size)
    assert picture.width / picture.height == pytest.approx(200 / 120, rel=0.05)
    left, right = (picture.getpixel((x, 5)) for x in (0, picture.width - 1))
    assert np.abs(np.subtract(left, VIRIDIS[0])).max() < 12
    assert np.abs(np.subtract(right, VIRIDIS[-1])).max() < 12


def test_the_kept_map_is_a_small_grey_png():
    head, _, body = make_trace().content[0].picture.partition(",")
    kept = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == "data:image/png;base64" and kept.mode == "L" and max(kept.size) <= 160
    assert kept.getpixel((0, 0)) == 0 and kept.getpixel((63, 0)) == 255


def test_a_damaged_map_is_an_error_with_words():
    trace = make_trace()
    trace.content[0].picture = "data:image/png;base64,AAAA"
    with pytest.raises(ImageError, match=r"the depth map is damaged"):
        draw(trace)


# --- the picture ------------------------------------------------------------------------------


def test_the_picture_has_map_and_boxes():
    trace = make_trace()
    picture = draw(trace)
    for colour in (CALL_COLOURS[0], CALL_COLOURS[1]):  # of the two boxes
        assert has_colour(picture, colour)
    assert has_colour(picture, "#440154")  # the lowest of the colour scale
    without = make_trace()
    without.content.clear()
    plain = draw(without)
    assert not has_colour(plain, "#440154") and not has_colour(plain, CALL_COLOURS[1])


def test_a_map_that_was_not_decoded_is_said_in_its_place():
    for trace in (make_trace(decode=None), make_trace(is_whole=False)):
        assert not has_colour(draw(trace), "#440154")


def test_calls_and_maps_stand_in_the_order_of_their_turns():
    trace = make_trace()
    trace.calls.append(
        CallRecord("crop", "", 1, 0, "executed", (2, 2, 3, 3), (40, 20, 120, 80), num_tokens=4)
    )
    assert [number for number, _ in shown_in_panels(trace)] == [0, 1]
    assert [label for label, _ in shown_results(trace)] == ["depth map of 4 codes"]
    trace.calls[0].grid_hw = (2, 2)
    assert [number for _, number in shown_results(trace)] == [-1, 1]


def test_boxes_are_numbered_through_a_run():
    trace = make_trace()
    trace.content.append(trace.content[1])
    marks = marks_on(Album(trace), 0)
    assert [mark.label for mark in marks] == ["b1", "b2", "b3", "b4"]
    assert [mark.outline for mark in marks] == BOXES * 2


# --- the demo ---------------------------------------------------------------------------------


def test_the_demo_shows_the_map_beside_the_photo():
    views = draw_views(make_trace())
    before, mapped = views.heat
    assert before.size == mapped.size and views.crop is None
    assert has_colour(views.photo, CALL_COLOURS[0])


def test_boxes_alone_are_on_the_photo():
    views = draw_views(make_trace(decode=None))
    assert views.heat is None and views.crop is None
    assert has_colour(views.photo, CALL_COLOURS[1])


def test_the_timeline_names_what_was_drawn_and_folds_its_tokens():
    html = timeline_html(make_trace())
    assert html.count('class="content"') == 2
    assert "depth map of 4 codes" in html and "</b>, from far (violet) to near (yellow)" in html
    assert "2 boxes</b>: 20,30 to 60,90; 100,10 to 150,60" in html
    assert "6 DEPTH" in html and "8 PIXEL" in html and "6 tokens · 12 ms" in html
    assert html.count('class="control"') == 2
    assert "codes only: no depth tokenizer" in timeline_html(make_trace(decode=None))
    assert "cut off after 4 codes" in timeline_html(make_trace(is_whole=False))


def test_the_terminal_says_what_was_drawn(capsys):
    screen = Screen(["/a/photo.png"], True)
    for one in make_trace().content:
        screen.show(ContentEvent(one))
    assert (
        capsys.readouterr().err == "[drew: depth map of 4 codes, 12 ms]\n[drew: 2 boxes, 16 ms]\n"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"codes": [1]}, "depth map of 1 code"),
        ({"codes": [1, 2], "is_whole": False}, "depth map, cut off after 2 codes"),
        ({"kind": "boxes", "boxes": [(0, 0, 1, 1)]}, "1 box"),
        ({"kind": "boxes", "boxes": [], "is_whole": False}, "0 boxes, then one cut off"),
    ],
)
def test_content_in_words(fields, words):
    plain = {"kind": "depth", "turn": 0, "image": 0, "start": 0, "end": 1, "is_whole": True}
    assert content_text(ContentRecord(**{**plain, **fields})) == words
