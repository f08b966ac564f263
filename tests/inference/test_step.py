"""One decoding step: the same for rows of any batch, and free of what a captured graph forbids."""

import pytest
import torch
from bases import EACH_BACKBONE
from tiny_model import tiny_model

import vpt
from vpt.inference.cache import SlotRun, slot_runs
from vpt.inference.request import Sampling
from vpt.inference.sampling import Choice, pack
from vpt.model.processing import TokenPiece
from vpt.protocol.grammar import TokenRule

SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(1.0, seed=3),
    "sorted": Sampling(0.7, top_k=20, top_p=0.9, seed=5),
}


@pytest.fixture(params=EACH_BACKBONE)
def engine(request):
    made = tiny_model(backbone=request.param)
    return vpt.Runtime(*made, max_num_seqs=4, max_model_len=300).engine


def opened(engine, lengths):
    streams = [engine.open() for _ in lengths]
    for stream, length in zip(streams, lengths, strict=True):
        engine.extend(stream, [TokenPiece(tuple(range(1, 1 + length)))])
    return streams


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_step_is_traced_as_one_graph(engine, sampling):
    """No synchronisation with the host, no boolean indexing, no shape that depends on data."""
    torch._dynamo.reset()  # it counts the variants of all engines together
    streams = opened(engine, (4, 9, 30))
    reading = engine._step._reading(streams, [5, 6, 7])
    rule = TokenRule(banned=(1, 2, 3))
    choices = pack([Choice(rule, sampling, index) for index in range(3)], engine.rules)
    whole = (SlotRun(slice(0, 3), slice(0, 3), 64, is_even=False),)
    compiled = torch.compile(engine._step.forward, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        ids, states = compiled(reading.inputs, whole, choices)
        expected_ids, expected = engine._step.forward(reading.inputs, reading.runs, choices)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


def test_rows_without_a_stream_change_nothing(engine):
    """As in a captured step: rows of idle slots write to the place that nobody reads."""
    streams = opened(engine, (4, 9, 30))
    cache, going = engine.cache, [streams[0], streams[2]]
    before = [buffer.clone() for buffer in (*cache.keys, *cache.values)]
    reading = engine._step._reading(going, [5, 7])
    choices = pack([Choice()] * 2, engine.rules)
    expected, _ = engine._step.forward(reading.inputs, reading.runs, choices)
    after = [buffer.clone() for buffer in (*cache.keys, *cache.values)]
    for buffer, value in zip((*cache.keys, *cache.values), before, strict=True):
        buffer.copy_(value)
    columns = [[5, 4, cache.place(0, 4), 4], [0, 0, cache.place(1, -1), 0]]
    columns += [[7, 30, cache.place(2, 30), 30], [0, 0, cache.place(3, -1), 0]]
    whole = (SlotRun(slice(0, 4), slice(0, 4), 256, is_even=False),)
    with torch.inference_mode():
        ids, _ = engine._step.forward(
            torch.tensor(columns).T, whole, pack([Choice()] * 4, engine.rules)
        )
    assert ids[[0, 2]].tolist() == expected.tolist()
    idle = [cache.place(slot, -1) for slot in range(4)]
    for buffer, value in zip((*cache.keys, *cache.values), after, strict=True):
        kept = torch.ones(len(buffer), dtype=torch.bool)
        kept[idle] = False
        torch.testing.assert_close(buffer[kept], value[kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens_per_pass", [1, 7, 64, 10**6])
def test_a_prompt_in_parts_equals_the_whole(tokens_per_pass):
    runtime = vpt.Runtime(*tiny_model())
    engine = runtime.engine
    whole = engine.open()
    expected = engine.extend(whole, [TokenPiece(tuple(range(1, 90)))])
    engine.tokens_per_pass = tokens_per_pass
    streams = [engine.open() for _ in range(3)]
    pieces = [TokenPiece(tuple(range(1, 90))), TokenPiece(tuple(range(7, 60)))]
    prefills = [engine.begin(streams[0], pieces[:1], []), engine.begin(streams[1], pieces[1:], [])]
    num_passes = 0
    while waiting := [one for one in prefills if one.extension is None]:
        before = engine.num_tokens_run
        engine.prefill(waiting)
        num_passes += 1
        assert engine.num_tokens_run - before <= tokens_per_pass
    assert num_passes == max(1, -(-(89 + 53) // tokens_per_pass))
    torch.testing.assert_close(prefills[0].extension.logits, expected.logits, atol=1e-5, rtol=0)
    alone = engine.extend(streams[2], pieces[1:])
    torch.testing.assert_close(prefills[1].extension.logits, alone.logits, atol=1e-5, rtol=0)


def test_slots_run_together_while_they_are_neighbours():
    runs = slot_runs([0, 1, 3, 4, 7], [5, 5, 2, 9, 4])
    assert runs == (
        SlotRun(slice(0, 2), slice(0, 2), 5, is_even=True),
        SlotRun(slice(2, 4), slice(3, 5), 9, is_even=False),
        SlotRun(slice(4, 5), slice(7, 8), 4, is_even=True),
    )


def test_every_stream_may_have_a_rule_of_its_own():
    engine = vpt.Runtime(*tiny_model(), max_num_seqs=300, max_model_len=20).engine
    for first in (0, 7):
        rules = [TokenRule(banned=(first, n + 10)) for n in range(300)]
        rows, _ = engine.rules.rows_of(rules)
        assert len(set(rows)) == 300
        for row, rule in zip(rows, rules, strict=True):
            assert set(engine.rules.banned[row].nonzero().flatten().tolist()) == set(rule.banned)
