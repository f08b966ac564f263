"""The engine's log-probabilities are those of the training forward on the same streams."""

import pytest
import torch
from bases import EACH_BACKBONE
from drawing import CONTENT, eager_model, noise
from drivers import SomewhereDetector
from driving import drive
from tiny_model import tiny_model

from vpt.inference.engine import Engine
from vpt.inference.request import Sampling
from vpt.policy.rollouts import RolloutEncoder, run_rollouts, sampled_log_probs
from vpt.runtime import Runtime

MODES = ("auto", "none", "crop", "clip", "dino", "sam", "reencode", "auto")


def rollouts_of(runtime, modes=MODES, num_slots=5, **options):
    engine = Engine(runtime.model, runtime.encoders, num_slots)
    options = {"temperature": 1.0, "max_new_tokens": 24, **options}
    requests = [
        runtime.request(
            [noise(number), noise(9)][: 1 + number % 2],
            "What?",
            perception=mode,
            seed=number,
            **options,
        )
        for number, mode in enumerate(modes)
    ]
    return run_rollouts(engine, [runtime.take(one) for one in requests])


def gaps(runtime, rollouts, temperature=1.0):
    """Differences between engine and training forward, at each sampled token."""
    batch, rules = RolloutEncoder(runtime.model.config, runtime.processor).batch(rollouts)
    found, entropy = sampled_log_probs(runtime.model, batch, rules, temperature)
    assert found.requires_grad and entropy.isfinite().all()
    own = [token.log_prob for one in rollouts for token in one.sampled]
    assert len(own) > 20
    return (found - torch.tensor(own)).abs()


@pytest.mark.parametrize("backbone", EACH_BACKBONE)
def test_log_probs_of_the_engine_are_those_of_the_training_forward(backbone):
    runtime = Runtime(*tiny_model(num_layers=3, backbone=backbone))
    rollouts = rollouts_of(runtime)
    called = {call.branch for one in rollouts for call in one.trace.calls}
    assert called == {"crop", "reencode", "dino", "sam"}
    assert gaps(runtime, rollouts).max() < 1e-4
    hot = rollouts_of(runtime, temperature=1.7)
    assert gaps(runtime, hot, 1.7).max() < 1e-4 < gaps(runtime, hot, 1.0).max()


def test_depth_maps_and_boxes_are_scored_as_well():
    runtime = Runtime(*eager_model())
    modes = ("auto", "crop", "clip", "auto")
    rollouts = rollouts_of(runtime, modes, max_new_tokens=60, temperature=0.0)
    assert {one.kind for r in rollouts for one in r.trace.content} == {*CONTENT.kinds}
    assert gaps(runtime, rollouts).max() < 1e-4


def test_calls_for_phrases_are_scored_as_well():
    runtime = Runtime(*tiny_model(grounding=True), detector=SomewhereDetector())
    rollouts = rollouts_of(runtime, ("grounding",) * 6, max_new_tokens=40)
    outcomes = {call.outcome for one in rollouts for call in one.trace.calls}
    assert outcomes >= {"executed", "not_found"}
    assert gaps(runtime, rollouts).max() < 1e-4


def test_forced_tokens_are_certain_and_cutting_ends_a_stream_at_its_last_token():
    runtime = Runtime(*tiny_model(("clip",)))
    for length in range(1, 7):
        for one in rollouts_of(runtime, ("clip", "crop", "auto"), max_new_tokens=length):
            assert [c.token_id for c in one.chosen] == [t.id for t in one.trace.tokens][
                -len(one.chosen) :
            ]
            assert all(c.log_prob == 0 for c in one.chosen if c.is_forced)
            row = RolloutEncoder(runtime.model.config, runtime.processor).row(one)
            assert row.input_ids[-1] == one.chosen[-1].token_id
            labels = [i for i in row.labels if i >= 0]
            assert labels == [token.token_id for token in one.sampled]


def test_tokens_that_nobody_wants_scored_have_no_log_prob():
    runtime = Runtime(*tiny_model(("clip",)))
    exchange = runtime.take(runtime.request(noise(0), "What?", max_new_tokens=4)).run()
    engine = Engine(runtime.model, runtime.encoders)
    engine.log_probs = None  # would fail
    assert len(list(drive(engine, [(exchange, Sampling())], 1))) > 4
