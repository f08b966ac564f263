"""Pictures of traces: where maps lie, what is drawn, and that nothing breaks them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.boxes import GridBox, crop_box_px
from vpt.branches.dino import RELEASED_PREPROCESS as DINO_SETTINGS
from vpt.branches.sam import RELEASED_PREPROCESS as SAM_SETTINGS
from vpt.errors import ImageError, PromptError
from vpt.images import from_pixels
from vpt.trace.records import CallRecord, ImageRecord, MalformedRecord, Trace
from vpt.view.picture import draw
from vpt.view.renderers import (
    CALL_COLOURS,
    VIRIDIS,
    Album,
    draw_look,
    heat_over,
    marks_on,
    seen_box_px,
    z_scores,
)
from vpt.view.wording import STOP_TEXT, call_text, printable

TINY_DINO = {"size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}}


@pytest.fixture(scope="module")
def runtime():
    return vpt.Runtime(*tiny_model())


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def make_trace(*images, question="What is this?", **fields):
    trace = Trace(question, "auto", stop_reason="stop", **fields)
    trace.images = [ImageRecord(f"/a/{n}.png", i.size, str(n)) for n, i in enumerate(images)]
    return trace


def region_call(trace, region, image=0, outcome="executed"):
    call = CallRecord("crop", "", 0, image, outcome, region)
    if outcome == "executed":
        call.box_xyxy_px = crop_box_px(GridBox(*region), trace.images[image].size_wh)
    trace.calls.append(call)


def map_call(trace, branch, grid_hw, scores=None):
    number = math.prod(grid_hw)
    scores = list(range(number)) if scores is None else scores
    trace.calls.append(
        CallRecord(branch, "", 0, 0, "executed", grid_hw=grid_hw, scores=scores, num_tokens=number)
    )


def has_colour(picture, colour):
    rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return bool((np.asarray(picture) == rgb).all(-1).any())


# Where features lie


def test_the_own_tower_sees_the_whole_image():
    assert seen_box_px("reencode", (300, 200)) == (0, 0, 300, 200)


def test_dino_sees_a_centred_square():
    # 512x256 stays as it is, of which 224x224 are cut: from (144, 16).
    assert seen_box_px("dino", (512, 256)) == (144, 16, 368, 240)
    assert seen_box_px("dino", (1024, 512)) == (288, 32, 736, 480)


def test_sam_sees_the_image_and_padding_on_the_right_or_below():
    assert seen_box_px("sam", (400, 200)) == (0, 0, 400, 400)
    assert seen_box_px("sam", (200, 400)) == (0, 0, 400, 400)


def test_settings_of_the_model_replace_the_released_ones():
    assert seen_box_px("dino", (256, 128), TINY_DINO) == (72, 8, 184, 120)
    assert seen_box_px("dino", (256, 128), {"do_center_crop": False}) == (0, 0, 256, 128)
    assert seen_box_px("dino", (256, 128), {"do_resize": False}) == (16, -48, 240, 176)


def test_an_unknown_branch_is_refused_with_those_there_are():
    with pytest.raises(PromptError, match="unknown branch 'dnio'; available: reencode, dino, sam"):
        seen_box_px("dnio", (10, 10))


@pytest.mark.parametrize("size_wh", [(400, 300), (300, 400), (333, 97), (61, 250), (224, 224)])
@pytest.mark.parametrize("branch", ["dino", "sam"])
def test_seen_box_agrees_with_the_real_preprocessing(runtime, branch, size_wh):
    """A picture whose red is its x and whose green is its y says itself where it was cut."""
    width, height = size_wh
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    ramps = np.stack([x / width, y / height, np.zeros_like(x)], -1)
    image = Image.fromarray((ramps * 255).round().astype(np.uint8))
    encoder = runtime.model.branches[branch]
    settings = encoder.preprocess_config
    pixels = encoder.preprocess([image])["pixel_values"][0]
    std = torch.tensor(settings["image_std"]).view(3, 1, 1)
    mean = torch.tensor(settings["image_mean"]).view(3, 1, 1)
    colours = (pixels * std + mean).numpy()
    box = seen_box_px(branch, size_wh, settings)
    side = pixels.shape[-1]
    for row, column in [(side // 8, side // 8), (side // 3, side // 4), (side // 5, side // 2)]:
        px = box[0] + (column + 0.5) / side * (box[2] - box[0])
        py = box[1] + (row + 0.5) / side * (box[3] - box[1])
        if not (2 < px < width - 2 and 2 < py < height - 2):
            continue  # padding
        assert colours[0, row, column] * width == pytest.approx(px, abs=0.01 * width)
        assert colours[1, row, column] * height == pytest.approx(py, abs=0.01 * height)


# Heat maps


def shares(heated):
    """How bright a colour of viridis is drawn at each pixel, by its green alone."""
    return np.asarray(heated).astype(int)[..., 1]


def test_the_hottest_cell_is_brightest_where_it_lies():
    scores = np.zeros((4, 4), np.float32)
    scores[1, 2] = 5
    photo = Image.new("RGB", (400, 400), "#808080")
    heated, is_flat = heat_over(photo, scores, (0, 0, 400, 400))
    assert not is_flat
    bright = shares(heated) == shares(heated).max()
    assert bright[100:200, 200:300].all() and bright.sum() == 100 * 100  # the cell, no more


def test_scores_are_drawn_by_their_distance_from_the_mean():
    scores = np.arange(16, dtype=np.float32).reshape(4, 4)
    photo = Image.new("RGB", (40, 40), "#808080")
    first, _ = heat_over(photo, scores, (0, 0, 40, 40))
    assert heat_over(photo, 1000 * scores - 7, (0, 0, 40, 40))[0].tobytes() == first.tobytes()
    z = z_scores(scores)
    assert z.mean() == pytest.approx(0) and z.std() == pytest.approx(1)


@pytest.mark.parametrize("value", [0, -3.5, 1e30])
def test_a_constant_map_has_no_colours_and_says_so(value):
    photo = noise(448, 448)
    trace = make_trace(photo)
    map_call(trace, "sam", (4, 4), scores=[value] * 16)
    look = draw_look(Album(trace, [photo]), trace.calls[0], (224, 224))
    assert (look.ends, look.note) == (None, "flat: all scores are equal")
    pixels = np.asarray(look.picture)
    assert (pixels == pixels[..., :1]).all()
    draw(trace, [photo])


def test_a_map_in_the_padding_does_not_reach_the_colour_scale():
    scores = np.zeros((4, 4), np.float32)
    scores[0, 0] = 1
    photo = Image.new("RGB", (400, 200))
    heated = heat_over(photo, scores, (0, 0, 400, 400))[0].tobytes()
    scores[3, 3] = 1000
    assert heat_over(photo, scores, (0, 0, 400, 400))[0].tobytes() == heated


def test_outside_of_the_seen_part_there_are_no_colours():
    photo = Image.new("RGB", (400, 200), "#406080")
    scores = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    heated = np.asarray(heat_over(photo, scores, (100, 0, 300, 200))[0]).astype(int)
    spread = heated.max(-1) - heated.min(-1)
    assert not spread[:, :99].any() and not spread[:, 301:].any()
    assert (spread[5:-5, 105:295] > 20).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_drawn_as_the_lowest(bad):
    scores = np.array([[bad, 1], [2, 3]], np.float32)
    bright = shares(heat_over(Image.new("RGB", (20, 20)), scores, (0, 0, 20, 20))[0])
    assert bright[5, 5] == bright[5, 15] < bright[15, 5] < bright[15, 15]
    scores[:] = bad
    assert heat_over(Image.new("RGB", (20, 20)), scores, (0, 0, 20, 20))[1]


@pytest.mark.parametrize("branch", ["reencode", "dino", "sam"])
def test_a_spot_on_the_photo_changes_the_features_that_are_drawn_there(runtime, branch):
    """Orientation, grid, resizing and padding of maps, from the pixels to the picture."""
    size_wh, spot = (448, 336), (230, 90, 270, 120)
    plain = noise(*size_wh).point(lambda value: 100 + value // 8)
    marked = plain.copy()
    marked.paste((255, 0, 0), spot)
    images = [(branch, from_pixels(image, "x")) for image in (plain, marked)]
    (before, _), (after, _) = runtime.encoders.encode(images)
    changes = (after.values - before.values).norm(dim=-1).reshape(before.grid_hw)
    settings = runtime.model.branch(branch, runtime.processor.image_processor).preprocess_config
    seen_box = seen_box_px(branch, size_wh, settings)
    drawn = shares(heat_over(Image.new("RGB", size_wh), changes.numpy(), seen_box)[0])
    y, x = np.nonzero(drawn == drawn.max())
    assert x.min() <= 250 <= x.max() and y.min() <= 105 <= y.max()


# First looks and crops at the size that the model sees


@pytest.mark.parametrize("limit", [None, 200])
def test_a_first_look_has_the_pixels_of_the_processor(runtime, limit):
    loaded = from_pixels(noise(300, 220), "x")
    trace = make_trace(loaded.pixels)
    values, (grid,) = runtime.processor.preprocess_images([loaded], limit)
    pixels = runtime.processor.image_processor
    t, h, w = grid.tolist()
    merge, patch = pixels.merge_size, pixels.patch_size
    # [h/m, w/m, m, m, C, T, p, p], as Qwen2-VL's image processor orders patches
    patches = values.reshape(t, h // merge, w // merge, merge, merge, 3, -1, patch, patch)
    seen = patches[0, :, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4)
    seen = seen.reshape(h * patch, w * patch, 3).numpy()
    seen = (seen * pixels.image_std + pixels.image_mean) * 255
    trace.images[0].seen_wh = size_wh = (w * patch, h * patch)
    trace.images[0].num_tokens = h * w // merge**2
    trace.model["image_resolution"] = limit
    drawn = Album(trace, [loaded.pixels]).as_seen(0, size_wh)
    assert drawn.size == size_wh
    assert np.abs(np.asarray(drawn).astype(float) - seen).max() < 1


def test_a_real_run_records_and_shows_what_was_seen():
    runtime = vpt.load()
    image = vpt.load_image(Image.new("RGB", (448, 448), "#804020"))
    trace = runtime.ask(image, "Is there a red one?", region=GridBox(3, 3, 3, 3)).trace
    assert [one.seen_wh for one in trace.images] == [(112, 112), (112, 112)]
    drawn = Album(trace, [noise(448, 448)]).as_seen(1, (448, 448))
    blocks = np.asarray(drawn).reshape(112, 4, 112, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()  # squares, one for each pixel that it saw


def test_viridis_grows_lighter_evenly():
    # Rec. 601 luma.
    luma = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in VIRIDIS]
    assert luma == sorted(luma)


# Whole pictures


def test_regions_are_drawn_in_the_colours_of_their_calls():
    photo = noise(336, 336)
    trace = make_trace(photo)
    region_call(trace, (1, 1, 2, 2))
    region_call(trace, (5, 5, 6, 6))
    picture = draw(trace, [photo])
    assert picture.mode == "RGB" and picture.width == 1200
    assert has_colour(picture, CALL_COLOURS[0]) and has_colour(picture, CALL_COLOURS[1])
    assert not has_colour(picture, CALL_COLOURS[2])


@pytest.mark.parametrize("size_wh", [(1, 1), (2, 3000), (3000, 2), (50, 2000), (640, 480)])
def test_images_of_every_shape_can_be_drawn(size_wh):
    photo = noise(*size_wh)
    trace = make_trace(photo)
    region_call(trace, (0, 0, 0, 0))
    for branch in ("reencode", "dino", "sam"):
        map_call(trace, branch, (4, 4))
    picture = draw(trace, [photo])
    assert picture.width == 1200 and picture.height < 3000


@pytest.mark.parametrize("num_images", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("num_calls", [0, 1, 2, 7, 30])
def test_any_number_of_images_and_calls_can_be_drawn(num_images, num_calls):
    photos = [noise(40, 30, seed) for seed in range(num_images)]
    trace = make_trace(*photos)
    for number in range(num_calls if photos else 0):
        region_call(trace, (number % 8, 0, number % 8, 3))
    assert draw(trace, photos).width == 1200


def test_calls_that_brought_nothing_are_drawn():
    photo = noise(40, 30)
    trace = make_trace(photo)
    region_call(trace, (0, 0, 1, 1), outcome="repeated")
    trace.calls.append(CallRecord("sam", "", 1, 0, "not_executed"))
    trace.calls.append(CallRecord("dino", "", 2, 0, "executed", grid_hw=(2, 2), num_tokens=4))
    draw(trace, [photo])


def test_a_crop_of_a_crop_is_placed_in_the_given_image():
    photo = noise(800, 800)
    trace = make_trace(photo)
    region_call(trace, (4, 4, 5, 5))
    trace.images.append(ImageRecord("/a/0.png", (400, 400), "c", 0, (300, 300, 700, 700)))
    trace.calls.append(CallRecord("crop", "", 1, 1, "executed", (0, 0, 0, 0), (300, 300, 400, 400)))
    map_call(trace, "dino", (4, 4))
    trace.calls[-1].image = 1
    marks = marks_on(Album(trace, [photo]), 0)
    assert [mark.cells for mark in marks] == [(400, 400, 600, 600), (300, 300, 350, 350)]
    draw(trace, [photo])


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x1b[31mred\x00",
        "你好世界 🎉🏳️‍🌈",
        "x" * 20_000,
        "\n" * 5000,
        "\ud800 \u202e",
        "a\tb\r\n",
    ],
)
def test_any_text_can_be_drawn(text):
    trace = make_trace(question=f"?{text}", answer=text)
    trace.model = {"name": text or None}
    trace.malformed = [MalformedRecord(text, 0, "wrong")] * 30
    assert draw(trace).height < 6000


def test_thumbnails_take_the_place_of_images():
    photo = noise(1000, 500)
    trace = make_trace(photo)
    region_call(trace, (0, 0, 3, 3))
    with pytest.raises(ImageError, match=r"no image of 0\.png; pass images="):
        draw(trace)
    trace.keep_thumbnails([from_pixels(photo, "x")])
    with_thumbnail = draw(Trace.from_dict(trace.to_dict()))
    assert with_thumbnail.size == draw(trace, [photo]).size


@pytest.mark.parametrize(
    "uri", ["", "http://x/y.png", "data:image/png;base64,AAAA", "data:image/png;base64,?"]
)
def test_a_damaged_thumbnail_is_an_image_error(uri):
    trace = make_trace(noise(4, 4))
    trace.images[0].thumbnail = uri
    with pytest.raises(ImageError, match=r"thumbnail of 0\.png is damaged"):
        draw(trace)


def test_images_must_be_those_of_the_trace():
    trace = make_trace(noise(400, 300), noise(300, 400))
    with pytest.raises(ImageError, match="2 given images, but 1 came"):
        draw(trace, [noise(400, 300)])
    with pytest.raises(ImageError, match="400x300, at any scale; got an image of 300x400"):
        draw(trace, [noise(300, 400), noise(400, 300)])


def test_scores_must_fit_their_grid():
    photo = noise(4, 4)
    trace = make_trace(photo)
    map_call(trace, "sam", (4, 4), scores=[1.0, 2.0])
    with pytest.raises(PromptError, match="2 scores for a grid of 4x4"):
        draw(trace, [photo])


@pytest.mark.parametrize("perception", ["region", "clip", "dino", "sam"])
def test_a_real_run_can_be_drawn(runtime, goldens, perception):
    image = vpt.load_image(goldens / "images" / "a_scene.png")
    answer = runtime.ask(image, "What is this?", perception=perception, max_new_tokens=20)
    picture = draw(answer.trace, [image.pixels])
    assert has_colour(picture, CALL_COLOURS[0])


def test_a_saved_run_is_drawn_as_the_run_itself(runtime, goldens, tmp_path):
    image = vpt.load_image(goldens / "images" / "a_scene.png")
    trace = runtime.ask(image, "What is this?", perception="dino", max_new_tokens=4).trace
    trace.save(tmp_path / "trace.json")
    saved = draw(Trace.load(tmp_path / "trace.json"), [image.pixels])
    assert saved.tobytes() == draw(trace, [image.pixels]).tobytes()


def test_what_a_trace_tells_of_preprocessing_is_used_or_else_the_released():
    photo = noise(400, 300)
    trace = make_trace(photo)
    map_call(trace, "dino", (4, 4))
    silent = draw(trace, [photo]).tobytes()
    trace.model["preprocess"] = {"dino": DINO_SETTINGS}
    assert draw(trace, [photo]).tobytes() == silent
    trace.model["preprocess"] = {"dino": {**DINO_SETTINGS, **TINY_DINO}}
    assert draw(trace, [photo]).tobytes() != silent


def test_what_a_trace_tells_of_the_grid_is_used_or_else_the_released():
    photo = noise(400, 400)
    trace = make_trace(photo)
    region_call(trace, (3, 3, 3, 3))
    (mark,) = marks_on(Album(trace, [photo]), 0)
    assert mark.cells == (150, 150, 200, 200)
    trace.settings["grid_size"] = 4
    (mark,) = marks_on(Album(trace, [photo]), 0)
    assert mark.cells == (300, 300, 400, 400)


def test_equal_regions_share_a_mark_with_the_numbers_of_their_calls():
    photo = noise(80, 80)
    trace = make_trace(photo)
    for region in ((0, 0, 1, 1), (2, 2, 3, 3), (0, 0, 1, 1)):
        region_call(trace, region)
    assert [mark.numbers for mark in marks_on(Album(trace, [photo]), 0)] == [[1, 3], [2]]


# Words


def test_control_characters_become_visible_and_text_stays():
    assert printable("a\x1b[1m\x00\x7f\x9b\u202e\ud800\r") == (
        "a\\x1b[1m\\x00\\x7f\\x9b\\u202e\\ud800\\r"
    )
    plain = "line\n\ttab ünï 你好 👩‍👩‍👧 عربى"
    assert printable(plain) == plain


def test_calls_are_named_as_a_person_would():
    assert call_text(CallRecord("crop", "", 0, 0, "executed", (2, 1, 5, 1))) == "region x 2-5, y 1"
    assert call_text(CallRecord("reencode", "", 0, 0, "executed")) == "clip"
    assert call_text(CallRecord("grounding", "", 0, 0, "executed")) == "grounding"


def test_every_stop_reason_has_words():
    assert set(STOP_TEXT) == {"stop", "length", "max_calls", "repeated_call"}


def test_released_settings_are_those_of_the_branches():
    for branch, settings in (("dino", DINO_SETTINGS), ("sam", SAM_SETTINGS)):
        assert seen_box_px(branch, (123, 77)) == seen_box_px(branch, (123, 77), settings)
