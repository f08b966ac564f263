"""Two runs side by side: what counts as fixed, what is left out, and what is told about it."""

import json
from pathlib import Path

import pytest
from PIL import Image
from test_report import EVIL, Page, failed, make_record, make_results, pictures_of

from vpt.errors import DataError
from vpt.evaluation.compare import compare, compare_folders
from vpt.evaluation.records import Record
from vpt.evaluation.report import write_comparison


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.radial_gradient("L").save(path)
    return str(path)


def runs(photo, scores_a, scores_b, **fields):
    """Records of two runs over samples a, b, c, ...; no record for a score of None."""
    both = []
    for scores in (scores_a, scores_b):
        named = zip("abcdefgh", scores, strict=False)
        both.append([make_record(photo, i, s, **fields) for i, s in named if s is not None])
    return both


def compared(first, second, **more):
    return compare(make_results(first), first, make_results(second, **more), second)


def test_each_pair_has_one_fate(photo):
    comparison = compared(*runs(photo, [0, 1, 1, 0, 0.4], [1, 0, 1, 0, 0.5]))
    (row,) = comparison.splits
    assert (row.fixed, row.broken) == (("a", "e"), ("b",))
    assert (row.both_right, row.both_wrong) == (("c",), ("d",))
    assert row.n == 5 and (row.mean_a, row.mean_b) == (pytest.approx(0.48), pytest.approx(0.5))
    assert row.difference.mean == pytest.approx(0.02)
    assert row.test.name == "sign_flip"
    assert [(s.fate, s.a.id, s.b.id) for s in comparison.changed] == [
        *(("fixed", "a", "a"), ("broken", "b", "b"), ("fixed", "e", "e"))
    ]


def test_the_test_is_exact_for_right_and_wrong(photo):
    (row,) = compared(*runs(photo, [0] * 6, [1] * 6)).splits
    assert (row.test.name, row.test.p_value) == ("mcnemar", 2 / 64)


def test_swapped_runs_swap_what_was_fixed_and_broken(photo):
    first, second = runs(photo, [0, 1, 0.2, 0], [1, 0, 0.9, 0])
    (there,), (back,) = compared(first, second).splits, compared(second, first).splits
    assert (there.fixed, there.broken) == (back.broken, back.fixed)
    assert there.test == back.test
    assert (there.difference.low, there.difference.high) == (
        *(-back.difference.high, -back.difference.low),
    )


def test_missing_and_failed_samples_are_left_out_and_counted(photo):
    first, second = runs(photo, [1, 1, None, 1], [1, None, 1, 0])
    first.append(failed("image", "gone", "e"))
    second.append(failed("image", "gone", "e"))
    second[2] = failed("run", "no room", "d")
    (row,) = compared(first, second).splits
    assert (row.n, row.unpaired) == (1, 4)


def test_samples_of_other_data_are_left_out_and_counted(photo, tmp_path):
    other = tmp_path / "other.png"
    Image.linear_gradient("L").save(other)
    first, second = runs(photo, [1, 1, 1], [1, 1, 1])
    second[1] = make_record(photo, "b", answers=("cat",))
    second[2] = make_record(str(other), "c")
    (row,) = compared(first, second).splits
    assert (row.n, row.unpaired, row.num_changed) == (1, 0, 2)


def test_another_prompt_is_no_other_sample(photo):
    first, second = runs(photo, [1], [1])
    second = [Record(**{**vars(second[0]), "question": "What is this? In one word."})]
    assert compared(first, second).splits[0].n == 1


def test_only_what_both_have_is_compared_and_the_rest_is_told(photo):
    first, second = runs(photo, [1], [1])
    first.append(make_record(photo, "a", condition="none"))
    second.append(make_record(photo, "a", split="views"))
    comparison = compared(first, second)
    assert [(row.split, row.condition) for row in comparison.splits] == [("docs", "auto")]
    assert comparison.left_out == ("docs under none: only in A", "views under auto: only in B")
    assert "not compared: docs under none: only in A" in comparison.table()


def test_other_scores_are_not_compared(photo):
    first, second = runs(photo, [1], [1])
    both = [[*run, make_record(photo, "a", split="views")] for run in (first, second)]
    results_a, results_b = (make_results(run) for run in both)
    results_b["splits"][1]["score"] = "judge"
    comparison = compare(results_a, both[0], results_b, both[1])
    assert comparison.left_out == ("views under auto: scored by acc in A, by judge in B",)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"id": "z"}, "docs under auto: no sample scored in both"),
        ({"id": "a", "split": "views"}, "docs under auto: only in A; views under auto: only in B"),
    ],
)
def test_runs_without_a_common_sample_are_refused(photo, other, words):
    with pytest.raises(DataError, match="no scored sample in common") as caught:
        compared([make_record(photo, "a")], [make_record(photo, **other)])
    assert words in str(caught.value)


def test_empty_runs_are_refused():
    with pytest.raises(DataError, match="neither has any"):
        compared([], [])


def test_settings_that_differ_are_listed(photo):
    first, second = runs(photo, [1], [1])
    changed = {
        "model": {"name": "b-model", "hash": "other", "parameters": 2_000_000},
        "decoding": {"temperature": 0.5, "max_new_tokens": None, "constrain": True},
        **{"git_commit": "e" * 40, "libraries": {"torch": "2.12.0", "numpy": "2.1"}},
        **{"seconds": 99, "judge": {"model": "j"}},
    }
    comparison = compared(first, second, **changed)
    assert set(comparison.settings) == {
        *{("model name", "a-model", "b-model"), ("model hash", "abc123", "other")},
        *{("decoding temperature", "0.0", "0.5"), ("git commit", "f" * 40, "e" * 40)},
        *{("libraries torch", "2.11.0", "2.12.0"), ("libraries numpy", "(not recorded)", "2.1")},
        ("judge model", "(not recorded)", "j"),
    }
    assert compared(first, second).settings == ()


def test_another_version_of_a_split_is_a_setting(photo):
    first, second = runs(photo, [1], [1])
    results = make_results(second)
    results["splits"][0]["version"] = 2
    (setting,) = compare(make_results(first), first, results, second).settings
    assert setting == ("version of docs", "1", "2")


def test_the_table_is_aligned_plain_text(photo):
    first, second = runs(photo, [0, 1, 1], [1, 1, 1])
    lines = compared(first, second, git_commit="e" * 40).table().split("\n")
    head, row = lines[3:5]
    assert lines[:2] == ["A: a-model", "B: a-model"]
    assert head.split()[:7] == ["split", "condition", "score", "n", "A", "B", "B-A"]
    assert row.split()[:7] == ["docs", "auto", "acc", "3", "0.667", "1.000", "+0.333"]
    assert len(head) == len(row)  # the last column ends at the same place
    assert any(line.startswith("git commit") for line in lines)


def test_control_characters_do_not_reach_the_terminal(photo):
    first, second = runs(photo, [1], [1], split="a\x1b[2Jb")
    table = compared(first, second).table()
    assert "\x1b" not in table and "a\\x1b[2Jb" in table


# Folders


def write_run(folder, records, results=None):
    (folder / "records").mkdir(parents=True)
    for record in records:
        file = folder / "records" / f"{record.split}--{record.condition}.jsonl"
        with file.open("a", encoding="utf-8") as stream:
            stream.write(record.to_line())
    content = json.dumps(results or make_results(records))
    (folder / "results.json").write_text(content, encoding="utf-8")


def test_folders_are_compared_and_named(photo, tmp_path):
    first, second = runs(photo, [0, 1], [1, 1])
    write_run(tmp_path / "before", first)
    write_run(tmp_path / "after", second)
    comparison = compare_folders(tmp_path / "before", tmp_path / "after")
    assert comparison.splits[0].fixed == ("a",)
    assert comparison.name_a == f"a-model ({tmp_path / 'before'})"


def test_a_folder_without_results_is_refused(photo, tmp_path):
    write_run(tmp_path / "before", [make_record(photo)])
    with pytest.raises(DataError, match="holds no results"):
        compare_folders(tmp_path / "before", tmp_path / "nothing")


# The page


def test_the_page_shows_both_answers_to_what_changed(photo, tmp_path):
    first, second = runs(photo, [0, 1, 1], [1, 0, 1], region=(1, 1, 2, 2))
    first[0] = Record(**{**vars(first[0]), "prediction": "a whale"})
    comparison = compared(first, second, git_commit="e" * 40)
    path = write_comparison(comparison, tmp_path / "compare.html")
    html = path.read_text(encoding="utf-8")
    parsed = Page(html)
    cards = parsed.all("template", class_="card")
    assert [card["data-fate"] for card in cards] == ["fixed", "broken"]
    assert "a whale" in parsed.text and "e" * 40 in parsed.text
    assert "2 of 2 shown" in parsed.text
    assert len(pictures_of(html)) == 2  # the photo and the crop, whoever looked


def test_the_page_escapes_what_runs_say(photo, tmp_path):
    first, second = runs(photo, [0], [1], split=EVIL, question=EVIL, prediction=EVIL, group=EVIL)
    comparison = compared(first, second, git_commit=EVIL)
    parsed = Page(write_comparison(comparison, tmp_path / "c.html").read_text("utf-8"))
    assert len(parsed.all("script")) == 2 and len(parsed.all("template")) == 1
    assert not [image for image in parsed.all("img") if "src" in image]
    assert EVIL in parsed.text


def test_the_page_of_runs_that_agree_has_no_samples(photo, tmp_path):
    comparison = compared(*runs(photo, [1, 0], [1, 0]))
    parsed = Page(write_comparison(comparison, tmp_path / "c.html").read_text("utf-8"))
    assert parsed.all("template") == []
    assert "No setting differs" in parsed.text and "0 of 0 shown" in parsed.text


def test_a_page_that_cannot_be_written_is_told(photo, tmp_path):
    comparison = compared(*runs(photo, [1], [1]))
    with pytest.raises(DataError, match=r"cannot write .*No such file"):
        write_comparison(comparison, tmp_path / "nowhere" / Path("c.html"))
