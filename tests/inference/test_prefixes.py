"""A stream that begins like a kept one begins with a copy, and answers as if it had not."""

import numpy as np
import pytest
import torch
from bases import EACH_BACKBONE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.errors import PositionError
from vpt.images import load_image
from vpt.inference.engine import Engine
from vpt.inference.features import Encoders
from vpt.inference.prefixes import Atoms, PrefixStore, common_length
from vpt.model.processing import FeaturePiece, ImagePiece, TokenPiece
from vpt.protocol.tokens import BRANCH_TOKENS


@pytest.fixture(scope="module", params=EACH_BACKBONE)
def runtime(request):
    return vpt.Runtime(*tiny_model(num_layers=3, backbone=request.param))


def noise(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return load_image(Image.fromarray(values.numpy()).resize((width * 4, height * 4)))


def engine_of(runtime, **settings):
    return Engine(runtime.model, Encoders(runtime.model, runtime.processor), 4, **settings)


def stream_of_calls(runtime, seed):
    """Pieces: text, an image, then calls of every branch, each answered, in an order by seed."""
    image, parts = noise(20, 15, 0), []
    order = np.random.default_rng(seed).permutation(["dino", "reencode", "sam", "dino"])
    for branch in order.tolist():
        parts += [runtime.processor.encode_text(f" then {BRANCH_TOKENS[branch].call} ")]
        parts += [FeaturePiece(branch, image)]
    begin, end = (runtime.processor.encode_text(text) for text in ("Look here: ", " the end."))
    return [begin, ImagePiece(image), *parts, end]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(first=st.integers(0, 3), second=st.integers(0, 3), cut=st.integers(1, 10))
def test_a_stream_with_a_kept_beginning_equals_one_without(runtime, first, second, cut):
    kept = stream_of_calls(runtime, first)[:cut]
    pieces = [*kept, *stream_of_calls(runtime, second)[cut:]]
    ours, plain = engine_of(runtime), engine_of(runtime, prefix_bytes=0)
    one = ours.open()
    ours.extend(one, kept)
    ours.keep(one)
    ours.close(one)
    again, alone = ours.open(), plain.open()
    try:
        expected = plain.extend(alone, pieces)
    except PositionError:  # features without their call
        return
    got = ours.extend(again, pieces)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=0)
    assert (again.length, again.position) == (alone.length, alone.position)
    assert again.atoms.ids == alone.atoms.ids or got.num_reused  # numbers differ by engine
    assert set(again.conditions) == set(alone.conditions)
    for branch, state in alone.conditions.items():
        torch.testing.assert_close(again.conditions[branch], state, atol=1e-4, rtol=0)
    assert [(i.branch, i.num_tokens, i.grid_hw) for i in got.images] == [
        (i.branch, i.num_tokens, i.grid_hw) for i in expected.images
    ]


def test_a_prefix_never_ends_within_a_call_or_an_image(runtime):
    engine = engine_of(runtime)
    stream = engine.open()
    engine.extend(stream, stream_of_calls(runtime, 0))
    atoms, config = stream.atoms, runtime.model.config
    actions = [config.action_id(branch) for branch in config.branches]
    for length in range(len(atoms.ids) + 1):
        cut = atoms.cut(length)
        assert cut <= length
        if cut == len(atoms.ids):
            continue
        assert atoms.ids[cut] not in actions
        assert atoms.ids[cut] >= 0 or cut == 0 or atoms.ids[cut - 1] != atoms.ids[cut]
        if atoms.ids[cut] < 0:  # an image begins: a plain one, for features follow their call
            assert atoms.ids[cut] == engine.prefixes.number(
                (True, engine.encoders.key("reencode", noise(20, 15, 0)))
            )


@pytest.mark.parametrize("differ", ["image", "size", "question", "system", "nothing"])
def test_only_what_is_equal_is_shared(differ):
    runtime = vpt.Runtime(*tiny_model())
    image = noise(20, 15, 0)
    asked = {"images": [image], "question": "What is it?", "perception": "none"}
    asked |= {"max_new_tokens": 6, "system": "You are a careful helper with good eyes." * 3}
    first = runtime.ask(**asked).trace.counts
    changed = {
        "image": {"images": [noise(20, 15, 1)]},
        "size": {"images": [noise(20, 16, 0)]},
        "question": {"question": "Who is it?"},
        "system": {"system": "Be brief and careful with everything that you see." * 3},
        "nothing": {},
    }[differ]
    second = runtime.ask(**{**asked, **changed})
    plain = vpt.Runtime(runtime.model, runtime.processor, prefix_cache_bytes=0)
    alone = plain.ask(**{**asked, **changed})
    assert [t.id for t in second.trace.tokens] == [t.id for t in alone.trace.tokens]
    reused, num_of_image = second.trace.counts.reused_tokens, second.trace.images[0].num_tokens
    before_image = first.prompt_tokens - num_of_image - len("What is it?") - 50
    if differ == "nothing":
        assert reused == first.prompt_tokens - 1
    elif differ == "question":
        assert reused > before_image + num_of_image
    elif differ == "system":
        assert reused == 0
    else:
        assert reused <= first.prompt_tokens - num_of_image - len("What is it?")


def test_streams_that_wait_together_read_their_common_beginning_once():
    runtime = vpt.Runtime(*tiny_model())
    image = noise(30, 30, 0)
    requests = [
        runtime.request(image, "What is it?", perception="none", temperature=1.0, seed=seed)
        for seed in range(4)
    ]
    answers = runtime.ask_many(requests, batch_size=4)
    reused = sorted(answer.trace.counts.reused_tokens for answer in answers)
    num_prompt = answers[0].trace.counts.prompt_tokens
    assert reused == [0, *[num_prompt - 1] * 3]


def test_the_least_recently_used_prefixes_give_way():
    store = PrefixStore(max_bytes=3000)
    ids = [np.arange(100) + 1000 * n for n in range(4)]
    for one in ids[:3]:
        store.put(Atoms(one.tolist()), torch.zeros(1000, dtype=torch.uint8))
    assert store.find(ids[0]) is not None  # used again, so that the second is the oldest
    store.put(Atoms(ids[3].tolist()), torch.zeros(1000, dtype=torch.uint8))
    assert [store.find(one) is not None for one in ids] == [True, False, True, True]
    assert store.num_bytes == 3000
    assert store.covers(ids[0][:50], 1000) and not store.covers(ids[1], 1000)
    assert store.covers(ids[1], 3001)  # does not fit
    longer = np.concatenate([ids[0], ids[1]])
    store.put(Atoms(longer.tolist()), torch.zeros(1000, dtype=torch.uint8))
    assert store.num_bytes == 3000  # in place of its own beginning


def test_numbers_of_images_are_never_given_twice():
    store = PrefixStore()
    numbers = [store.number(n) for n in range(5000)]
    assert len(set(numbers)) == 5000 and max(numbers) < 0
    assert store.number(4999) == numbers[4999]
    assert store.number(0) not in numbers  # forgotten since


def test_common_length():
    assert common_length(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert common_length(np.array([1, 2]), np.array([1, 2, 4])) == 2
    assert common_length(np.array([], dtype=int), np.array([1])) == 0


def test_an_engine_with_changed_control_states_keeps_nothing(runtime):
    engine = engine_of(runtime)
    engine.intervene = lambda state: state * 0
    stream = engine.open()
    engine.extend(stream, [TokenPiece(tuple(range(40)))])
    engine.keep(stream)
    assert engine.prefixes.num_bytes == 0


def test_a_kept_beginning_with_calls_is_not_used_under_changed_control_states(runtime):
    engine, pieces = engine_of(runtime), stream_of_calls(runtime, 0)
    stream = engine.open()
    engine.extend(stream, pieces)
    engine.keep(stream)
    assert engine.extend(engine.open(), pieces).num_reused > 0
    engine.intervene = lambda state: state * 0
    assert engine.extend(engine.open(), pieces).num_reused == 0


def test_a_beginning_that_ends_at_an_action_token_leaves_the_token_before_it(runtime):
    """A model without a grammar may write one alone; a follow-up then begins with it."""
    action = runtime.model.config.action_id("dino")
    text = TokenPiece(tuple(range(100, 140)))
    ours, plain = engine_of(runtime), engine_of(runtime, prefix_bytes=0)
    stream = ours.open()
    ours.extend(stream, [text])
    ours.keep(stream)
    pieces = [text, TokenPiece((action, 7, 8))]
    one, other = ours.open(), plain.open()
    found, wanted = ours.extend(one, pieces), plain.extend(other, pieces)
    assert found.num_reused == 39 and torch.allclose(found.logits, wanted.logits, atol=1e-5)


def test_a_placeholder_that_the_model_wrote_is_text(runtime):
    """Read again as a whole, a stream without grammar equals itself token by token."""
    engine, pad = engine_of(runtime), runtime.model.config.image_token_id
    begin = [ImagePiece(noise(8, 6, 0)), TokenPiece(tuple(range(100, 120)))]
    whole, stepwise = engine.open(), engine.open()
    got = engine.extend(whole, [*begin, TokenPiece((pad, 5, pad))]).logits
    engine.extend(stepwise, begin)
    for token_id in (pad, 5, pad):
        wanted = engine.step([stepwise], [token_id])[0]
    assert torch.allclose(got, wanted, atol=1e-5) and whole.position == stepwise.position
