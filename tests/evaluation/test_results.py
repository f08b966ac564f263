"""Looking again, set against not looking: gains, harms, costs, and who is left out."""

import pytest

from vpt.evaluation.records import Record
from vpt.evaluation.results import _per_solved, tool_value
from vpt.evaluation.table import shortfalls


def record(condition, id, score=None, *, calls=0, tokens=100, ms=50.0, split="s", **scores):
    call = {"outcome": "executed"}
    trace = {
        "calls": [call] * calls,
        "counts": {"llm_tokens": tokens},
        "timings": {"total": ms},
    }
    if score is None:
        error = {"kind": "run", "message": "out of room"}
        return Record(split, condition, id, "What?", error=error)
    return Record(split, condition, id, "What?", scores={"acc": score, **scores}, trace=trace)


def find(values, condition, baseline="none", among="all", split="s"):
    wanted = (split, condition, baseline, among)
    (value,) = [v for v in values if (v.split, v.condition, v.baseline, v.among) == wanted]
    return value


def test_gain_and_harm_are_counted_apart():
    none = [record("none", i, s) for i, s in zip("abcdef", [0, 0, 0, 1, 1, 0.5], strict=True)]
    auto = [record("auto", i, s) for i, s in zip("abcdef", [1, 1, 0, 1, 0, 0.5], strict=True)]
    value = find(tool_value(none + auto), "auto")
    assert (value.n, value.num_better, value.num_worse) == (6, 2, 1)
    assert (value.to_dict()["better_share"], value.to_dict()["worse_share"]) == (2 / 6, 1 / 6)
    assert value.difference.mean == pytest.approx(1 / 6)
    assert value.difference.low <= 1 / 6 <= value.difference.high
    assert value.test.name == "sign_flip"


def test_what_is_missing_or_failed_is_left_out_and_counted():
    records = [
        *(record("none", "a", 1), record("auto", "a", 1)),
        record("none", "b", 1),  # not asked under auto
        *(record("none", "c", 0), record("auto", "c")),
        *(record("none", "d"), record("auto", "d", 0)),
    ]
    value = find(tool_value(records), "auto")
    assert (value.n, value.unpaired) == (1, 3)


def test_a_sample_without_the_score_is_left_out():
    records = [record("none", "a", 1), record("auto", "a", 1, judge=1), record("none", "b", 0)]
    value = find(tool_value(records, {"s": "judge"}), "auto")
    assert (value.score, value.n, value.unpaired, value.difference) == ("judge", 0, 2, None)
    assert find(tool_value(records), "auto").score == "acc"


def test_only_samples_with_a_call_count_among_those_called():
    records = [
        *(record("none", "a", 0), record("auto", "a", 1, calls=2)),
        *(record("none", "b", 0), record("auto", "b", 0)),
        *(record("none", "c"), record("auto", "c", 0, calls=1)),
    ]
    values = tool_value(records)
    everyone, called = find(values, "auto"), find(values, "auto", among="called")
    assert (everyone.n, everyone.num_called, everyone.to_dict()["called_share"]) == (2, 1, 0.5)
    assert (called.n, called.num_called, called.unpaired) == (1, 1, 1)
    assert called.difference.mean == 1


def test_contents_are_compared_where_the_own_run_called():
    records = [
        *(record("auto", "a", 1, calls=1), record("auto", "b", 0)),
        *(record("blank", "a", 0, calls=1), record("blank", "b", 0, calls=1)),
        *(record("random", "a", 0, calls=1), record("random", "b", 1)),
        *(record("truth", "a", 1, calls=1), record("truth", "b", 1, calls=1)),
    ]
    values = tool_value(records)
    assert {(v.condition, v.baseline) for v in values} == {
        *{("auto", "blank"), ("auto", "random"), ("truth", "auto")}
    }
    assert [find(values, "auto", "blank", among).n for among in ("all", "called")] == [2, 1]
    assert find(values, "auto", "blank", "called").num_better == 1
    assert find(values, "auto", "random").difference.mean == 0
    assert find(values, "truth", "auto").num_better == 1
    assert find(values, "truth", "auto", "called").n == 1


def test_costs_are_means_over_pairs():
    records = [
        *(record("none", "a", 0, tokens=100, ms=10), record("sam", "a", 0, tokens=300, ms=40)),
        *(record("none", "b", 0, tokens=300, ms=30), record("sam", "b", 0, tokens=300, ms=60)),
        record("none", "alone", 0, tokens=9999),
    ]
    value = find(tool_value(records), "sam")
    assert (value.tokens["mean"], value.tokens["baseline_mean"]) == (300, 200)
    assert (value.tokens["ratio"], value.tokens["difference"]) == (1.5, 100)
    assert (value.milliseconds["ratio"], value.milliseconds["difference"]) == (2.5, 30)
    free = [record("none", "a", 0, tokens=0), record("sam", "a", 0, tokens=5)]
    assert find(tool_value(free), "sam").tokens["ratio"] is None


def test_splits_are_kept_apart_and_order_does_not_matter():
    records = [
        *(record("none", "a", 0), record("auto", "a", 1)),
        *(record("none", "a", 1, split="t"), record("auto", "a", 0, split="t")),
    ]
    values = tool_value(records)
    assert find(values, "auto").num_better == find(values, "auto", split="t").num_worse == 1
    assert find(tool_value(reversed(records)), "auto") == find(values, "auto")


def test_without_a_second_condition_there_is_nothing_to_compare():
    assert tool_value([record("auto", "a", 1)]) == []
    assert tool_value([]) == []


def test_a_model_that_never_called_has_no_pairs_among_those_called():
    value = find(tool_value([record("none", "a", 1), record("auto", "a", 1)]), "auto", "none")
    assert value.to_dict()["called_share"] == 0
    never = find(
        tool_value([record("none", "a", 1), record("auto", "a", 1)]), "auto", among="called"
    )
    assert (never.n, never.unpaired, never.difference, never.to_dict()["called_share"]) == (
        0,
        0,
        None,
        None,
    )


def test_the_result_is_plain_json():
    (everyone, _) = tool_value([record("none", "a", 0), record("auto", "a", 1, calls=1)])
    content = everyone.to_dict()
    assert content["difference"] == {"mean": 1, "low": 1, "high": 1, "n": 1}
    assert content["test"] == {"name": "mcnemar", "p_value": 1}
    assert content["better_share"] == content["called_share"] == 1
    assert content["tokens"] == {"mean": 100, "baseline_mean": 100, "difference": 0, "ratio": 1}


def test_drawings_are_compared_with_what_replaced_them():
    names = ["auto", "content-random", "content-other", "content-truth"]
    values = tool_value([record(name, "a", float(name == "auto")) for name in names])
    assert {(v.condition, v.baseline) for v in values} == {
        ("auto", "content-random"),
        ("auto", "content-other"),
        ("content-truth", "auto"),
    }
    assert find(values, "auto", "content-other").num_better == 1


def test_the_cost_of_a_solved_sample_counts_the_unsolved_too():
    records = [record("auto", "a", 1.0), record("auto", "b", 0.0, tokens=300), record("auto", "c")]
    assert _per_solved(records, "acc") == {"tokens": 400, "milliseconds": 100}
    assert _per_solved(records[1:], "acc") is None
    assert _per_solved([record("auto", "a", 0.5)], "acc")["tokens"] == 200


def test_a_condition_that_fits_no_sample_is_told(tmp_path):
    entry = {"split": "s", "condition": "content-other", "failures": {}, "n": 0, "not_asked": 3}
    (line,) = shortfalls({"splits": [entry]}, tmp_path)
    assert line.startswith("s (content-other): no sample has what this condition needs")
