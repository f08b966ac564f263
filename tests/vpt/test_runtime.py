"""The front door: what may be asked, in which forms, and what comes back."""

import numpy as np
import pytest
import torch
from golden_data import GOLDENS
from PIL import Image

import vpt
from vpt.boxes import GridBox
from vpt.building import tiny_model
from vpt.controller import CallEvent, ResultEvent, StopEvent, TokenEvent
from vpt.errors import CheckpointError, ImageError, PromptError
from vpt.trace import Trace

PHOTO = GOLDENS / "images" / "a_scene.png"


@pytest.fixture(scope="module")
def runtime():
    return vpt.Runtime(*tiny_model(), name="tiny")


def test_the_embedded_model_is_there_without_a_path(caplog):
    runtime = vpt.load(device="cpu")
    assert not caplog.records
    answer = runtime.ask(PHOTO, "How many are there?", max_new_tokens=16)
    assert answer.stop_reason == "stop" and answer.trace.model["name"] == "embedded"


@pytest.mark.parametrize("variant", ["clip", "dino", "sam"])
def test_a_released_checkpoint_answers_and_looks_again(variant):
    runtime = vpt.load(str(GOLDENS / "checkpoints" / variant), device="cpu")
    answer = runtime.ask(PHOTO, "What is this?", perception=variant, max_new_tokens=6, max_calls=1)
    (call,) = answer.trace.calls
    assert call.outcome == "executed"
    assert len(call.scores) == call.num_tokens == call.grid_hw[0] * call.grid_hw[1]
    assert answer.num_calls == 1
    assert runtime.ask(PHOTO, "And?", perception="region", max_new_tokens=20).trace.calls


def test_images_come_in_many_forms(runtime):
    pixels = Image.open(PHOTO).convert("RGB")
    forms = [PHOTO, str(PHOTO), PHOTO.read_bytes(), pixels, np.asarray(pixels), [PHOTO]]
    answers = {runtime.ask(form, "What?", max_new_tokens=8).text for form in forms}
    assert len(answers) == 1


def test_several_images_and_none(runtime):
    two = runtime.ask([PHOTO, GOLDENS / "images" / "a_tall.png"], "Same?", max_new_tokens=4)
    assert [image.size_wh for image in two.trace.images] == [(112, 84), (90, 150)]
    assert all(image.num_tokens > 0 for image in two.trace.images)
    none = runtime.ask([], "Hello?", max_new_tokens=4)
    assert none.trace.images == []


def test_events_come_in_order_and_the_last_holds_the_trace(runtime):
    events = list(runtime.stream(PHOTO, "What?", perception="dino", max_new_tokens=6))
    kinds = [type(event) for event in events]
    assert kinds[:3] == [TokenEvent, CallEvent, ResultEvent]
    assert kinds[-1] is StopEvent
    assert kinds.count(TokenEvent) == len(events[-1].trace.tokens)


def test_a_cancelled_stream_stops_computing(runtime):
    events = runtime.stream(PHOTO, "What?", max_new_tokens=500)
    next(events)
    events.close()
    before = runtime.engine().num_tokens_run
    runtime.ask(PHOTO, "What?", max_new_tokens=2)
    assert runtime.engine().num_tokens_run - before < 200


def test_two_interleaved_streams_do_not_disturb_each_other(runtime):
    alone = [runtime.ask(PHOTO, q, max_new_tokens=8).text for q in ("One?", "Two?")]
    first = runtime.stream(PHOTO, "One?", max_new_tokens=8)
    next(first)
    second = runtime.stream(PHOTO, "Two?", max_new_tokens=8)
    pairs = list(zip(first, second, strict=False))
    assert pairs[-1][0].trace.answer == alone[0]
    assert list(second)[-1].trace.answer == alone[1]


def test_a_region_can_be_named_for_the_model(runtime):
    region = GridBox(2, 1, 4, 3)
    answer = runtime.ask(PHOTO, "What?", region=region, max_new_tokens=12, max_calls=1)
    (call,) = answer.trace.calls
    assert (call.branch, call.region, call.outcome) == ("crop", (2, 1, 4, 3), "executed")
    assert answer.trace.settings["region"] == (2, 1, 4, 3)
    free = runtime.ask(PHOTO, "What?", region=region, max_new_tokens=12, constrain=False)
    assert free.trace.calls[0].region == (2, 1, 4, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"region": GridBox(0, 0, 8, 0)}, "does not fit a 8x8 grid"),
        ({"region": GridBox(0, 0, 1, 1), "perception": "none"}, "got perception='none'"),
        ({"region": GridBox(0, 0, 1, 1), "max_calls": 0}, "max_calls=0"),
    ],
)
def test_a_region_that_cannot_be_named_is_refused(runtime, options, words):
    with pytest.raises(PromptError, match=words):
        runtime.ask(PHOTO, "What?", **options)


@pytest.mark.parametrize("perception", ["region", "dino"])
def test_a_look_can_be_replaced_by_a_blank_one(runtime, perception):
    options = {"perception": perception, "max_new_tokens": 12, "max_calls": 1}
    if perception == "region":
        options["region"] = GridBox(0, 0, 1, 1)
    real = runtime.ask(PHOTO, "What?", **options).trace
    blank = runtime.ask(PHOTO, "What?", replace_looks="blank", **options).trace
    assert blank.calls[0].text == real.calls[0].text
    assert blank.calls[0].num_tokens == real.calls[0].num_tokens
    assert blank.settings["replace_looks"] == "blank"
    if perception == "region":
        assert blank.images[1].size_wh == real.images[1].size_wh
        assert blank.images[1].digest != real.images[1].digest
    else:
        assert blank.calls[0].scores != real.calls[0].scores


def test_a_crop_can_be_replaced_by_one_from_elsewhere(runtime):
    def cut(seed):
        options = {"region": GridBox(0, 0, 1, 1), "max_calls": 1, "seed": seed}
        trace = runtime.ask(PHOTO, "What?", replace_looks="random", max_new_tokens=9, **options)
        return trace.trace.calls[0].box_xyxy_px

    boxes = [cut(seed) for seed in range(6)]
    assert cut(0) == boxes[0]
    assert len(set(boxes)) > 1
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes} == {(42, 31)}
    assert all(min(x0, y0) >= 0 and x1 <= 112 and y1 <= 84 for x0, y0, x1, y1 in boxes)


def test_an_unknown_replacement_is_refused(runtime):
    with pytest.raises(PromptError, match=r"replace_looks must be one of .*, not 'noise'"):
        runtime.ask(PHOTO, "What?", replace_looks="noise")


def test_an_intervention_changes_what_a_control_state_steers(runtime):
    def scores():
        ask = {"perception": "dino", "max_new_tokens": 4, "max_calls": 1}
        return runtime.ask(PHOTO, "What?", **ask).trace.calls[0].scores

    before = scores()
    runtime.engine().intervene = torch.zeros_like
    try:
        assert scores() != before
    finally:
        runtime.engine().intervene = None
    assert scores() == before


def test_many_requests_keep_their_order(runtime):
    requests = [
        {"images": PHOTO, "question": f"Number {n}?", "max_new_tokens": 3 + 5 * (n % 3)}
        for n in range(7)
    ]
    answers = runtime.ask_many(requests, batch_size=3)
    assert [a.trace.question for a in answers] == [r["question"] for r in requests]
    assert runtime.ask_many([], batch_size=3) == []
    assert len(runtime.ask_many(iter(requests[:2]), batch_size=5)) == 2


def test_seeds_decide_what_is_sampled(runtime):
    options = {"temperature": 1.5, "max_new_tokens": 12}
    texts = [runtime.ask(PHOTO, "What?", seed=seed, **options).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_token": 3}, "unknown option 'max_token'; available: constrain, look_at"),
        ({"temperature": -1}, "expected temperature >= 0"),
        ({"perception": "dinosaur"}, "unknown perception mode"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(runtime, options, words):
    with pytest.raises(PromptError, match=words):
        runtime.ask(PHOTO, "What?", **options)


def test_bad_images_and_batches_are_refused(runtime, tmp_path):
    with pytest.raises(ImageError):
        runtime.stream(tmp_path / "none.png", "What?")
    with pytest.raises(PromptError, match="batch_size must be at least 1"):
        runtime.ask_many([], batch_size=0)
    with pytest.raises(CheckpointError, match="there is no model folder"):
        vpt.load("./nowhere")
    good = {"images": PHOTO, "question": "What?", "max_new_tokens": 2}
    with pytest.raises(ImageError, match=r"request 1: .*none\.png"):
        runtime.ask_many([good, {**good, "images": tmp_path / "none.png"}], batch_size=2)


def test_a_trace_survives_saving(runtime, tmp_path):
    request = runtime.request(PHOTO, "What?", perception="sam", max_new_tokens=6)
    trace = runtime.ask_many([request], 1)[0].trace
    trace.keep_thumbnails(list(request.images))
    trace.save(tmp_path / "trace.json")
    again = Trace.load(tmp_path / "trace.json")
    assert again == trace
    assert again.images[0].thumbnail.startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read the trace"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a trace of version 1, got None"),
        ('{"version": 1, "question": "x"}', "not a trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, content, words):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(PromptError, match=words):
        Trace.load(tmp_path / "t.json")


def test_times_and_sizes_are_recorded(runtime):
    trace = runtime.ask(PHOTO, "What?", perception="clip", max_new_tokens=8).trace
    assert 0 < trace.timings.prefill <= trace.timings.first_token <= trace.timings.total
    assert sum(token.ms for token in trace.tokens) <= trace.timings.total
    assert trace.counts.generated_tokens == len(trace.tokens) == 8
    assert trace.calls[0].run_ms > 0
