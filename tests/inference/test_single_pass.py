"""One stream over one cache equals the released protocol, which runs everything twice."""

import golden_data as golden
import pytest
import torch
from bases import EACH_BACKBONE
from drivers import SomewhereDetector
from driving import drive
from golden_data import GOLDENS, VARIANTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import tiny_model
from two_pass import TwoPassEngine

from vpt.errors import BudgetError, PositionError
from vpt.images import load_image
from vpt.inference.engine import Engine
from vpt.inference.events import StopEvent
from vpt.inference.features import Encoders, FeatureCache
from vpt.model.modeling import load_model
from vpt.model.processing import FeaturePiece, ImagePiece, TokenPiece, VPTProcessor
from vpt.protocol.tokens import BRANCH_TOKENS, PERCEPTION_MODES, TURN_END
from vpt.runtime import Runtime

SLOW_OK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module", params=EACH_BACKBONE)
def runtime(request):
    model = tiny_model(num_layers=3, backbone=request.param, grounding=True)
    return Runtime(*model, detector=SomewhereDetector())


def noise(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return load_image(Image.fromarray(values.numpy()).resize((width * 4, height * 4)))


def run(runtime, engine, requests, batch_size=1):
    conversations = [(runtime.converse(request).run(), request.sampling) for request in requests]
    ended = {
        index: event.trace
        for index, event in drive(engine, conversations, batch_size)
        if isinstance(event, StopEvent)
    }
    return [ended[index] for index in sorted(ended)]


def token_ids(trace):
    return [token.id for token in trace.tokens]


requests = st.fixed_dictionaries(
    {
        "question": st.text(
            st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=30
        ).filter(str.strip),
        "perception": st.sampled_from(PERCEPTION_MODES),
        "seed": st.integers(0, 10**6),
        "temperature": st.sampled_from([0.0, 1.5]),
        "max_calls": st.integers(0, 4),
        "max_new_tokens": st.integers(1, 24),
        "constrain": st.booleans(),
        "look_at": st.sampled_from(["first", "latest"]),
    }
)
sizes = st.lists(st.tuples(st.integers(3, 40), st.integers(3, 40)), min_size=1, max_size=2)


@SLOW_OK
@given(options=requests, sizes=sizes)
def test_single_pass_equals_two_pass(runtime, options, sizes):
    images = [noise(*size, seed=index) for index, size in enumerate(sizes)]
    request = runtime.request(images, **options)
    (ours,) = run(runtime, runtime.engine, [request])
    (theirs,) = run(runtime, TwoPassEngine(runtime.model, runtime.processor), [request])
    assert token_ids(ours) == token_ids(theirs)
    assert [c.text for c in ours.calls] == [c.text for c in theirs.calls]
    assert ours.stop_reason == theirs.stop_reason
    for call, other in zip(ours.calls, theirs.calls, strict=True):
        if call.scores is not None:
            assert call.scores == pytest.approx(other.scores, abs=1e-3)
    assert ours.counts.llm_tokens <= theirs.counts.llm_tokens


def pieces_of(runtime, *parts):
    """Pieces of a stream written by hand: text, or images, or (branch, image)."""
    made = []
    for part in parts:
        if isinstance(part, str):
            made.append(runtime.processor.encode_text(part))
        elif isinstance(part, tuple):
            made.append(FeaturePiece(*part))
        else:
            made.append(ImagePiece(part))
    return made


def several_calls(runtime):
    """A stream with an image and four calls, two of them of one branch."""
    image, parts = noise(20, 15, 0), ["Look: "]
    parts += [image, " go."]
    for branch in ("dino", "reencode", "dino", "sam"):
        parts += [BRANCH_TOKENS[branch].call, (branch, image), " then "]
    return pieces_of(runtime, *parts, noise(9, 30, 1), " end")


def test_several_calls_in_one_prompt_equal_one_pass_per_call(runtime):
    pieces = several_calls(runtime)
    engine, oracle = runtime.engine, TwoPassEngine(runtime.model, runtime.processor)
    ours, theirs = engine.open(), oracle.open()
    got, expected = engine.extend(ours, pieces), oracle.extend(theirs, pieces)
    assert got.token_ids == expected.token_ids
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.hidden, theirs.hidden, atol=5e-5, rtol=0)
    engine.close(ours)


@pytest.mark.parametrize("cut", range(1, 12, 3))
def test_a_stream_extended_piece_by_piece_equals_the_whole(runtime, cut):
    pieces = several_calls(runtime)
    engine = runtime.engine
    whole, parts = engine.open(), engine.open()
    expected = engine.extend(whole, pieces)
    engine.extend(parts, pieces[:cut])
    got = engine.extend(parts, pieces[cut:])
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=0)
    assert (parts.length, parts.position) == (whole.length, whole.position)
    engine.close(whole)
    engine.close(parts)


def test_steps_over_the_cache_equal_the_forward_without_one(runtime):
    image = noise(12, 12, 3)
    pieces = pieces_of(runtime, "a ", image, " b", BRANCH_TOKENS["sam"].call, ("sam", image))
    tail = runtime.processor.encode_text("what comes then").ids
    engine = runtime.engine
    stream = engine.open()
    first = engine.extend(stream, pieces)
    logits = [first.logits]
    logits += [engine.step([stream], [token_id])[0] for token_id in tail]
    engine.close(stream)
    pixel_values, grid = runtime.processor.preprocess_images([image])
    with torch.no_grad():
        expected = runtime.model(
            input_ids=torch.tensor([[*first.token_ids, *tail]]),
            pixel_values=pixel_values,
            image_grid_thw=grid,
            seg_images=runtime.model.branches["sam"].preprocess([image.pixels])["pixel_values"],
        ).logits[0, len(first.token_ids) - 1 :]
    torch.testing.assert_close(torch.stack(logits), expected, atol=1e-4, rtol=0)


@SLOW_OK
@given(options=st.lists(requests, min_size=2, max_size=7), batch_size=st.integers(2, 5))
def test_many_streams_equal_one_by_one(runtime, options, batch_size):
    asked = [
        runtime.request([noise(10 + index, 20 - index, index)], **entry)
        for index, entry in enumerate(options)
    ]
    together = run(runtime, runtime.engine, asked, batch_size)
    alone = [run(runtime, runtime.engine, [request])[0] for request in asked]
    assert [token_ids(trace) for trace in together] == [token_ids(trace) for trace in alone]
    assert [len(trace.calls) for trace in together] == [len(trace.calls) for trace in alone]


def test_a_call_costs_what_it_appends(runtime):
    image = noise(16, 16, 0)
    request = runtime.request([image], "What?", perception="region", max_new_tokens=60)
    engine = Engine(runtime.model, Encoders(runtime.model, runtime.processor))
    (trace,) = run(runtime, engine, [request])
    counts, num_turns = trace.counts, len(trace.turns)
    assert num_turns > 1
    assert counts.llm_tokens == engine.num_tokens_run
    # The last token of a turn is read with what is appended behind it, or never.
    stepped = counts.generated_tokens - num_turns
    assert counts.llm_tokens == counts.prompt_tokens + counts.appended_tokens + stepped


def test_a_reencoding_of_what_the_tower_has_just_seen_costs_no_encoder_work(runtime):
    engine = Engine(runtime.model, Encoders(runtime.model, runtime.processor))
    calls = []
    handle = runtime.model.model.visual.register_forward_hook(lambda *args: calls.append(1))
    request = runtime.request([noise(16, 16, 9)], "What?", perception="clip", max_new_tokens=5)
    (trace,) = run(runtime, engine, [request])
    handle.remove()
    assert trace.calls[0].outcome == "executed"
    assert len(calls) == 1
    assert (trace.counts.images_encoded, trace.counts.images_reused) == (1, 1)


def test_the_cache_is_never_moved_while_streams_run(runtime):
    engine = Engine(runtime.model, Encoders(runtime.model, runtime.processor), num_slots=2)
    before = [buffer.data_ptr() for buffer in engine.cache.keys + engine.cache.values]
    asked = [
        runtime.request([noise(16, 16, i)], "What?", perception="region", max_new_tokens=30)
        for i in range(4)
    ]
    run(runtime, engine, asked, batch_size=2)
    assert before == [buffer.data_ptr() for buffer in engine.cache.keys + engine.cache.values]


def test_streams_are_closed_when_the_iterator_is(runtime):
    engine = Engine(runtime.model, Encoders(runtime.model, runtime.processor), num_slots=1)
    request = runtime.request([noise(8, 8, 0)], "What?")
    events = drive(
        engine,
        [(runtime.converse(request).run(), request.sampling)],
        1,
    )
    next(events)
    with pytest.raises(BudgetError, match="all slots are taken"):
        engine.open()
    events.close()
    engine.close(engine.open())


def test_a_reencoding_without_a_call_is_refused(runtime):
    engine = runtime.engine
    stream = engine.open()
    pieces = pieces_of(runtime, "a", ("dino", noise(8, 8, 0)))
    with pytest.raises(PositionError, match=r"no <\|detection_action\|> token to condition it"):
        engine.extend(stream, pieces)
    with pytest.raises(PositionError, match="nothing to append"):
        engine.extend(stream, [TokenPiece(())])
    with pytest.raises(PositionError, match="begins the stream"):
        engine.extend(stream, pieces_of(runtime, BRANCH_TOKENS["dino"].action))
    engine.close(stream)


def test_a_stream_ends_where_its_slot_does(runtime):
    encoders = Encoders(runtime.model, runtime.processor)
    engine = Engine(runtime.model, encoders, num_slots=2, capacity=150)
    asked = [
        runtime.request([noise(8, 8, 0)], "What?", perception="none", max_new_tokens=500),
        runtime.request([], "What?", perception="none", max_new_tokens=5),
    ]
    first, second = run(runtime, engine, asked, batch_size=2)
    num_read = first.counts.prompt_tokens + first.counts.generated_tokens - 1
    assert first.stop_reason == "length" and num_read == 150
    assert len(second.tokens) <= 5
    stream = engine.open()
    with pytest.raises(BudgetError, match="need 151 tokens, a stream has room for 150"):
        engine.extend(stream, [TokenPiece(tuple(range(151)))])
    engine.close(stream)


def test_the_context_of_the_model_is_the_limit():
    model, processor = tiny_model()
    model.config.text_config.max_position_embeddings = 300
    runtime = Runtime(model, processor)
    asked = {"images": [noise(16, 16, 0)], "question": "What?", "perception": "none"}
    trace = runtime.ask(**asked, max_new_tokens=10**9).trace
    assert trace.stop_reason == "length"
    num_read = trace.counts.prompt_tokens + trace.counts.generated_tokens - 1
    assert num_read == 300  # the last token is not read
    good, bad = runtime.ask_many(
        [{**asked, "max_new_tokens": 3}, {**asked, "question": "x" * 10**6}], on_error="return"
    )
    assert good.trace.counts.generated_tokens == 3
    words = r"need 1000\d\d\d positions, the model's context has 300; shorten the question"
    with pytest.raises(BudgetError, match=words):
        raise bad


# What the released implementation generated ----------------------------------------------------

GENERATED = [(v, "generate", n) for v, n in golden.case_names("generate")]
GENERATED.append(("clip", "region", "r2_region"))


@pytest.fixture(scope="module")
def released():
    made = {}
    for variant in VARIANTS:
        folder = str(GOLDENS / "checkpoints" / variant)
        model = load_model(folder, device="cpu")
        made[variant] = Runtime(model, VPTProcessor.from_pretrained(folder))
    return made


def golden_pieces(runtime, variant, group, name, row):
    """A recorded prompt, cut into pieces: runs of placeholders become images again."""
    case = golden.cases(variant, group)[name]
    sequence = golden.outputs(variant, group, name)["sequences"][row].tolist()
    prompt = sequence[: len(sequence) - golden.outputs(variant, group, name)["new_ids"].shape[1]]
    while prompt and prompt[0] == runtime.processor.tokenizer.pad_token_id:
        prompt.pop(0)
    config = runtime.model.config
    pads = {config.pad_id(b): b for b in config.branches} | {config.image_token_id: "image"}
    sources = iter(images_of_row(case, variant, group, name, row))
    pieces, text, index = [], [], 0
    while index < len(prompt):
        if (kind := pads.get(prompt[index])) is None:
            text.append(prompt[index])
            index += 1
            continue
        if text:
            pieces.append(TokenPiece(tuple(text)))
            text = []
        image = load_golden(next(sources))
        pieces.append(ImagePiece(image) if kind == "image" else FeaturePiece(kind, image))
        while index < len(prompt) and prompt[index] in pads:
            index += 1
    return [*pieces, TokenPiece(tuple(text))], prompt


def images_of_row(case, variant, group, name, row):
    """Names of a row's images in reading order; the recorded pixels list them batch by batch."""
    action = ["images/a_scene.png", "images/a_scene.png"]
    region = ["images/a_tall.png", "images/a_tall.png_11,0,78,112"]
    if name.startswith("r2_batch"):
        return (action, region)[row]
    if name == "r1_forced_start_batch":
        return (["images/a_scene.png"], ["images/a_tall.png"])[row]
    if name == "r2_region":
        return region
    listed = case["inputs"]["pixel_values"]["images"]
    return [*listed, *listed]


def load_golden(name):
    path, _, box = name.partition(".png_")
    image = Image.open(GOLDENS / (path if box == "" else f"{path}.png")).convert("RGB")
    return load_image(image.crop(tuple(map(int, box.split(",")))) if box else image)


@pytest.mark.parametrize(("variant", "group", "name"), GENERATED)
def test_greedy_tokens_equal_the_released_ones(released, variant, group, name):
    runtime, expected = released[variant], golden.outputs(variant, group, name)
    ends = set(golden.cases(variant, group)[name]["generate_kwargs"]["eos_token_id"] or [])
    engine = runtime.engine
    for row, new_ids in enumerate(expected["new_ids"].tolist()):
        pieces, prompt = golden_pieces(runtime, variant, group, name, row)
        stream = engine.open()
        extension = engine.extend(stream, pieces)
        assert extension.token_ids == prompt
        logits, last = extension.logits, prompt[-1]
        for number, token_id in enumerate(new_ids):
            if "step_logits" in expected:
                torch.testing.assert_close(
                    logits, expected["step_logits"][number, row], atol=1e-4, rtol=0
                )
            forced = runtime.model.config.__dict__.get(f"{released_word(variant)}_action_start_id")
            chosen = action_id(runtime) if last == forced else int(logits.argmax())
            assert chosen == token_id
            if chosen in ends:
                break
            if engine.is_action(chosen):
                logits = engine.extend(stream, [TokenPiece((chosen,))]).logits
            else:
                logits = engine.step([stream], [chosen])[0]
            last = chosen
        engine.close(stream)


def released_word(variant):
    return {"clip": "clip", "dino": "detection", "sam": "seg"}[variant]


def action_id(runtime):
    return runtime.model.config.action_id(runtime.model.config.branches[0])


def test_the_turn_end_of_the_released_tokenizers_is_known(released):
    for runtime in released.values():
        assert runtime.vocabulary.ids[TURN_END] == 472


def test_a_slot_that_is_closed_holds_no_stray_values(runtime):
    engine = Engine(runtime.model, Encoders(runtime.model, runtime.processor), num_slots=2)
    stream = engine.open()
    engine.extend(stream, [TokenPiece((1, 2, 3, 4))])
    engine.cache.keys[0][1] = torch.nan
    engine.close(stream)
    assert all((buffer == 0).all() for buffer in engine.cache.keys + engine.cache.values)


def test_encodes_that_wait_together_run_in_one_batch(runtime):
    engine = Engine(runtime.model, Encoders(runtime.model, runtime.processor), num_slots=3)
    encoder, sizes = runtime.model.branches["dino"].encoder, []
    handle = encoder.register_forward_pre_hook(
        lambda module, args, given: sizes.append(len(args[0] if args else given["pixel_values"])),
        with_kwargs=True,
    )
    asked = [
        runtime.request([noise(12, 12, i)], "What?", perception="dino", max_new_tokens=4)
        for i in range(3)
    ]
    traces = run(runtime, engine, asked, batch_size=3)
    handle.remove()
    assert [len(trace.calls) for trace in traces] == [1, 1, 1]
    assert sizes == [3]


def test_a_batch_without_feature_cache_encodes_nothing_twice_and_says_so(runtime):
    encoders = Encoders(runtime.model, runtime.processor, FeatureCache(max_bytes=0))
    engine = Engine(runtime.model, encoders, num_slots=3)
    asked = [
        runtime.request([noise(12, 12, i)], "What?", perception="none", max_new_tokens=3)
        for i in range(3)
    ]
    traces = run(runtime, engine, asked, batch_size=3)
    assert encoders.num_encoded == 3
    assert [trace.counts.images_encoded for trace in traces] == [1, 1, 1]
