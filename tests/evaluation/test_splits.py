"""Splits are found by name or file, read whole, and say how to get what is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpt.data.content_rows import ASK_COUNT_STEPS, ASK_POINT_STEPS
from vpt.errors import DataError, PromptError
from vpt.evaluation.doctor import check_target
from vpt.evaluation.samples import BadRow, ImageRoots, Sample
from vpt.evaluation.scores.table import SCORES
from vpt.evaluation.splits import (
    FORMATS,
    SPLITS,
    ask_as_is,
    ask_for_number,
    find_split,
    is_present,
    read_split,
)

ROOT = Path(__file__).parents[2]
HARDBLINK = Path(os.environ.get("VPT_HARDBLINK") or ROOT.parent / "shared/data/hardblink")
REGION = ("DocVQA", "TextVQA", "TextCap", "DUDE", "GQA", "OI", "VSR")
ACTION = ("CUB_Birds", "Flickr30k", "POPE", "LLaVA_COCO_free", "LLaVA_COCO_single")


def own(number=0, **more):
    return {"image": "a.png", "question": f"Why {number}?", "answer": "So.", **more}


def write(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def released_row():
    messages = [
        {"role": "user", "content": "<image>\nWhy?"},
        {"role": "assistant", "content": "So."},
    ]
    return {"messages": messages, "images": ["a.png"]}


# The table


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_every_split_says_what_it_is(split):
    assert split.name and split.about and split.license and split.how_to_get
    assert split.paper.startswith("https://") or split.name.startswith("embedded_")
    assert split.format in FORMATS and split.score in SCORES
    assert split.version >= 1 and split.max_new_tokens >= 16
    places = (split.file, *split.elsewhere, split.written_to)
    assert not any(Path(place).is_absolute() for place in places)


def test_the_twelve_released_splits_have_their_files():
    judged = [split for split in SPLITS.values() if split.judged]
    assert [split.file for split in judged] == [
        *(f"{name}_region_test.json" for name in REGION),
        *(f"{name}_action_test.json" for name in ACTION),
    ]
    assert {split.format for split in judged} == {"released"}
    assert {split.prompt for split in judged} == {ask_as_is}


def test_no_two_splits_have_a_file_in_common_but_for_steps():
    splits = [split for name, split in SPLITS.items() if not name.endswith("_steps")]
    places = [place for s in splits for place in (s.file, *s.elsewhere)]
    assert len(places) == len(set(places))


def test_splits_are_listed_without_torch():
    code = (
        "import sys, pathlib; from vpt.evaluation.splits import SPLITS, is_present;"
        "[is_present(split, pathlib.Path('x')) for split in SPLITS.values()];"
        "print('torch' in sys.modules, 'datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


def test_prompts_ask_what_the_scores_can_read():
    sample = Sample("1", (), "How many?")
    assert ask_as_is(sample) == "How many?"
    assert ask_for_number(sample) == "How many?\nAnswer with a number."


@pytest.mark.parametrize("name", ["points_2", "points_3", "points_5", "counting"])
def test_models_that_draw_are_asked_as_is_and_for_the_steps(name):
    at_once, in_steps = SPLITS[f"embedded_{name}"], SPLITS[f"embedded_{name}_steps"]
    assert (at_once.file, at_once.score) == (in_steps.file, in_steps.score)
    words = ASK_COUNT_STEPS if name == "counting" else ASK_POINT_STEPS
    sample = Sample("1", (), "How many?")
    assert at_once.prompt(sample) == "How many?"
    assert in_steps.prompt(sample) == f"How many? {words}"


# Finding


def test_a_name_is_found_whatever_the_folder(tmp_path):
    assert find_split("VSR", tmp_path) is SPLITS["VSR"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("docvqa", "unknown split 'docvqa'; did you mean DocVQA.*[?] available: DocVQA, TextVQA"),
        ("hardblink3", "did you mean HardBLINK_3 or "),
        ("zzz", "unknown split 'zzz'; available: DocVQA, .*embedded_counting_steps, or a file"),
        ("xml:mine.jsonl", "unknown format 'xml'; available: released, vstar"),
        ("x:", "unknown format 'x'; available"),
        ("", "unknown split ''"),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(tmp_path, name, message):
    with pytest.raises(PromptError, match=message):
        find_split(name, tmp_path)


@pytest.mark.parametrize("name", ["none.jsonl", "plain:none.jsonl", "far/none", "plain:none"])
def test_a_file_that_is_not_there_is_told(tmp_path, name):
    with pytest.raises(DataError, match="none"):
        find_split(name, tmp_path)


def test_a_file_is_a_split_by_its_first_row(tmp_path, monkeypatch):
    write(tmp_path / "data" / "own.jsonl", own())
    write(tmp_path / "data" / "rows.jsonl", released_row())
    monkeypatch.chdir(tmp_path)
    for place in ("data/own.jsonl", "own.jsonl", str(tmp_path / "data" / "own.jsonl")):
        split = find_split(place, Path("data"))
        assert (split.name, split.format, split.score) == (place, "plain", "contains")
        monkeypatch.chdir("/")
        (sample,) = read_split(split, Path("nowhere"), ImageRoots())
        assert sample.images[0].source == str(tmp_path / "data" / "a.png")
        monkeypatch.chdir(tmp_path)
    assert find_split("rows.jsonl", Path("data")).format == "released"


def test_a_format_can_be_named(tmp_path):
    file = write(tmp_path / "own.jsonl", own(mode="region", family="lines", look="x"))
    assert find_split(f"plain:{file}", tmp_path).format == "plain"
    assert find_split(str(file), tmp_path).format == "embedded"


def test_own_questions_with_choices_are_scored_as_such(tmp_path):
    file = write(tmp_path / "own.jsonl", {"image": 5}, own(choices=["So.", "No."]))
    assert find_split(f"plain:{file}", tmp_path).score == "multiple_choice"


def test_a_format_that_does_not_show_has_to_be_named(tmp_path):
    file = write(tmp_path / "odd.jsonl", {"picture": "a.png"})
    with pytest.raises(
        DataError, match=f"does not show in its first row; name it, as plain:{file}"
    ):
        find_split(str(file), tmp_path)


# Where the data is


def test_missing_data_says_how_to_get_it(tmp_path):
    assert not is_present(SPLITS["DocVQA"], tmp_path)
    message = (
        f"DocVQA is not there: looked for {tmp_path}/DocVQA_region_test.json and "
        f"{tmp_path}/DocVQA_region_test_8cut.json. Download DocVQA_region_test.json from "
        "https://huggingface.co/datasets/rp-yu/VPT_Datasets, and its images from https://www.doc"
    )
    with pytest.raises(DataError, match=message):
        list(read_split(SPLITS["DocVQA"], tmp_path, ImageRoots()))


def test_a_file_may_have_its_other_name(tmp_path):
    (tmp_path / "DocVQA_region_test_8cut.json").write_text(json.dumps([released_row()]))
    assert is_present(SPLITS["DocVQA"], tmp_path)
    (sample,) = read_split(SPLITS["DocVQA"], tmp_path, ImageRoots())
    assert sample.question == "Why?" and SPLITS["DocVQA"].prompt(sample) == "Why?"


def test_what_our_own_command_wrote_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = SPLITS["embedded_heldout"]
    assert not is_present(split, Path("datasets"))
    write(Path("data/embedded/heldout.jsonl"), own(mode="region", family="lines", look="x"))
    for root in ("datasets", "data"):
        (sample,) = read_split(split, Path(root), ImageRoots())
        assert sample.group == "region-lines"
        assert sample.images[0].source == "data/embedded/a.png"


# Reading


def hardblink(folder, *letters):
    rows = [{"question_id": n, "image": f"{n}.png", "text": "Which?"} for n in range(len(letters))]
    write(folder / "hardblink" / "questions.jsonl", *rows)
    answers = [{"question_id": n, "text": f"({letter})"} for n, letter in enumerate(letters)]
    write(folder / "hardblink" / "answers.jsonl", *answers)


def test_the_split_knows_choices_that_the_data_does_not_say(tmp_path):
    hardblink(tmp_path, "A", "D", "C")
    first, second, third = read_split(SPLITS["HardBLINK_3"], tmp_path, ImageRoots())
    assert first.choices == third.choices == ("A", "B", "C") and third.answers == ("C",)
    assert SPLITS["HardBLINK_3"].prompt(first) == "Which?\nAnswer with the letter directly."
    assert second == BadRow("1", "row 1: answer 'D' is none of the choices: A, B, C")
    assert not is_present(SPLITS["HardBLINK_4"], tmp_path)


def test_an_id_that_comes_twice_is_a_bad_row_with_its_own(tmp_path):
    file = write(tmp_path / "own.jsonl", own(0, id="x"), own(1), own(2, id="x"), own(3, id="x"))
    samples = list(read_split(find_split(str(file), tmp_path), tmp_path, ImageRoots()))
    assert [sample.id for sample in samples] == ["x", "1", "x (row 2)", "x (row 3)"]
    assert samples[2].problem == "row 2: has the id x of row 0"


@pytest.mark.skipif(not HARDBLINK.is_dir(), reason="needs HardBLINK, see VPT_HARDBLINK")
def test_hardblink_of_three_points_is_whole():
    split = find_split(f"aurora:{HARDBLINK / 'questions.jsonl'}", Path())
    assert split.score == "exact_match"
    samples = list(read_split(SPLITS["HardBLINK_3"], HARDBLINK.parent, ImageRoots()))
    assert len(samples) == 124 and all(isinstance(sample, Sample) for sample in samples)
    assert {sample.answers for sample in samples} == {("A",), ("B",), ("C",)}
    assert all(Path(image.source).is_file() for sample in samples for image in sample.images)


# What `vpt data check` is given


def test_a_released_split_is_checked_as_rows_with_its_images(tmp_path):
    (tmp_path / "VSR_region_test.json").write_text(json.dumps([released_row()]))
    target = check_target("VSR", tmp_path, [f"/far={tmp_path}"])
    assert target.check is None and target.file == tmp_path / "VSR_region_test.json"
    assert target.find_image("a.png") == str(tmp_path / "a.png")
    assert target.find_image("/far/a.png") == str(tmp_path / "a.png")


def test_a_file_of_rows_has_its_images_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, row in (("rows.json", released_row()), ("broken.json", {"message": 1})):
        write(tmp_path / "sub" / name, row)
        target = check_target(f"sub/{name}", Path("datasets"), [])
        assert target.check is None and target.find_image("a.png") == "a.png"
    target = check_target("sub/rows.json", Path("datasets"), ["sub"])
    assert target.find_image("a.png") == "sub/a.png"
    assert check_target("rows.json", Path("sub"), []).file == Path("sub/rows.json")


@pytest.mark.parametrize("name", ["own.jsonl", "plain:own.jsonl"])
def test_a_file_of_questions_is_checked_by_the_doctor(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.jsonl", own())
    target = check_target(name, Path("datasets"), [])
    assert target.check is not None and "bad-row" in target.findings


def test_a_path_at_which_nothing_is_means_nothing(tmp_path):
    assert check_target("none.json", tmp_path, []) is None
    assert check_target(str(tmp_path / "none"), tmp_path, []) is None


def test_what_can_be_no_target_is_refused(tmp_path):
    with pytest.raises(PromptError, match="did you mean DocVQA"):
        check_target("DocVQ", tmp_path, [])
    with pytest.raises(DataError, match="GQA is not there"):
        check_target("GQA", tmp_path, [])
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        check_target("plain:none.jsonl", tmp_path, [])
    with pytest.raises(PromptError, match="there is no folder /nowhere"):
        check_target("GQA", tmp_path, ["/a=/nowhere"])
