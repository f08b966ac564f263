"""Reading segment by segment equals whole passes, gradients too; nothing is read twice."""

from functools import partial
from unittest import mock

import pytest
import torch
from bases import EACH_BACKBONE
from streams import Row, batch, call, chat_rows, mixed_rows, naive_logits, picture
from tiny_model import tiny_model
from torch.utils.checkpoint import checkpoint

from vpt.errors import PositionError
from vpt.model.matching import ControlCall, in_rounds
from vpt.model.segments import SegmentReader
from vpt.protocol.tokens import BRANCH_TOKENS


@pytest.fixture(params=EACH_BACKBONE)
def made(request):
    """In float64, where noise is far below what a mistake would do."""
    model, processor = tiny_model(backbone=request.param)
    return model.double(), processor


def logits_of_rows(model, kwargs):
    """Logits of each row of a batch, padding left out."""
    present = kwargs["attention_mask"].bool()
    return [row[kept] for row, kept in zip(model(**kwargs).logits, present, strict=True)]


def gradients(model, logits):
    weights = dict(model.named_parameters())
    total = sum(row.logsumexp(-1).sum() for row in logits)
    return dict(
        zip(weights, torch.autograd.grad(total, weights.values(), allow_unused=True), strict=True)
    )


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            off = (ours[name] - expected).norm()
            assert off <= tolerance * (expected.norm() + 1), name


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_of_a_mixed_batch_equal_those_of_whole_passes(made, side):
    model, rows = made[0], mixed_rows(made)
    ours = gradients(model, logits_of_rows(model, batch(*rows, side=side)))
    theirs = gradients(model, [naive_logits(model, row)[0] for row in rows])
    assert_same_gradients(ours, theirs)


def rows_to_mask(made):
    """Rows with one call and with two, and one without any."""
    once, never = chat_rows(made)
    turns = "<|im_start|>system\nyou<|im_end|>\n<|im_start|>user\n", picture(1)
    twice = [*turns, " two?<|im_end|>"]
    for branch in ("reencode", "dino"):
        twice += ["\n<|im_start|>assistant\n", *call(branch, picture(2)), "<|im_end|>\n"]
    return [once, never, Row(made, *twice, "yes"), once, Row(made, *twice, "no")]


def mask_half(model):
    """Train with hidden questions, under a seed that hides them in the last two of four rows."""
    model.config.para_mask_id, model.config.para_mask_ratio = 1, 0.5
    model.train()
    draws = mock.Mock(side_effect=[torch.tensor(v) for v in (0.9, 0.7, 0.2, 0.4)])
    return mock.patch("torch.rand", draws)


def test_gradients_of_a_half_masked_batch_equal_those_of_whole_passes(made):
    model, rows = made[0], rows_to_mask(made)
    with mask_half(model):
        ours = gradients(model, logits_of_rows(model, batch(*rows)))
    hidden = {}
    for number in (3, 4):
        ids = torch.tensor(rows[number].ids)
        start = int((ids == model.config.para_start_id).nonzero()[1]) + 1
        hidden[number] = slice(start, int((ids == model.config.para_end_id).nonzero()[1]))
    theirs = [naive_logits(model, row, hidden.get(n))[0] for n, row in enumerate(rows)]
    assert_same_gradients(ours, gradients(model, theirs))
    unmasked = [naive_logits(model, row)[0] for row in rows]
    with pytest.raises(AssertionError):
        assert_same_gradients(ours, gradients(model, unmasked), tolerance=1e-2)


def tokens_read(model, kwargs):
    """Tokens that each run of the LLM's layers reads."""
    counts = []
    handle = model.model.language_model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda module, args: counts.append(args[0].shape[0] * args[0].shape[1])
    )
    with torch.no_grad():
        model(**kwargs)
    handle.remove()
    return counts


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_token_is_read_once_and_padding_never(made, side):
    kwargs = batch(*mixed_rows(made), side=side)
    assert sum(tokens_read(made[0], kwargs)) == int(kwargs["attention_mask"].sum())


def test_only_masked_rows_are_read_again_and_up_to_their_last_call(made):
    model, rows = made[0], rows_to_mask(made)
    actions = [model.config.action_id(branch) for branch in model.config.branches]
    again = [max(p for p, token in enumerate(row.ids) if token in actions) for row in rows[3:]]
    with mask_half(model):
        read = tokens_read(model, batch(*rows))
    assert len(read) == 3
    assert sum(read) == sum(len(row.ids) for row in rows) + sum(again)


def expecting_a_module(function, *tensors):
    """Like LLaMA-Factory's: it asks the module behind the function whether it learns."""
    assert any(p.requires_grad for p in function.__self__.parameters())
    return checkpoint(function, *tensors, use_reentrant=True)


@pytest.mark.parametrize(
    "function",
    [
        partial(checkpoint, use_reentrant=True),
        partial(checkpoint, use_reentrant=False),
        expecting_a_module,
    ],
    ids=["reentrant", "not reentrant", "LLaMA-Factory"],
)
def test_checkpointed_gradients_equal_those_without(made, function):
    model, kwargs = made[0], batch(*rows_to_mask(made))
    with mask_half(model):
        expected = gradients(model, logits_of_rows(model, kwargs))
    model.zero_grad()
    runs = []
    layers = model.model.language_model.layers
    layers[-1].mlp.register_forward_pre_hook(lambda *given: runs.append(torch.is_grad_enabled()))
    for layer in layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, function
    with mask_half(model):
        logits = logits_of_rows(model, kwargs)
    assert len(runs) == 3
    sum(row.logsumexp(-1).sum() for row in logits).backward()
    assert len(runs) == 6
    assert all(layer.gradient_checkpointing for layer in layers)
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(got, expected, tolerance=1e-9)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_way_to_attend_is_left_as_it_was(made, name):
    model, kwargs = made[0], batch(*mixed_rows(made))
    expected = logits_of_rows(model, kwargs)
    config = model.model.language_model.config
    config._attn_implementation = name
    logits = logits_of_rows(model, kwargs)
    sum(row.sum() for row in logits).backward()
    assert config._attn_implementation == name
    for got, row in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, row, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backbone", EACH_BACKBONE)
def test_in_bfloat16_gradients_are_as_good_as_those_of_whole_passes(backbone):
    """Over two models: of one alone either may be twice as good by chance."""
    off = {"ours": 0.0, "whole": 0.0}
    for seed in (0, 1):
        model, processor = tiny_model(seed=seed, backbone=backbone)
        rows = mixed_rows((model.double(), processor))[1:3]
        exact = gradients(model, logits_of_rows(model, batch(*rows)))
        exact = {name: gradient for name, gradient in exact.items() if gradient is not None}
        model.bfloat16()
        found = {"ours": gradients(model, logits_of_rows(model, batch(*rows)))}
        found["whole"] = gradients(model, [naive_logits(model, row)[0] for row in rows])
        size = sum(gradient.square().sum() for gradient in exact.values()).sqrt()
        for name, one in found.items():
            squares = [(one[n].double() - gradient).square().sum() for n, gradient in exact.items()]
            off[name] += float(sum(squares).sqrt() / size)
    assert off["ours"] <= 1.5 * off["whole"]


def test_states_at_padding_are_zero_also_in_a_row_of_nothing_else(made):
    kwargs = batch(*mixed_rows(made)[:2])
    kwargs["attention_mask"][0] = 0
    with torch.no_grad():
        logits = made[0](**kwargs).logits
    assert not logits[0].any()
    assert logits[1, : int(kwargs["attention_mask"][1].sum())].any(-1).all()


def test_a_call_at_the_start_of_a_padded_row_is_refused(made):
    rows = [Row(made, BRANCH_TOKENS["dino"].action, " x"), mixed_rows(made)[1]]
    kwargs = batch(*rows, side="left")
    with pytest.raises(PositionError, match="stands at the start of row 0; nothing precedes it"):
        made[0](**kwargs)


def test_sliding_windows_are_refused(made):
    language_model = made[0].model.language_model
    language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(PositionError, match="sliding-window attention is not supported"):
        SegmentReader(language_model, None, torch.zeros(3, 1, 4))


def test_rounds_take_one_call_of_each_row():
    places = [(0, 9), (1, 3), (0, 2), (2, 5), (0, 7)]
    calls = [ControlCall("dino", row, position, []) for row, position in places]
    rounds = [[(call.row, call.position) for call in round_] for round_ in in_rounds(calls)]
    assert rounds == [[(0, 2), (1, 3), (2, 5)], [(0, 7)], [(0, 9)]]
    assert in_rounds([]) == []
