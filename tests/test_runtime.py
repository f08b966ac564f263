"""The front door: what may be asked, in which forms, and what comes back."""

import copy
import dataclasses
import inspect
import logging
import pickle
import pydoc
import re

import numpy as np
import pytest
import torch
from golden_data import GOLDENS
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.boxes import GridBox
from vpt.branches.encoder import HUB_ARGUMENTS
from vpt.errors import (
    CheckpointError,
    ImageError,
    NonFiniteError,
    PromptError,
    RunError,
    is_out_of_memory,
)
from vpt.inference.events import CallEvent, ErrorEvent, ResultEvent, StopEvent, TokenEvent
from vpt.inference.request import Sampling
from vpt.model.config import load_config
from vpt.model.modeling import VPTForConditionalGeneration, load_model
from vpt.trace.records import Trace

PHOTO = GOLDENS / "images" / "a_scene.png"


@pytest.fixture(scope="module")
def runtime():
    return vpt.Runtime(*tiny_model(), name="tiny")


def test_the_embedded_model_is_there_without_a_path(caplog):
    runtime = vpt.load(device="cpu")
    # LLaMA-Factory, in other tests of this process, lets transformers log at level INFO.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    answer = runtime.ask(PHOTO, "How many are there?", max_new_tokens=16)
    assert answer.stop_reason == "stop" and answer.trace.model["name"] == "embedded"


def test_a_path_is_as_good_as_a_name(random_model, tmp_path):
    runtime = vpt.load(random_model, device="cpu")
    assert runtime.name == str(random_model)
    trace = runtime.ask(PHOTO, "What?", max_new_tokens=3).trace
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json").model["name"] == str(random_model)
    assert vpt.Runtime(runtime.model, runtime.processor, name=random_model).name == runtime.name
    for load in (vpt.load, load_model, load_config, VPTForConditionalGeneration.from_pretrained):
        with pytest.raises(CheckpointError, match="there is no model folder"):
            load(tmp_path / "none")


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
    before = runtime.engine.num_tokens_run
    runtime.ask(PHOTO, "What?", max_new_tokens=2)
    assert runtime.engine.num_tokens_run - before < 200


def test_two_interleaved_streams_do_not_disturb_each_other(runtime):
    alone = [runtime.ask(PHOTO, q, max_new_tokens=8).text for q in ("One?", "Two?")]
    first = runtime.stream(PHOTO, "One?", max_new_tokens=8)
    next(first)
    second = runtime.stream(PHOTO, "Two?", max_new_tokens=8)
    pairs = list(zip(first, second, strict=False))
    assert pairs[-1][0].trace.answer == alone[0]
    assert list(second)[-1].trace.answer == alone[1]


@pytest.mark.parametrize("num_others", [1, 3])
def test_a_run_keeps_its_slots_while_others_are_asked(num_others):
    runtime = vpt.Runtime(*tiny_model())
    good = [
        {"images": PHOTO, "question": f"{n}?", "max_new_tokens": 4, "perception": "none"}
        for n in range(3)
    ]
    alone = [runtime.ask(**one).text for one in good]
    events = runtime.stream_many([{}, *good], batch_size=3)
    assert isinstance(next(events)[1], ErrorEvent)  # no stream has begun
    others = runtime.stream_many(good[:num_others], batch_size=num_others)
    next(others)
    ends = {i: event.trace.answer for i, event in events if isinstance(event, StopEvent)}
    assert ends == dict(enumerate(alone, 1))
    ends = {i: event.trace.answer for i, event in others if isinstance(event, StopEvent)}
    assert ends == dict(enumerate(alone[:num_others]))


def test_a_region_can_be_named_for_the_model(runtime):
    region = GridBox(2, 1, 4, 3)
    answer = runtime.ask(PHOTO, "What?", region=region, max_new_tokens=12, max_calls=1)
    (call,) = answer.trace.calls
    assert (call.branch, call.region, call.outcome) == ("crop", (2, 1, 4, 3), "executed")
    assert answer.trace.settings["region"] == [2, 1, 4, 3]
    counts, passes = answer.trace.counts, runtime.engine.num_forwards
    plain = runtime.ask(PHOTO, "What?", max_new_tokens=1)
    assert counts.prompt_tokens == plain.trace.counts.prompt_tokens
    again = runtime.ask(PHOTO, "What?", region=region, max_new_tokens=12, max_calls=1)
    assert again.text == answer.text
    # Prompt and call are read at once, then the crop, then each token of the answer but the last.
    assert runtime.engine.num_forwards - passes == 1 + 2 + counts.generated_tokens - 7 - 1
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
    runtime.engine.intervene = torch.zeros_like
    try:
        assert scores() != before
    finally:
        runtime.engine.intervene = None
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


def test_a_checked_request_is_not_prepared_again(runtime, monkeypatch):
    made, whole = [], runtime.processor.prompt
    monkeypatch.setattr(
        runtime.processor, "prompt", lambda *a, **k: (made.append(a), whole(*a, **k))[1]
    )
    request = runtime.request(PHOTO, "What?", max_new_tokens=3)
    copies = [copy.copy(request), pickle.loads(pickle.dumps(request))]
    answers = [runtime.ask_many([request])[0] for _ in range(2)]
    assert len(made) == 2  # when it was checked, and when it was asked again
    other = vpt.Runtime(runtime.model, runtime.processor, name="other")
    checked_here = runtime.request(PHOTO, "What?", max_new_tokens=3)
    for asked, model in [*((one, runtime) for one in copies), (checked_here, other)]:
        answers += model.ask_many([asked])
    tokens = [[token.id for token in one.trace.tokens] for one in answers]
    assert tokens == tokens[:1] * 5
    assert len({id(one.trace) for one in answers}) == 5
    assert answers[-1].trace.model["name"] == "other"


def test_a_run_is_watched_in_its_own_trace(runtime):
    requests = [{"images": PHOTO, "question": "What?", "max_new_tokens": 4}, {"images": PHOTO}]
    snapshots = list(runtime.watch_many(requests))
    runs = [one for one in snapshots if one.index == 0]
    assert all(one.trace is runs[-1].event.trace for one in runs)
    (refused,) = [one for one in snapshots if one.index == 1]
    assert isinstance(refused.event, ErrorEvent) and refused.trace is None


def test_seeds_decide_what_is_sampled(runtime):
    options = {"temperature": 1.5, "max_new_tokens": 12}
    texts = [runtime.ask(PHOTO, "What?", seed=seed, **options).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("method", ["request", "requests", "ask", "stream"])
def test_every_option_is_in_the_signature_with_type_and_default(runtime, method):
    fields = [*dataclasses.fields(vpt.Request), *dataclasses.fields(Sampling)]
    declared = {one.name: (one.type, one.default) for one in fields if one.name != "sampling"}
    parameters = inspect.signature(getattr(runtime, method)).parameters
    assert "images" in declared and parameters.keys() == declared.keys() | {"messages"}
    for name, (kind, default) in declared.items():
        if name not in ("images", "question"):  # not needed with messages
            assert (parameters[name].annotation, parameters[name].default) == (kind, default), name


def test_help_and_load_show_every_option(runtime):
    shown = pydoc.render_doc(runtime.ask, renderer=pydoc.plaintext)
    assert "max_calls: 'int' = 4" in shown and "-> 'Answer'" in shown
    assert "max_calls: perception calls at most" in shown
    assert set(HUB_ARGUMENTS) < inspect.signature(vpt.load).parameters.keys()
    with pytest.raises(PromptError, match=r"unknown option 'revison'; available: .*, revision, "):
        vpt.load(revison="main")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_token": 3}, "unknown option 'max_token'; available: constrain, history, look_at"),
        ({"temperature": -1}, "temperature must be a finite number of at least 0, not -1"),
        ({"perception": "dinosaur"}, "perception must be one of"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(runtime, options, words):
    with pytest.raises(PromptError, match=words):
        runtime.ask(PHOTO, "What?", **options)


def test_bad_images_and_batches_are_refused(runtime, tmp_path):
    with pytest.raises(ImageError):
        runtime.stream(tmp_path / "none.png", "What?")
    with pytest.raises(PromptError, match="batch_size must be a whole number of at least 1, not 0"):
        runtime.ask_many([], batch_size=0)
    with pytest.raises(CheckpointError, match="there is no model folder"):
        vpt.load("./nowhere")
    good = {"images": PHOTO, "question": "What?", "max_new_tokens": 2}
    with pytest.raises(ImageError, match=r"request 1: .*none\.png"):
        runtime.ask_many([good, {**good, "images": tmp_path / "none.png"}], batch_size=2)


# One bad request among good ones -----------------------------------------------------------------


def good_requests(num=8):
    options = {"images": PHOTO, "max_new_tokens": 6, "perception": "dino", "max_calls": 1}
    return [{"question": f"Number {n}?", **options} for n in range(num)]


BAD_REQUESTS = [
    ({"images": "missing.png"}, ImageError, "'missing.png' does not exist"),
    ({"images": None}, ImageError, "expected a path, URL, bytes"),
    ({"question": "a <|im_end|> b"}, PromptError, r"control token <\|im_end\|>"),
    ({"question": 3}, PromptError, "question must be text"),
    ({"question": "  "}, PromptError, "question is empty"),
    ({"system": "<|im_start|>"}, PromptError, "system prompt holds the control token"),
    ({"system": b"x"}, PromptError, "system must be text"),
    ({"perception": "foo"}, PromptError, "perception must be one of .*not 'foo'"),
    ({"perception": ["dino"]}, PromptError, "perception must be one of"),
    ({"region": GridBox(0, 0, 9, 9), "perception": "region"}, PromptError, "8x8 grid"),
    ({"region": (0, 0, 1, 1), "perception": "region"}, PromptError, "region must be GridBox"),
    ({"region": GridBox(0.5, 0, 1, 1), "perception": "region"}, PromptError, "region must be a wh"),
    ({"seed": 2**64}, PromptError, "seed must be a whole number"),
    ({"seed": -1}, PromptError, "seed must be a whole number"),
    ({"max_calls": "8"}, PromptError, "max_calls must be a whole number of at least 0, not '8'"),
    ({"max_calls": True}, PromptError, "max_calls must be a whole number of at least 0, not True"),
    ({"max_new_tokens": None}, PromptError, "max_new_tokens must be a whole number"),
    ({"max_new_tokens": (3,)}, PromptError, "max_new_tokens must be a whole number"),
    ({"temperature": "hot"}, PromptError, "temperature must be a finite number"),
    ({"top_p": float("nan")}, PromptError, "top_p must be a finite number"),
    ({"top_k": 1.5}, PromptError, "top_k must be a whole number"),
    ({"constrain": "no"}, PromptError, "constrain must be True or False, not 'no'"),
    ({"look_at": np.zeros(2)}, PromptError, "look_at must be one of 'first', 'latest'"),
    ({"replace_looks": 1}, PromptError, "replace_looks must be one of"),
    ({"max_token": 3}, PromptError, "unknown option 'max_token'"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), BAD_REQUESTS)
def test_a_bad_request_is_refused_before_anything_runs(runtime, wrong, kind, words):
    before = runtime.engine.num_forwards
    with pytest.raises(kind, match=words):
        runtime.request(**{**good_requests(1)[0], **wrong})
    assert runtime.engine.num_forwards == before


def test_bad_requests_take_no_others_along(runtime):
    good = good_requests()
    alone = [runtime.ask(**one).text for one in good]
    wrong = [{**good[0], **changes} for changes, _, _ in BAD_REQUESTS]
    wrong += ["a question", None, {"question": "What?"}]
    mixed = [one for pair in zip(good, wrong[:8], strict=True) for one in pair] + wrong[8:]
    answers = runtime.ask_many(mixed, batch_size=4, on_error="return")
    assert len(answers) == len(mixed)
    assert [answer.text for answer in answers[:16:2]] == alone
    errors = [*answers[1:16:2], *answers[16:]]
    for error, (_, kind, words) in zip(errors, BAD_REQUESTS, strict=False):
        assert type(error) is kind and re.search(words, str(error))
    assert [str(error) for error in errors[-3:]] == [
        "expected a Request or a dict of its arguments, or images with question=, not str",
        "expected a Request or a dict of its arguments, or images with question=, not NoneType",
        "the request has no 'images'",
    ]
    assert runtime.engine.num_free_slots >= 4


def test_an_error_is_raised_once_all_others_are_answered(runtime):
    good = good_requests(5)
    mixed = [good[0], {**good[1], "images": "missing.png"}, *good[2:4], {**good[4], "seed": -1}]
    words = r"request 1: 'missing.png' does not exist.* \(2 of 5 requests failed"
    with pytest.raises(ImageError, match=words) as caught:
        runtime.ask_many(iter(mixed), batch_size=2)
    texts = [getattr(answer, "text", None) for answer in caught.value.answers]
    alone = [runtime.ask(**good[n]).text for n in (0, 2, 3)]
    assert texts == [alone[0], None, *alone[1:], None]
    assert isinstance(caught.value.answers[4], PromptError)
    with pytest.raises(PromptError, match="on_error must be one of 'raise', 'return', not 'skip'"):
        runtime.ask_many(good, on_error="skip")


def test_an_event_tells_which_request_failed(runtime):
    good = good_requests(3)
    events = list(runtime.stream_many([good[0], {**good[1], "question": ""}, good[2]], 2))
    ends = {i: event for i, event in events if isinstance(event, StopEvent | ErrorEvent)}
    assert isinstance(ends[1], ErrorEvent) and "question is empty" in str(ends[1].error)
    assert [type(ends[n]) for n in (0, 2)] == [StopEvent, StopEvent]


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("where", ["preprocess", "encode", "project", "prompt", "step"])
def test_an_exception_in_the_middle_belongs_to_its_request(monkeypatch, where):
    runtime = vpt.Runtime(*tiny_model(), name="tiny", feature_cache_bytes=0)
    good = good_requests(4)
    alone = [runtime.ask(**one).text for one in good]
    picture = vpt.load_image(Image.new("RGB", (60, 40), "red"))
    mixed = [*good[:2], {**good[0], "question": "Bad?", "images": picture}, *good[2:]]
    break_for_red(monkeypatch, runtime, where, picture)
    answers = runtime.ask_many(mixed, batch_size=5, on_error="return")
    assert [answer.text for answer in answers[:2] + answers[3:]] == alone
    assert type(answers[2]) is RunError
    assert str(answers[2]) == "the run failed with BrokenError: ours"
    assert isinstance(answers[2].__cause__, BrokenError)
    assert runtime.engine.num_free_slots == runtime.engine.num_slots
    with pytest.raises(
        RunError, match="request 2: the run failed with BrokenError: ours"
    ) as caught:
        runtime.ask_many(mixed, batch_size=5)
    assert isinstance(caught.value.__cause__.__cause__, BrokenError)
    if where == "preprocess":
        with pytest.raises(RunError, match=r"^the run failed with BrokenError: ours$"):
            runtime.ask(**mixed[2])
        with pytest.raises(RunError, match=r"^the run failed with BrokenError: ours$"):
            list(runtime.stream(**mixed[2]))


def break_for_red(monkeypatch, runtime, where, picture):
    """Let the runtime raise for one picture, or for the prompt or stream that holds it."""

    def raising(owner, name, is_bad):
        whole = getattr(owner, name)

        def broken(*args, **kwargs):
            if is_bad(*args):
                raise BrokenError("ours")
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)

    engine = runtime.engine
    number = engine.prefixes.number((True, runtime.encoders.key("reencode", picture)))
    if where == "preprocess":
        dino = runtime.model.branches["dino"]
        raising(dino, "preprocess", lambda images: any(i.size == (60, 40) for i in images))
    elif where == "encode":
        raising(runtime.encoders, "_encode_all", lambda _, images: picture in images)
    elif where == "project":
        raising(engine, "project", lambda stream, *_: number in stream.atoms.ids)
    elif where == "prompt":
        raising(runtime.processor, "reply", lambda looks, _: looks[0].image is picture)
    else:
        raising(
            engine, "decode", lambda streams, *_: any(number in one.atoms.ids for one in streams)
        )


def test_memory_that_runs_out_for_one_is_told_as_such(runtime, monkeypatch):
    whole, streams = runtime.engine.project, []

    def project(stream, *args):
        if stream not in streams:
            streams.append(stream)
        if len(streams) > 1 and stream is streams[1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(stream, *args)

    monkeypatch.setattr(runtime.engine, "project", project)
    answers = runtime.ask_many(good_requests(3), batch_size=3, on_error="return")
    (error,) = [answer for answer in answers if isinstance(answer, RunError)]
    assert is_out_of_memory(error)


def test_ctrl_c_is_never_swallowed(runtime):
    def interrupted():
        yield from good_requests(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.ask_many(interrupted(), batch_size=4, on_error="return")
    assert runtime.engine.num_free_slots == runtime.engine.num_slots


# Numbers that are not finite --------------------------------------------------------------------


def spoil(model, processor, letter):
    """Let the embedding of one letter be NaN, the head stay as it is."""
    (token_id,) = processor.encode_text(letter).ids
    with torch.no_grad():
        model.get_input_embeddings().weight[token_id] = float("nan")


def test_a_row_of_nan_fails_what_reads_it_and_nothing_else():
    model, processor = tiny_model()
    good = [
        {"images": PHOTO, "question": "long " * 30, "max_new_tokens": 60},
        *({"images": [], "question": f"{n}?", "max_new_tokens": 30} for n in range(4)),
    ]
    alone = [vpt.Runtime(model, processor).ask(**one).text for one in good]
    spoil(model, processor, "Z")
    runtime = vpt.Runtime(model, processor)
    bad = {"images": PHOTO, "question": "aZ" + "b" * 200, "max_new_tokens": 9}
    sampled = {**bad, "temperature": 1.0}
    mixed = [good[0], bad, *good[1:3], sampled, *good[3:]]
    answers = runtime.ask_many(mixed, batch_size=2, on_error="return")
    assert [type(answers.pop(place)) for place in (4, 1)] == [NonFiniteError] * 2
    assert [answer.text for answer in answers] == alone
    with pytest.raises(NonFiniteError, match=r"not finite .* float32 or bfloat16, and check"):
        runtime.ask(**bad)
    assert all(not buffer.any() for buffer in runtime.engine.cache.values)


@pytest.mark.parametrize("part", ["projector", "branch", "head", "tower"])
def test_nan_in_any_part_fails_the_run(part):
    model, processor = tiny_model()
    parts = {
        "projector": model.projectors["dino"],
        "branch": model.branches["dino"],
        "head": model.lm_head,
        "tower": model.model.visual,
    }
    with torch.no_grad():
        next(parts[part].parameters()).fill_(float("nan"))
    runtime = vpt.Runtime(model, processor)
    options = {"perception": "dino", "max_new_tokens": 6}
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        runtime.ask(PHOTO, "What?", **options)
    if part in ("projector", "branch"):
        assert runtime.ask(PHOTO, "What?", perception="none", max_new_tokens=3).text is not None


def test_half_precision_that_overflows_is_told():
    model, processor = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    good = vpt.Runtime(model, processor).ask(PHOTO, "What?", max_new_tokens=4)
    assert good.trace.counts.generated_tokens == 4
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        vpt.Runtime(model.half(), processor).ask(PHOTO, "What?", max_new_tokens=4)


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
        ('{"version": 1, "question": "x"}', "not a trace: it has no perception"),
        ("[" * 100_000, "cannot read the trace"),
        ("{" + '"a": {' * 500 + "}" * 501, "cannot read the trace|of version 1"),
        ('{"version": 1, "question": %s}' % ("9" * 5000), "cannot read the trace"),
        ("\xff", "cannot read the trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, content, words):
    (tmp_path / "t.json").write_text(content, encoding="latin-1")
    with pytest.raises(PromptError, match=words):
        Trace.load(tmp_path / "t.json")


def test_a_trace_with_a_byte_order_mark_is_read(runtime, tmp_path):
    trace = runtime.ask(PHOTO, "What?", perception="clip", max_new_tokens=6).trace
    (tmp_path / "t.json").write_text(trace.to_json(), encoding="utf-8-sig")
    assert Trace.load(tmp_path / "t.json") == trace


def test_a_vast_file_is_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr("vpt.trace.records.MOST_BYTES", 9)
    (tmp_path / "t.json").write_text(" " * 10)
    with pytest.raises(PromptError, match=r"t.json is larger than 9 bytes; expected a trace"):
        Trace.load(tmp_path / "t.json")


def test_times_and_sizes_are_recorded(runtime):
    trace = runtime.ask(PHOTO, "What?", perception="clip", max_new_tokens=8).trace
    assert 0 < trace.timings.prefill <= trace.timings.first_token <= trace.timings.total
    assert sum(token.ms for token in trace.tokens) <= trace.timings.total
    assert trace.counts.generated_tokens == len(trace.tokens) == 8
    assert trace.calls[0].run_ms > 0
