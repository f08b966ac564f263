"""What the demo shows of a trace: its lines, its pictures, and traces that are broken."""

import base64
import copy
import io
import json
import re
import time

import pytest
import torch
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.demo.runs import (
    MOST_CHARACTERS,
    SETTINGS,
    box_to_edit,
    draw_views,
    make_follow_up,
    make_requests,
    point_on_image,
    read_settings,
    shown_results,
    watch_live,
)
from vpt.errors import ImageError, PromptError, RegionError, VPTError
from vpt.inference.request import OPTIONS
from vpt.trace.records import Trace
from vpt.view.renderers import Z_ENDS, Album, draw_look
from vpt.view.timeline import timeline_html
from vpt.view.wording import look_text

QUESTION = "What number is on the blue one?"
_buffer = io.BytesIO()
Image.new("1", (4000, 4000)).save(_buffer, "PNG")
VAST = "data:image/png;base64," + base64.b64encode(_buffer.getvalue()).decode()
CHOSEN = {name: OPTIONS[name].default for name in SETTINGS}


def run(runtime, picture, question=QUESTION, **changes):
    settings = {**CHOSEN, **changes}
    requests = make_requests(runtime, str(picture), question, settings)
    return [snapshot.trace for snapshot in watch_live(runtime.watch_many(requests))][-1]


@pytest.fixture(scope="module")
def region(embedded, picture):
    return run(embedded, picture)


@pytest.fixture(scope="module")
def heat(embedded, picture):
    return run(embedded, picture, perception="dino")


def test_a_growing_trace_shows_what_the_whole_one_shows(embedded, picture):
    requests = make_requests(embedded, str(picture), QUESTION, CHOSEN)
    lines = []
    for snapshot in watch_live(embedded.watch_many(requests)):
        grown = copy.deepcopy(snapshot.trace)
        lines.append(timeline_html(grown).count("<li"))
        draw_views(grown)  # whatever has happened so far
        if not grown.stop_reason:
            before = grown
    assert lines == sorted(lines)
    whole = snapshot.trace
    assert before.tokens == whole.tokens[: len(before.tokens)]
    assert [call.text for call in before.calls] == [c.text for c in whole.calls][
        : len(before.calls)
    ]


def test_a_call_without_its_result_is_pending(region):
    assert "…" not in timeline_html(region)
    pending = copy.deepcopy(region)
    pending.calls[0].grid_hw = None
    assert "…" in timeline_html(pending)


def test_a_run_that_fails_leaves_the_other_alone(picture):
    model, processor = tiny_model()
    torch.nn.init.constant_(model.projectors["dino"].linear_feature.weight, float("nan"))
    runtime = vpt.Runtime(model, processor)
    settings = {**CHOSEN, "perception": "dino", "max_new_tokens": 5}
    requests = make_requests(runtime, str(picture), "x", settings, compare=True)
    snapshots = list(watch_live(runtime.watch_many(requests)))
    ends = {one.index: one for one in snapshots}
    assert isinstance(ends[0].event, vpt.ErrorEvent) and "not finite" in str(ends[0].event.error)
    assert [call.branch for call in ends[0].trace.calls] == ["dino"]  # as far as it came
    alone = runtime.ask(picture, "x", perception="none", max_new_tokens=5)
    assert ends[1].trace.answer == alone.text


def test_closing_a_watched_run_frees_its_place(endless, picture):
    requests = make_requests(endless, str(picture), "x", CHOSEN)
    snapshots = watch_live(endless.watch_many(requests))
    next(snapshots)
    engine = endless.engine
    busy = engine.num_free_slots
    snapshots.close()
    assert engine.num_free_slots == busy + 1
    read = engine.num_tokens_run
    time.sleep(0.1)
    assert engine.num_tokens_run == read


def test_a_region_shows_its_box_and_its_crop(region):
    views = draw_views(region)
    assert views.photo.size == (640, 640) and views.heat is None
    box = region.calls[0].box_xyxy_px
    assert views.crop.size == (640, 640) and box_to_edit(region) == box
    plain = copy.deepcopy(region)
    plain.calls.clear()
    left, top = (round(side * 640 / 448) for side in box[:2])
    outline = views.photo.getpixel((left + 40, top)), draw_views(plain).photo.getpixel((left, top))
    assert outline[0] == (224, 36, 94) != outline[1]


def test_a_re_encoding_shows_its_score_map(heat):
    views = draw_views(heat)
    photo, over = views.heat
    assert photo.size == over.size and photo.tobytes() != over.tobytes()
    ends = draw_look(Album(heat), heat.calls[0], (640, 640)).ends
    assert ends == Z_ENDS
    assert views.crop is None and box_to_edit(heat) is None


def test_captions_give_the_sizes_that_the_model_saw(region, heat):
    views = draw_views(region)
    assert views.first.size == (640, 640) and views.first.tobytes() != views.photo.tobytes()
    assert views.captions["first"].text == "all that the model saw: 112x112 px, 16 tokens"
    crop = views.captions["crop"]
    assert crop.text == "168x168 px of the photo, seen as 112x112 px, 16 tokens"
    assert set(views.captions) == {"photo", "first", "crop"} and not views.is_score_map
    views = draw_views(heat)
    assert views.captions["heat"].title == "Score map of DINOv2" and views.is_score_map
    assert views.captions["heat"].ends == Z_ENDS


def test_a_trace_of_before_sizes_were_recorded_shows_no_first_look(region):
    old = region.to_dict()
    for image in old["images"]:
        del image["seen_wh"]
    views = draw_views(Trace.from_dict(old))
    assert views.first is None and views.crop.size == (640, 640)
    assert views.captions["crop"].text == "168x168 px of the photo, seen as 16 tokens"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The model chose to look again: region x 3, y 2."),
        ({"perception": "dino"}, "The model was told (dino) to look again: DINOv2."),
        (
            {"question": "Is there a blue one?"},
            "The model did not look again. It answered from the first look (112x112 px, 16 tokens)",
        ),
        ({"perception": "none"}, "The model did not look again. It was not permitted to. It ans"),
    ],
)
def test_the_page_says_whether_the_model_looked_again(embedded, picture, changes, said):
    assert look_text(run(embedded, picture, **changes)).startswith(said)


def test_a_given_region_is_not_shown_as_the_models_own(embedded, picture, region):
    (request,) = make_requests(embedded, str(picture), QUESTION, CHOSEN, box=(310, 290, 380, 325))
    trace = [snapshot.trace for snapshot in watch_live(embedded.watch_many([request]))][-1]
    assert look_text(trace) == "The model did not choose region x 6, y 5: it was given."
    html = timeline_html(trace)
    assert "not the model&#39;s choice" in html and html.count(">writes<") == 1  # the answer
    assert ">is given<" in html and ">is shown<" in html and ">looks again<" not in html
    html = timeline_html(region)
    assert html.count(">writes<") == 2 and ">is given<" not in html and ">looks again<" in html


def test_a_follow_up_shows_the_chat_before_it(embedded, picture):
    chat = embedded.chat(picture)
    for question in (QUESTION, "Is there a green one?"):
        answer = chat.ask(question, perception="none")
    html, count = timeline_html(answer.trace), answer.trace.counts
    heads = re.findall(r'class="head">(\w+)<', html)
    assert heads == ["sees", "read", "wrote", "reads", "writes", "ends"]
    assert f"{count.prompt_tokens} tokens in all, {count.reused_tokens} kept" in html
    assert look_text(answer.trace).endswith("It answered from what it had seen before.")
    assert draw_views(answer.trace).first.size == (640, 640)
    with pytest.raises(PromptError, match="2001 characters"):
        make_follow_up(chat, "x" * (MOST_CHARACTERS + 1), CHOSEN)
    with pytest.raises(PromptError, match="there is no answer to follow up here"):
        make_follow_up(embedded.chat(picture), "And?", CHOSEN)


def test_a_saved_trace_shows_the_same(region, tmp_path):
    region.save(tmp_path / "t.json")
    again = Trace.load(tmp_path / "t.json")
    assert timeline_html(again) == timeline_html(region)
    assert draw_views(again).crop.tobytes() == draw_views(region).crop.tobytes()
    assert shown_results(again) == [("1 · region x 3, y 2", 1)]


def test_a_trace_without_pictures_of_it_is_refused_with_words(region):
    bare = copy.deepcopy(region)
    for record in bare.images:
        record.thumbnail = None
    with pytest.raises(ImageError, match=r"the trace holds no image of tags.jpg"):
        draw_views(bare)


def test_points_of_the_photo_are_points_of_the_picture(region):
    assert point_on_image(region, (320, 160)) == (224, 112)


def test_what_others_wrote_is_escaped(region):
    evil = copy.deepcopy(region)
    evil.question = evil.tokens[0].text = evil.images[0].source = "<img src=x onerror=hack()>"
    evil.calls[0].branch = evil.calls[0].text = evil.stop_reason = '"><script>'
    evil.calls[0].region = None
    html = timeline_html(evil)
    assert "<img" not in html and "<script" not in html and 'title="&lt;img' in html


def test_a_trace_of_a_stranger_names_no_branch_that_is_unknown(heat):
    content = json.loads(heat.to_json())
    content["calls"][0]["branch"] = "<b>"
    with pytest.raises(PromptError, match=r"has scores of the unknown branch '<b>'"):
        Trace.from_dict(content)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("calls.0.image", 7, "names image 7 of 2"),
        ("calls.0.image", "0", "image cannot be '0'"),
        ("calls.0.box_xyxy_px", [0, 0, 999, 9], "is not in an image"),
        ("calls.0.scores", [1.0], "has 1 scores for a grid"),
        ("calls.0.turn", 10**9, r"calls\[0\].turn cannot be 1000000000: .* less than 10000"),
        ("calls.0", 3, "not a trace"),
        ("images.1.parent", 1, "cut from image 1"),
        ("images.0.size_wh", [0, 448], "size_wh is"),
        ("images.0.seen_wh", [112, 0], "seen_wh is"),
        (
            "images.0.thumbnail",
            "data:image/png;base64,AAAA",
            "cannot be decoded|is not a supported",
        ),
        ("images.0.thumbnail", "nonsense", "damaged"),
        ("images.0.thumbnail", VAST, "too many pixels: 4000x4000"),
        ("settings", [], "settings cannot be"),
        ("settings.grid_size", 0, "grid_size"),
        ("settings.grid_size", 10**400, "grid_size|settings cannot be"),
        ("settings.seed", 10**400, "settings cannot be 1000"),
        ("settings.system", [[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]], "settings cannot be"),
        ("images", ["abc"], r"images\[0\] cannot be 'abc'"),
        ("images.0.size_wh", [10**400, 1], r"size_wh\[0\] cannot be"),
        ("images.0.size_wh", [448], "size_wh cannot be"),
        ("images.0.colour", "red", r"images\[0\] has an unknown field 'colour'"),
        ("images.0.box_xyxy_px", [0, 0, 999, 9], "is not in an image"),
        ("calls.0.region", [0, 0, 9, 9], r"calls\[0\].region: .* does not fit a grid of 8x8"),
        ("calls.0.region", [3, 0, 2, 9], r"calls\[0\].region: expected 0 <= min <= max"),
        ("calls.0.num_tokens", -1, "num_tokens cannot be -1"),
        ("calls.0.run_ms", 10**400, "run_ms cannot be 1000"),
        ("calls.0.run_ms", float("nan"), "run_ms cannot be nan"),
        ("timings.total", float("inf"), "timings.total cannot be inf"),
        ("timings", "{{7*7}}", "timings cannot be '{{7"),
        ("tokens", "<a>", "tokens cannot be '<a>'"),
        ("turns", [3], r"turns\[0\] cannot be 3"),
        ("malformed", [{"text": "", "turn": 0, "reason": ""}] * 100_001, "has 100001 malformed"),
        ("model.preprocess.dino", {"size": 3}, r"model.preprocess.dino.size cannot be 3"),
        ("model.preprocess.sam", {"do_pad": True, "pad_size": {"width": 3}}, "sam.pad_size cannot"),
        ("model.preprocess", "x", r"model.preprocess cannot be 'x'"),
        ("tokens.0.ms", None, "ms cannot be"),
        ("version", 99, "expected a trace of version"),
    ],
)
def test_a_broken_trace_is_refused_with_words(heat, region, path, value, said):
    base = heat if path.startswith("model") else region
    content = json.loads(base.to_json())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises(VPTError, match=said):
        trace = Trace.from_dict(content)
        draw_views(trace)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"question": "x" * (MOST_CHARACTERS + 1)}, PromptError, "2001 characters"),
        ({"question": " "}, PromptError, "the question is empty"),
        ({"question": None}, PromptError, "the question is empty"),
        ({"box": (1, 2, None, 4)}, PromptError, "four numbers"),
        ({"box": (500, 500, 600, 600)}, RegionError, "reaches out of the image of 448x448"),
        ({"box": (0.1, 0.1, 0.5, 0.5)}, RegionError, "as fractions of an image have"),
        ({"box": (0, 0, 9, 9), "picture": None}, PromptError, "no image to look at"),
        ({"picture": __file__}, ImageError, "'test_views.py' is not a supported image format"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_words(embedded, picture, changes, error, said):
    given = {"picture": str(picture), "question": QUESTION, **changes}
    with pytest.raises(error, match=said):
        make_requests(embedded, settings=CHOSEN, **given)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", None, "seed is empty; fill it in"),
        ("perception", "", "perception is empty"),
    ],
)
def test_fields_left_empty_are_named(name, value, said):
    with pytest.raises(PromptError, match=said):
        read_settings({**CHOSEN, name: value}.values())


def test_settings_have_bounds():
    with pytest.raises(PromptError, match="top p is empty"):
        read_settings({**CHOSEN, "top_p": None}.values())
    with pytest.raises(PromptError, match="max_new_tokens can be 2048 at most"):
        read_settings({**CHOSEN, "max_new_tokens": 10**9}.values())
    with pytest.raises(
        PromptError, match="max_calls must be a whole number of at least 0, not '8'"
    ):
        read_settings({**CHOSEN, "max_calls": "8"}.values())


def test_a_drawn_box_is_the_smallest_crop_that_covers_it(embedded, picture):
    (request,) = make_requests(
        embedded, str(picture), QUESTION, CHOSEN, box=(310.0, 290.0, 380.0, 325.0)
    )
    trace = [snapshot.trace for snapshot in watch_live(embedded.watch_many([request]))][-1]
    x0, y0, x1, y1 = trace.calls[0].box_xyxy_px
    assert x0 <= 310 and y0 <= 290 and x1 >= 380 and y1 >= 325
    assert x1 - x0 == y1 - y0 == 3 * 56
    assert trace.answer == "4"  # it now reads the black one


def test_two_answers_are_written_side_by_side(embedded, picture):
    requests = make_requests(embedded, str(picture), QUESTION, CHOSEN, compare=True)
    traces = {
        snapshot.index: snapshot.trace for snapshot in watch_live(embedded.watch_many(requests))
    }
    assert traces[0].answer == "3" and traces[0].calls
    assert traces[1].perception == "none" and not traces[1].calls
