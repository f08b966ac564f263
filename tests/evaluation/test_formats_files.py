"""Aurora's, V*Bench's, one's own and the embedded model's files become samples."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.embedded.make import question_entries
from recipes.embedded.scenes import draw_scene
from vpt.errors import DataError
from vpt.evaluation.formats.benchmarks import read_aurora, read_vstar
from vpt.evaluation.formats.own import read_embedded, read_plain
from vpt.evaluation.formats.rows import ask_with_options, read_rows
from vpt.evaluation.samples import BadRow, ImageRef, ImageRoots, Sample

HARDBLINK = Path(
    os.environ.get("VPT_HARDBLINK") or Path(__file__).parents[3] / "shared/data/hardblink"
)
TEXT = (
    "What is the material of the glove?\n(A) rubber\n(B) cotton\n"
    "Answer with the option's letter from the given choices directly."
)


def write(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def problems(samples):
    return {s.id: s.problem for s in samples if isinstance(s, BadRow)}


# Aurora


def question(number, image="0.png", **more):
    return {"question_id": number, "image": image, "text": "Which point?", **more}


def test_questions_get_their_answers_and_images(tmp_path):
    (tmp_path / "images").mkdir()
    file = write(tmp_path / "questions.jsonl", question(1, category="count"), question("x"))
    write(
        tmp_path / "answers.jsonl",
        {"question_id": "x", "text": 7},
        {"question_id": 1, "text": "(C)", "category": "count"},
    )
    path = str(tmp_path / "images" / "0.png")
    assert list(read_aurora(file, ImageRoots())) == [
        Sample("1", (ImageRef(path, path),), "Which point?", ("C",), group="count"),
        Sample("x", (ImageRef(path, path),), "Which point?", ("7",)),
    ]


@pytest.mark.parametrize("kind", ["", "_long"])
def test_the_layout_of_hardblink_is_understood(tmp_path, kind):
    file = write(tmp_path / "questions" / f"blink_4pointscenter_questions{kind}.jsonl", question(1))
    write(tmp_path / "answers" / "blink_4pointscenter_answers.jsonl", question(1) | {"text": "(D)"})
    (tmp_path / "images" / "blink4pointscenter").mkdir(parents=True)
    (sample,) = read_aurora(file, ImageRoots())
    assert sample.answers == ("D",)
    assert sample.images[0].source == str(tmp_path / "images" / "blink4pointscenter" / "0.png")


def test_images_may_lie_beside_the_questions(tmp_path):
    file = write(tmp_path / "questions.jsonl", question(1))
    write(tmp_path / "answers.jsonl", question(1))
    (sample,) = read_aurora(file, ImageRoots())
    assert sample.images[0].source == str(tmp_path / "0.png")


def test_questions_and_answers_that_do_not_fit_are_bad_rows(tmp_path):
    file = write(
        tmp_path / "questions.jsonl",
        question(1),
        question(2),
        {"image": "0.png", "text": "?", "question_id": []},
        question(3) | {"text": ""},
        question(4) | {"image": None},
        "hello",
    )
    answers = [(2, "A"), (2, "B"), (3, "A"), (4, "A"), (9, "A")]
    write(tmp_path / "answers.jsonl", *({"question_id": i, "text": t} for i, t in answers))
    samples = list(read_aurora(file, ImageRoots()))
    assert [(s.id, s.problem) for s in samples] == [
        ("1", "row 0: question 1 has no answer"),
        ("2", "row 1: question 2 has 2 answers: A, B; keep one"),
        ("2", "row 2: expected 'question_id' to be a text that is not empty, got []"),
        ("3", "row 3: expected 'text' to be a text that is not empty, got ''"),
        ("4", "row 4: expected 'image', there is none"),
        ("5", "row 5: expected a JSON object, got str"),
        ("answer 9", "there is an answer, but no question 9"),
    ]


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("asked.jsonl", None, "does not tell where its answers are; expected a name such as"),
        ("questions.jsonl", None, "has no answers; expected them in .*/answers.jsonl"),
        (
            "questions/x_questions_long.jsonl",
            None,
            "questions/x_answers_long.jsonl or .*/answers/x",
        ),
        ("questions.jsonl", 5, "answers.jsonl, row 0: expected a JSON object, got int"),
        ("questions.jsonl", {"text": "A"}, "row 0: expected 'question_id', there is none"),
        ("questions.jsonl", {"question_id": 1}, "row 0: expected 'text' to be a text"),
    ],
)
def test_files_of_answers_that_are_missing_or_broken_are_told(tmp_path, name, answers, message):
    file = write(tmp_path / name, question(1))
    if answers is not None:
        write(tmp_path / "answers.jsonl", answers)
    with pytest.raises(DataError, match=message):
        list(read_aurora(file, ImageRoots()))


@pytest.mark.skipif(not HARDBLINK.is_dir(), reason="needs HardBLINK, see VPT_HARDBLINK")
def test_hardblink_is_read_whole():
    samples = list(read_aurora(HARDBLINK / "questions.jsonl", ImageRoots()))
    assert len(samples) == 124 and {s.answers for s in samples} == {("A",), ("B",), ("C",)}
    assert samples[0].images[0].open().size_wh == (336, 336)


# V*Bench


def star(number=0, **more):
    return {
        "image": "direct_attributes/sa_1.jpg",
        "text": TEXT,
        "category": "direct_attributes",
        "label": "A",
        "question_id": number,
        **more,
    }


def test_a_star_question_is_asked_in_its_own_words(tmp_path):
    file = write(tmp_path / "test_questions.jsonl", star())
    (sample,) = read_vstar(file, ImageRoots())
    path = str(tmp_path / "direct_attributes" / "sa_1.jpg")
    assert sample == Sample(
        "direct_attributes/0",
        (ImageRef(path, path),),
        "What is the material of the glove?",
        ("A",),
        ("rubber", "cotton"),
        group="direct_attributes",
        facts={"asked": TEXT},
    )
    assert ask_with_options(sample) == TEXT


def test_the_file_beside_the_image_says_where_to_look(tmp_path):
    file = write(tmp_path / "test_questions.jsonl", star())
    where = {"target_object": ["glove", "hand"], "bbox": [[10, 20, 30, 40], [0, 50, 5, 60]]}
    write(tmp_path / "direct_attributes" / "sa_1.json", where)
    (sample,) = read_vstar(file, ImageRoots())
    assert sample.box == (0, 20, 40, 110)
    assert sample.facts["targets"] == ("glove", "hand")
    assert sample.facts["boxes"] == ((10, 20, 40, 60), (0, 50, 5, 110))


@pytest.mark.parametrize(
    "content", [[], {}, {"bbox": []}, {"bbox": [], "target_object": []}, {"bbox": [[1, 2, 0, 4]]}]
)
def test_a_broken_file_beside_the_image_spoils_nothing(tmp_path, content):
    file = write(tmp_path / "test_questions.jsonl", star())
    write(tmp_path / "direct_attributes" / "sa_1.json", content)
    (sample,) = read_vstar(file, ImageRoots())
    assert sample.box is None
    assert sample.facts["problem"].startswith("sa_1.json does not say where to look: ")


def test_star_rows_that_make_no_sense_are_bad(tmp_path):
    file = write(
        tmp_path / "test_questions.jsonl",
        star(0, text="Which?"),
        star(1, label="C"),
        star(2, label=None),
        star(3, image=""),
        star(4, text="(A) x\n(B) y"),
        star(5, category=[]),
        star(None),
    )
    samples = list(read_vstar(file, ImageRoots()))
    assert samples[-1].id == "6"
    name = "direct_attributes/"
    assert problems(samples) == {
        f"{name}0": "row 0: expected 'text' to be a question with options (A), (B), ... below it",
        f"{name}1": "row 1: answer 'C' is none of the choices: rubber, cotton",
        f"{name}2": "row 2: expected 'label', there is none",
        f"{name}3": "row 3: expected 'image' to be a text that is not empty, got ''",
        f"{name}4": "row 4: expected 'text' to be a question with options (A), (B), ... below it",
        "5": "row 5: expected 'category' to be a text that is not empty, got []",
    }


# One's own


def own(**more):
    return {"image": "a.png", "question": "Why?", "answer": "So.", **more}


def test_own_rows_become_samples(tmp_path):
    rows = [
        own(),
        own(id="x", answer=None, answers=["So.", 3], box=[1, 2, 3, 4.5], family="f", source="me"),
        own(id=7, choices=["yes", "no"], answer="no", group="g", family="f"),
        own(image=None, images=["a.png", "/b.png"]),
    ]
    first, second, third, fourth = read_plain(write(tmp_path / "own.jsonl", *rows), ImageRoots())
    path = str(tmp_path / "a.png")
    assert first == Sample("0", (ImageRef(path, path),), "Why?", ("So.",))
    assert (second.id, second.answers, second.box) == ("x", ("So.", "3"), (1, 2, 3, 4.5))
    assert second.group == "f" and second.facts == {"family": "f", "source": "me"}
    assert (third.id, third.choices, third.answers) == ("7", ("yes", "no"), ("B",))
    assert third.group == "g"
    assert [image.source for image in fourth.images] == [path, "/b.png"]


def test_a_list_and_lines_are_the_same(tmp_path):
    rows = [own(), own(question=5)]
    lines = write(tmp_path / "own.jsonl", *rows)
    (tmp_path / "own.json").write_text(json.dumps(rows), encoding="utf-8")
    samples = list(read_plain(lines, ImageRoots()))
    assert list(read_plain(tmp_path / "own.json", ImageRoots())) == samples
    assert samples[1].question == "5"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("x", "expected a JSON object, got str"),
        (own(question=None), "expected 'question', there is none"),
        (own(image=None), "expected 'image', there is none"),
        (own(image=""), "expected an image to be a path, or in Parquet bytes"),
        (own(image=5), "expected an image to be a path, or in Parquet bytes or .*, got int"),
        (own(image={"path": None, "bytes": None}), "expected an image to be a path, .* got dict"),
        (own(images=["a"]), "there are both 'image' and 'images'; keep one"),
        (own(image=None, images="a.png"), "expected 'images' to be a list that is not empty"),
        (own(answer=None), "expected 'answer', there is none"),
        (own(answer=["a"]), "expected 'answer' to be a text that is not empty"),
        (own(answers=["a"]), "there are both 'answer' and 'answers'; keep one"),
        (own(answer=None, answers=[]), "expected 'answers' to be a list that is not"),
        (own(answer=None, answers=["a", None]), "expected 'answer' to be a text that is not empty"),
        (own(box=[1, 2]), "expected a box to be four numbers"),
        (own(box=[5, 0, 1, 1]), "is empty or reversed"),
        (own(choices=["one"]), "expected 2 to 26 choices, got 1"),
        (own(choices=["one", "two"]), "answer 'So.' is none of the choices: one, two"),
        (own(choices="AB"), "expected 'choices' to be a list"),
        (own(group=[1]), "expected 'group' to be a text"),
        (own(id={}), "expected 'id' to be a text"),
    ],
)  # fmt: skip
def test_an_own_row_that_makes_no_sense_is_bad(tmp_path, row, problem):
    first, bad, last = read_plain(write(tmp_path / "own.jsonl", own(), row, own()), ImageRoots())
    assert (first.id, bad.id, last.id) == ("0", "1", "2")
    with pytest.raises(DataError, match=f"^row 1: .*{problem}"):
        raise DataError(bad.problem)


def test_gaps_that_pandas_fills_are_gaps_again(tmp_path):
    rows = [
        own(answer=3.0, id=1.0, group=2.0),
        own(answer=float("nan"), id=2.0),
        own(answer=float("nan"), answers=[3.0, 2.5], id=float("nan"), box=float("nan")),
        own(answer=4.0, choices=[3.0, 4.0], group=float("nan"), note=5.0),
        own(answer=float("inf")),
    ]
    first, missing, several, chosen, endless = read_plain(
        write(tmp_path / "own.jsonl", *rows), ImageRoots()
    )
    assert (first.id, first.answers, first.group) == ("1", ("3",), "2")
    assert missing == BadRow("2", "row 1: expected 'answer', there is none")
    assert (several.id, several.answers, several.box) == ("2", ("3", "2.5"), None)
    assert (chosen.choices, chosen.answers, chosen.group) == (("3", "4"), ("B",), "")
    assert chosen.facts == {"note": 5}
    assert endless.problem == "row 4: expected 'answer' to be a text that is not empty, got inf"


def test_gaps_in_parquet_are_no_answers(tmp_path):
    pytest.importorskip("datasets")
    columns = {"image": ["a.png"] * 3, "question": ["How many?"] * 3, "answer": [3.0, None, 3.0]}
    first, missing, last = read_plain(
        write_parquet(tmp_path / "own.parquet", columns), ImageRoots()
    )
    assert first.answers == last.answers == ("3",)
    assert missing == BadRow("1", "row 1: expected 'answer', there is none")


def test_gaps_that_pandas_fills_are_gaps_in_answers_of_aurora(tmp_path):
    file = write(tmp_path / "questions.jsonl", question(1.0, category=float("nan")), question(2))
    write(tmp_path / "answers.jsonl", question(1) | {"text": 7.0}, question(2.0) | {"text": 8})
    first, second = read_aurora(file, ImageRoots())
    assert (first.id, first.answers, first.group) == ("1", ("7",), "")
    assert (second.id, second.answers) == ("2", ("8",))


def test_a_row_nested_too_deeply_is_bad_and_the_others_are_read():
    deep = []
    for _ in range(3000):
        deep = [deep]
    rows = [{"id": 1}, {"id": 2, "note": deep}, {"id": 3.0}]
    read = list(read_rows(rows, lambda row, name: row["id"]))
    assert read == [1, BadRow("1", "row 1: its lists or objects are nested too deeply"), 3]


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 5)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), file)
    return file


def test_parquet_rows_keep_their_images_undecoded(tmp_path):
    pytest.importorskip("datasets")
    columns = {
        "image": [{"bytes": png(), "path": None}, {"bytes": None, "path": "x.png"}, None],
        "question": ["a", "b", "c"],
        "answers": [["1"], ["2", "3"], ["4"]],
        "box": [[0.0, 0.0, 1.0, 2.0], None, None],
    }
    file = write_parquet(tmp_path / "own.parquet", columns)
    first, second, third = read_plain(file, ImageRoots())
    assert first.images == (ImageRef(png(), "image of 0"),) and first.box == (0, 0, 1, 2)
    assert first.images[0].open().size_wh == (4, 5)
    assert second.images[0].source == str(tmp_path / "x.png") and second.box is None
    assert second.answers == ("2", "3")
    assert third == BadRow("2", "row 2: expected 'image', there is none")


def test_parquet_columns_of_hub_images_and_of_bytes_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["a"], "answer": ["b"]}
    images = [{"bytes": b"torn", "path": "t.png"}]
    features = {"image": datasets.Image(), **{key: datasets.Value("string") for key in rows}}
    file = tmp_path / "hub.parquet"
    data = datasets.Dataset.from_dict(rows | {"image": images}, datasets.Features(features))
    data.to_parquet(str(file))
    (sample,) = read_plain(file, ImageRoots())
    assert sample.images == (ImageRef(b"torn", "t.png"),)
    (sample,) = read_plain(
        write_parquet(tmp_path / "b.parquet", rows | {"image": [b"x"]}), ImageRoots()
    )
    assert sample.images == (ImageRef(b"x", "image of 0"),)


def test_what_is_wrong_with_parquet_is_told(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (broken := tmp_path / "broken.parquet").write_bytes(b"nope")
    with pytest.raises(DataError, match=r"broken\.parquet is no whole Parquet file: "):
        list(read_plain(broken, ImageRoots()))
    with pytest.raises(DataError, match=r"none\.parquet does not exist; check the path"):
        list(read_plain(tmp_path / "none.parquet", ImageRoots()))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(DataError, match=r'datasets library is needed: pip install -e "\.\[eval\]"'):
        list(read_plain(broken, ImageRoots()))


# The embedded model's


def test_heldout_questions_are_grouped_by_look_and_family(tmp_path):
    rng = np.random.default_rng(5)
    scene = draw_scene(rng, "heldout")
    entries = list(question_entries(scene, "heldout/000000.jpg", rng))
    samples = list(read_embedded(write(tmp_path / "heldout.jsonl", *entries), ImageRoots()))
    assert len(samples) == len(entries) > 1
    for entry, sample in zip(entries, samples, strict=True):
        assert sample.group == f"{entry['mode']}-{entry['family']}"
        known = ("mode", "family", "look", "look_for")
        assert sample.facts == {key: entry[key] for key in known if key in entry}
        assert sample.answers == (entry["answer"],)
        assert sample.box == (tuple(entry["box"]) if "box" in entry else None)
        assert sample.images[0].source == str(tmp_path / "heldout" / "000000.jpg")


def test_heldout_rows_without_mode_are_bad(tmp_path):
    file = write(tmp_path / "heldout.jsonl", own(family="lines"), own(question=""))
    first, second = read_embedded(file, ImageRoots())
    assert first == BadRow("0", "row 0: expected 'mode' and 'family', got [None, 'lines']")
    assert second.problem.startswith("row 1: expected 'question' to be a text")
