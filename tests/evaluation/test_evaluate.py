"""A whole evaluation: it can be cut at any point, refuses mistakes early, and leaves numbers."""

import json

import numpy as np
import pytest

from vpt.errors import DataError, PromptError
from vpt.evaluation.evaluate import evaluate, make_plan
from vpt.evaluation.records import LineFile, RunFolder
from vpt.evaluation.runner import Decoding, LocalAsker
from vpt.evaluation.samples import hash_samples
from vpt.evaluation.table import results_table
from vpt.runtime import Runtime

DECODING = Decoding(max_new_tokens=16, max_calls=1)


def plan_of(own_split, conditions=("none", "truth"), **changes):
    given = {"splits": [str(own_split)], "conditions": conditions, "data": own_split.parent}
    return make_plan(**{**given, **changes})


def run(runtime, plan, out, **changes):
    return evaluate(LocalAsker(runtime), plan, DECODING, RunFolder(out), **changes)


def without_times(results):
    """What two runs of the same must share."""
    copy = json.loads(json.dumps(results))
    for name in ("seconds", "parts", "date"):
        del copy[name]
    for entry in copy["splits"]:
        del entry["milliseconds"]
    for value in copy["tool_value"]:
        del value["milliseconds"]
    return copy


def test_results_name_all_that_they_depend_on(runtime, own_split, tmp_path):
    results = run(runtime, plan_of(own_split), tmp_path / "out")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["hash"] and results["model"]["name"] == "tiny"
    assert results["decoding"]["max_new_tokens"] == 16 and "torch" in results["libraries"]
    none, truth = results["splits"]
    assert (none["condition"], none["n"], none["not_asked"], none["called"]) == ("none", 7, 0, 0.0)
    assert (truth["condition"], truth["n"], truth["not_asked"]) == ("truth", 4, 3)
    assert truth["called"] == 1.0 and truth["scores"]["region_shown"]["mean"] == 1.0
    assert none["scores"][none["score"]]["n"] == 7
    assert {value["condition"] for value in results["tool_value"]} == {"truth"}
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


def test_a_run_that_was_cut_ends_as_one_that_was_not(runtime, own_split, tmp_path, monkeypatch):
    plan = plan_of(own_split)
    whole = run(runtime, plan, tmp_path / "whole")
    append, left = LineFile.append, iter([True] * 5)

    def cut(self, record):
        append(self, record)
        if next(left, None) is None:
            with self.path.open("ab") as file:
                file.write(b'{"split": "own", "cond')
            raise KeyboardInterrupt

    monkeypatch.setattr(LineFile, "append", cut)
    with pytest.raises(KeyboardInterrupt):
        run(runtime, plan, tmp_path / "cut")
    monkeypatch.undo()
    interim = RunFolder(tmp_path / "cut").read_results()
    assert interim["interrupted"] and not whole["interrupted"]
    counts = [(e["n"], e["waiting"], e["not_asked"]) for e in interim["splits"]]
    assert sorted(counts) == [(2, 5, 0), (3, 4, 0)]  # conditions of a sample follow each other
    page = (tmp_path / "cut" / "report.html").read_text()
    assert "the run was interrupted; 9 samples wait" in page
    again = run(runtime, plan, tmp_path / "cut", batch_size=3)
    assert without_times(again) == without_times(whole)


def test_the_seconds_are_those_of_all_parts(runtime, own_split, tmp_path):
    first = run(runtime, plan_of(own_split, ("none",)), tmp_path)
    second = run(runtime, plan_of(own_split), tmp_path)
    parts = second["parts"]
    assert parts[:1] == first["parts"] and len(parts) == 2
    assert second["seconds"] == sum(part["seconds"] for part in parts) > first["seconds"]
    assert second["date"] == first["date"] == parts[0]["started"]
    again = run(runtime, plan_of(own_split), tmp_path)  # asks nothing but what does not fit
    assert again["seconds"] >= second["seconds"]
    (tmp_path / "parts.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*parts\.json"):
        run(runtime, plan_of(own_split), tmp_path)


def test_a_folder_without_parts_keeps_its_seconds(runtime, own_split, tmp_path):
    plan = plan_of(own_split, ("none",))
    first = run(runtime, plan, tmp_path)
    (tmp_path / "parts.json").unlink()
    assert run(runtime, plan, tmp_path)["seconds"] == first["seconds"]


def test_the_hash_of_the_data_follows_questions_and_images(own_split):
    def hash_now():
        return hash_samples(plan_of(own_split).splits[0].samples)

    hashes = [hash_now(), hash_now()]
    own_split.write_text(own_split.read_text().replace("number 3", "number 4"))
    hashes.append(hash_now())
    (own_split.parent / "3.png").write_bytes(b"torn")
    hashes.append(hash_now())
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_chance_is_the_mean_over_scored_samples(runtime, own_split, tmp_path):
    rows = [json.loads(line) for line in own_split.read_text().splitlines()]
    for row, choices in zip(rows, (["x", "y"], ["x", "y", "z", "u"], ["x", "y"]), strict=False):
        row["choices"] = choices
    rows[2]["image"] = "absent.png"
    own_split.write_text("\n".join(map(json.dumps, rows[:3])))
    results = run(runtime, plan_of(own_split, ("none",)), tmp_path)
    assert results["splits"][0]["chance"] == (1 / 2 + 1 / 4) / 2
    assert "chance 0.375" in (tmp_path / "report.html").read_text()
    assert "  0.375  " in results_table(results)
    rows[1].pop("choices")
    own_split.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="2 questions with choices and 5 without"):
        plan_of(own_split)


def test_a_blank_look_shows_no_region(runtime, own_split, tmp_path):
    results = run(runtime, plan_of(own_split, ("random", "blank")), tmp_path)
    random, blank = results["splits"]
    assert random["called"] == blank["called"]
    assert "region_shown" not in blank["scores"]


def test_a_finished_run_asks_nothing_again(runtime, own_split, tmp_path):
    class Silent(LocalAsker):
        def ask(self, work, decoding, batch_size):
            assert not work
            return iter(())

    plan = plan_of(own_split)
    first = run(runtime, plan, tmp_path)
    # `truth` leaves samples without evidence: they are looked at again, and left again
    first_none = run(runtime, plan_of(own_split, ("none",)), tmp_path)
    assert first_none["splits"] == first["splits"][:1]
    evaluate(Silent(runtime), plan_of(own_split, ("none",)), DECODING, RunFolder(tmp_path))


def test_a_limit_can_be_raised(runtime, own_split, tmp_path):
    few = run(runtime, plan_of(own_split, ("none",), limit=2), tmp_path)
    more = run(runtime, plan_of(own_split, ("none",), limit=4), tmp_path)
    assert [few["splits"][0]["n"], more["splits"][0]["n"]] == [2, 4]


def test_data_that_changed_in_between_is_told(runtime, own_split, tmp_path):
    run(runtime, plan_of(own_split, ("none",)), tmp_path / "out")
    own_split.write_text(own_split.read_text().replace('"answer": "x"', '"answer": "y"'))
    with pytest.raises(DataError, match=r"sample .* had the answers \['x'\], now \['y'\]; choose"):
        run(runtime, plan_of(own_split, ("none",)), tmp_path / "out")


def test_a_row_that_is_bad_now_does_not_keep_its_old_score(runtime, own_split, tmp_path):
    run(runtime, plan_of(own_split, ("none",)), tmp_path / "out")
    lines = own_split.read_text().splitlines()
    lines[3] = lines[3].replace('"answer": "x"', '"answer": NaN')
    own_split.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"sample 3 had the answers \['x'\], now \[\]; choose"):
        run(runtime, plan_of(own_split, ("none",)), tmp_path / "out")


def test_another_decoding_is_another_run(runtime, own_split, tmp_path):
    plan = plan_of(own_split, ("none",), limit=1)
    run(runtime, plan, tmp_path)
    with pytest.raises(DataError, match="holds a run with decoding"):
        evaluate(LocalAsker(runtime), plan, Decoding(seed=3), RunFolder(tmp_path))


def test_another_segmenter_is_another_run(runtime, own_split, tmp_path):
    class Everything:
        def segment(self, image, box):
            return np.ones(image.size[::-1], dtype=bool)

    plan = plan_of(own_split, ("mask",), limit=1)
    found = Runtime(runtime.model, runtime.processor, segmenter=Everything())
    results = run(found, plan, tmp_path)
    assert results["finders"] == {"segmenter": Everything.__qualname__}
    other = Runtime(runtime.model, runtime.processor, segmenter="facebook/sam-vit-base")
    with pytest.raises(DataError, match="finders"):
        run(other, plan, tmp_path)
    assert "finders" not in run(found, plan_of(own_split, ("none",), limit=1), tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"splits": ["DocVAQ"]}, PromptError, "DocVAQ.*DocVQA"),
        ({"splits": ["DocVQA"]}, DataError, "DocVQA"),
        ({"splits": ["gone.jsonl"]}, DataError, "gone.jsonl"),
        ({"conditions": ["atuo"]}, PromptError, "unknown perception 'atuo'"),
        ({"image_roots": ["=x"]}, PromptError, "FROM=TO"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(own_split, changes, error, words):
    with pytest.raises(error, match=words):
        plan_of(own_split, **changes)


def test_a_file_without_rows_is_told(own_split):
    own_split.write_text("")
    with pytest.raises(DataError, match="does not show in its first row; name it, as plain:"):
        plan_of(own_split)
    with pytest.raises(DataError, match="has no rows"):
        plan_of(own_split, splits=[f"plain:{own_split}"])


def test_the_table_shows_failures(runtime, own_split, tmp_path):
    (own_split.parent / "3.png").write_bytes(b"torn")
    results = run(runtime, plan_of(own_split, ("none",)), tmp_path / "out")
    assert results["splits"][0]["failures"] == {"image": 1, "row": 0, "run": 0}
    assert results["splits"][0]["n"] == 7
    assert results["splits"][0]["scores"]["contains"]["n"] == 6
    header, line = results_table(results).splitlines()[:2]
    row = dict(zip(header.split()[:5], line.split()[:5], strict=True))
    assert (row["n"], row["failed"]) == ("6", "1")  # n counts scored samples
