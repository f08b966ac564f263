"""The engine under whatever comes: mixes of requests, cancellations, failures, little room."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bases import EACH_BACKBONE
from drivers import SomewhereDetector
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import tiny_model
from two_pass import TwoPassEngine

import vpt
from vpt.errors import BudgetError, RunError, VPTError
from vpt.images import load_image
from vpt.inference.engine import Engine
from vpt.inference.events import ErrorEvent, StopEvent
from vpt.inference.features import Encoders
from vpt.inference.scheduler import Scheduler
from vpt.model.processing import FeaturePiece, ImagePiece
from vpt.protocol.tokens import BRANCH_TOKENS, PERCEPTION_MODES

SLOW_OK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def noise(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return load_image(Image.fromarray(values.numpy()).resize((width * 4, height * 4)))


IMAGES = [noise(14, 14, 0), noise(14, 14, 1), noise(20, 9, 2)]
BROKEN = noise(13, 13, 9)


class SomeFail(Encoders):
    """Encoders whose branches, the tower excepted, fail on one image."""

    def _encode_all(self, branch, images):
        if branch != "reencode" and any(image.digest == BROKEN.digest for image in images):
            raise ZeroDivisionError("this branch is broken")
        return super()._encode_all(branch, images)


@pytest.fixture(scope="module", params=EACH_BACKBONE)
def runtime(request):
    model = tiny_model(num_layers=3, backbone=request.param, grounding=True)
    return vpt.Runtime(*model, detector=SomewhereDetector(), max_num_seqs=3)


def engine_of(runtime, num_slots=3, **options):
    return Engine(runtime.model, SomeFail(runtime.model, runtime.processor), num_slots, **options)


def assert_is_idle(engine):
    """All slots are free and clean, and the kept prefixes are counted right."""
    assert engine.num_free_slots == engine.num_slots
    assert not any(buffer.any() for buffer in (*engine.cache.keys, *engine.cache.values))
    kept = [one.cache.nbytes for one in engine.prefixes._kept.values()]
    assert engine.prefixes.num_bytes == sum(kept) <= engine.prefixes.max_bytes


# One engine, rounds by hand ---------------------------------------------------------------------


def stream_of_calls(runtime, order, image):
    """Pieces: text, an image, then calls in this order, each answered."""
    text = runtime.processor.encode_text
    pieces = [text("Look here: "), ImagePiece(image)]
    for branch in order:
        pieces += [text(f" then {BRANCH_TOKENS[branch].call} "), FeaturePiece(branch, image)]
    return [*pieces, text(" the end.")]


orders = st.lists(st.sampled_from(["dino", "reencode", "sam"]), min_size=1, max_size=3)


@SLOW_OK
@given(given_orders=st.lists(orders, min_size=1, max_size=3), tokens_per_pass=st.integers(1, 64))
def test_chunks_of_any_size_equal_two_passes(runtime, given_orders, tokens_per_pass):
    engine = engine_of(runtime, tokens_per_pass=tokens_per_pass)
    oracle = TwoPassEngine(runtime.model, runtime.processor)
    all_pieces = [stream_of_calls(runtime, o, IMAGES[i]) for i, o in enumerate(given_orders)]
    encoded = engine.encode(all_pieces)
    streams = [engine.open() for _ in all_pieces]
    prefills = [engine.begin(*one) for one in zip(streams, all_pieces, encoded, strict=True)]
    while waiting := [one for one in prefills if one.extension is None]:
        before = engine.num_tokens_run
        engine.prefill(waiting)
        assert 0 < engine.num_tokens_run - before <= tokens_per_pass
    for stream, prefill, pieces in zip(streams, prefills, all_pieces, strict=True):
        expected = oracle.extend(oracle.open(), pieces)
        assert prefill.extension.token_ids == expected.token_ids
        torch.testing.assert_close(prefill.extension.logits, expected.logits, atol=1e-4, rtol=0)
        engine.close(stream)
    assert_is_idle(engine)


requests = st.fixed_dictionaries(
    {
        "images": st.sampled_from([[], [IMAGES[0]], [IMAGES[1]], [IMAGES[2], IMAGES[0]], [BROKEN]]),
        "question": st.sampled_from(["What?", "Which of these is it, and where?", "x" * 90]),
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([0.0, 1.5]),
        "max_calls": st.integers(0, 3),
        "max_new_tokens": st.integers(1, 40),
        "constrain": st.booleans(),
    }
)
modes = st.sampled_from(PERCEPTION_MODES)


def outcome(event):
    """What a request ended with: its tokens and why, or its error."""
    if isinstance(event, StopEvent):
        return [token.id for token in event.trace.tokens], event.trace.stop_reason
    return type(event.error), str(event.error)


def run_rounds(runtime, engine, asked, cancelled_in, added_in):
    """Outcomes by index; requests are added and cancelled before given rounds."""
    scheduler, ended = Scheduler(engine, engine.num_slots), {}
    for number in range(10_000):
        for index, request in enumerate(asked):
            if added_in[index] == number:
                conversation = runtime.converse(request)
                scheduler.add(index, conversation.run(), request.sampling, keep=index % 2 == 0)
        for index in [index for index, when in cancelled_in.items() if when == number]:
            scheduler.cancel(index)
        for index, event in scheduler.round():
            assert index not in ended, "an event after the last"
            if isinstance(event, StopEvent | ErrorEvent):
                ended[index] = outcome(event)
        if not scheduler.has_work and number > max(added_in):
            return ended
    raise AssertionError("the rounds do not end")


@settings(SLOW_OK, max_examples=15)
@given(data=st.data())
def test_any_mix_equals_each_alone(runtime, data):
    asked = []
    for one in data.draw(st.lists(requests, min_size=2, max_size=6)):
        mode = data.draw(modes) if one["images"] else "auto"
        asked.append(runtime.request(**one, perception=mode))
    indices = st.integers(0, len(asked) - 1)
    cancelled_in = data.draw(st.dictionaries(indices, st.integers(0, 60), max_size=3))
    size = len(asked)
    added_in = data.draw(st.lists(st.integers(0, 20), min_size=size, max_size=size))
    capacity = data.draw(st.integers(120, 300))
    engine = engine_of(
        runtime,
        num_slots=data.draw(st.integers(1, 4)),
        capacity=capacity,
        tokens_per_pass=data.draw(st.integers(1, 64)),
        prefix_bytes=data.draw(st.sampled_from([0, 50_000, 2**24])),
    )
    ended = run_rounds(runtime, engine, asked, cancelled_in, added_in)
    for index, request in enumerate(asked):
        if index in ended:
            plain = engine_of(runtime, 1, capacity=capacity, prefix_bytes=0)
            assert {0: ended[index]} == run_rounds(runtime, plain, [request], {}, [0])
        else:
            assert index in cancelled_in
    assert_is_idle(engine)


@pytest.mark.parametrize("prefix_bytes", [0, 2**24])
def test_equal_prompts_are_read_together_or_once(runtime, prefix_bytes):
    engine = engine_of(runtime, prefix_bytes=prefix_bytes)
    pieces = stream_of_calls(runtime, [], IMAGES[0])
    prefills = [
        engine.begin(engine.open(), pieces, encoded) for encoded in engine.encode([pieces] * 3)
    ]
    engine.prefill(prefills)
    done = [one for one in prefills if one.extension is not None]
    assert len(done) == (1 if prefix_bytes else 3)


@pytest.mark.parametrize("where", ["lm_head", "mlp"])
def test_a_pass_that_fails_for_all_is_tried_for_each(runtime, where):
    asked = [runtime.request([], f"Question {n}?", max_new_tokens=5) for n in range(3)]
    alone = [run_rounds(runtime, engine_of(runtime), [one], {}, [0])[0] for one in asked]
    engine, fails_in = engine_of(runtime), iter([False, True, True])
    module = runtime.model.lm_head
    if where == "mlp":
        module = runtime.model.model.language_model.layers[1].mlp

    def fail(module, args):
        if next(fails_in, False):
            raise RuntimeError("out of memory")

    handle = module.register_forward_pre_hook(fail)
    try:
        ended = run_rounds(runtime, engine, asked, {}, [0, 0, 0])
    finally:
        handle.remove()
    words = "the run failed with RuntimeError: out of memory"
    assert [ended[n] for n in range(3)].count((RunError, words)) == 1
    assert all(ended[n] in (alone[n], (RunError, words)) for n in range(3))
    assert_is_idle(engine)


def test_a_prefix_that_cannot_be_kept_costs_no_answer(runtime, monkeypatch, caplog):
    engine = engine_of(runtime)
    monkeypatch.setattr(engine.cache, "copy_out", lambda *args: 1 / 0)
    request = runtime.request([], "What?", max_new_tokens=5)
    ended = run_rounds(runtime, engine, [request], {}, [0])
    assert ended[0][1] in ("stop", "length")
    assert "a prefix could not be kept: ZeroDivisionError" in caplog.text
    assert_is_idle(engine)


def test_a_slot_taken_elsewhere_refuses_one_request_at_a_time(runtime):
    engine = engine_of(runtime, num_slots=1)
    stream = engine.open()
    request = runtime.request([], "What?", max_new_tokens=5)
    ended = run_rounds(runtime, engine, [request], {}, [0])
    assert ended[0][0] is BudgetError
    engine.close(stream)
    assert run_rounds(runtime, engine, [request], {}, [0])[0][1] in ("stop", "length")


# The runtime, from many threads -----------------------------------------------------------------


def ask_in_one_way(runtime, number):
    """Use the runtime in one of four ways; answers as lists of ids, errors as their type."""
    image, options = IMAGES[number % 3], {"max_new_tokens": 12, "perception": "crop"}
    if number % 4 == 0:
        return [t.id for t in runtime.ask(image, f"{number}?", **options).trace.tokens]
    if number % 4 == 1:  # closed midway
        events = runtime.stream(image, f"{number}?", **options)
        read = [next(events).token.id for _ in range(3)]
        events.close()
        return read
    asked = [{"images": image, "question": f"{number}?", **options}, {"images": "none.png"}]
    if number % 4 == 2:
        answers = runtime.ask_many([*asked, asked[0]], on_error="return")
        return [a.text if isinstance(a, vpt.Answer) else type(a) for a in answers]
    try:
        return runtime.ask_many(asked)
    except VPTError as exc:
        return type(exc)


def test_threads_use_one_runtime_in_every_way_at_once(runtime):
    expected = [ask_in_one_way(runtime, number) for number in range(16)]
    num_threads = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: ask_in_one_way(runtime, n), range(16))) == expected
    assert threading.active_count() == num_threads
    assert (runtime.worker.num_running, runtime.worker.num_waiting) == (0, 0)
    assert_is_idle(runtime.engine)


def test_one_request_asked_by_many_threads_answers_each(runtime):
    request = runtime.request(IMAGES[0], "What?", max_new_tokens=8, perception="crop")
    expected = runtime.ask_many([request])[0].text
    for _ in range(20):
        request = runtime.request(IMAGES[0], "What?", max_new_tokens=8, perception="crop")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda one: runtime.ask_many([one])[0].text, [request] * 4))
        assert answers == [expected] * 4
