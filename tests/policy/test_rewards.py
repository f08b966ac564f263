"""Rewards of single answers, and advantages within groups."""

import pytest
import torch

from vpt.evaluation.samples import Sample
from vpt.policy.rewards import REWARDS, Outcome, group_advantages, reward_parts
from vpt.trace.records import CallRecord, MalformedRecord, Trace


def outcome(answer="2", outcomes=(), stop="stop", blind_score=None, num_tokens=3, malformed=()):
    calls = [CallRecord("crop", "", 0, 0, one) for one in outcomes]
    trace = Trace("?", "auto", calls=calls, answer=answer, stop_reason=stop)
    trace.counts.generated_tokens = num_tokens
    trace.malformed = [MalformedRecord(text, 0, "") for text in malformed]
    score = float(answer == "2")
    return Outcome(Sample("a", (), "?", ("2",)), trace, score, blind_score)


def test_scores_of_the_evaluation_are_rewards():
    names = ("exact_match", "vqa_accuracy", "count_accuracy")
    assert reward_parts(outcome("two"), names) == dict(zip(names, (0.0, 1.0, 1.0), strict=True))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 1.0),
        ({"stop": "length"}, 0.0),
        ({"answer": " "}, 0.0),
        ({"malformed": ("<|x_1|>",)}, 0.0),
    ],
)
def test_format_wants_whole_answers(given, expected):
    assert REWARDS["format"](outcome(**given)) == expected


@pytest.mark.parametrize(
    ("answer", "outcomes", "blind_score", "expected"),
    [
        ("2", ["executed"], 0.0, 1.0),
        ("2", ["executed"], 1.0, 0.0),  # right without looking
        ("3", ["executed"], 0.0, 0.0),
        ("2", [], 0.0, 0.0),
        ("2", ["not_executed"], 0.0, 0.0),
    ],
)
def test_a_look_is_worth_something_only_where_it_was_needed(
    answer, outcomes, blind_score, expected
):
    given = outcome(answer, outcomes, blind_score=blind_score)
    assert REWARDS["look_bonus"](given) == expected


def test_costs_count_executed_calls_and_written_tokens():
    given = outcome(outcomes=["executed", "executed", "repeated"], num_tokens=9)
    assert reward_parts(given, ["num_calls", "num_tokens"]) == {"num_calls": 2, "num_tokens": 9}


def test_advantages_compare_the_answers_to_one_question():
    rewards = torch.tensor([[1.0, 0, 0, 1], [5, 5, 5, 5], [1, 0, 0, 0]])
    everything = torch.ones(3, 4, dtype=torch.bool)
    scaled = group_advantages(rewards, everything, scale=True)
    assert scaled[0].tolist() == [1, -1, -1, 1] and scaled[1].tolist() == [0, 0, 0, 0]
    assert scaled[2].tolist() == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])
    centred = group_advantages(rewards, everything, scale=False)
    assert centred[0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_an_answer_that_was_cut_is_neither_rewarded_nor_punished():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0]])
    counted = torch.tensor([[True, True, True, False], [False] * 4])
    found = group_advantages(rewards, counted, scale=False)
    assert found.tolist() == [pytest.approx([2 / 3, -1 / 3, -1 / 3, 0]), [0, 0, 0, 0]]
