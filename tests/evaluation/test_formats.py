"""What all formats share: rows one after another, options, boxes, and where images are."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError, PromptError
from vpt.evaluation.formats.rows import (
    ASK_LETTER,
    LETTERS,
    as_text,
    ask_with_options,
    box_around,
    letter_of,
    offer,
    read_box,
    read_rows,
    split_options,
)
from vpt.evaluation.samples import BadRow, ImageRoots, Sample
from vpt.evaluation.splits import guess_format

HERE = Path("/split")


# Images


def test_a_relative_path_is_in_the_folder_of_its_file():
    assert ImageRoots().find("a/b.jpg", HERE) == "/split/a/b.jpg"


def test_an_absolute_path_that_was_not_moved_stays(tmp_path):
    roots = ImageRoots.parse([f"/mnt/datasets={tmp_path}"])
    assert roots.find("/data/b.jpg", HERE) == "/data/b.jpg"
    assert roots.find("/mnt/datasets2/b.jpg", HERE) == "/mnt/datasets2/b.jpg"


def test_the_longest_beginning_wins(tmp_path):
    for name in ("all", "coco", "rel"):
        (tmp_path / name).mkdir()
    options = [f"/d={tmp_path / 'all'}", f"/d/coco/={tmp_path / 'coco'}", f"x={tmp_path / 'rel'}"]
    for order in (options, options[::-1]):
        roots = ImageRoots.parse(order)
        assert roots.find("/d/coco/1.jpg", HERE) == str(tmp_path / "coco" / "1.jpg")
        assert roots.find("/d/gqa/1.jpg", HERE) == str(tmp_path / "all" / "gqa" / "1.jpg")
        assert roots.find("x/1.jpg", HERE) == str(tmp_path / "rel" / "1.jpg")
        assert roots.find("xy/1.jpg", HERE) == "/split/xy/1.jpg"


def test_all_absolute_paths_can_be_moved(tmp_path):
    roots = ImageRoots.parse([f"/={tmp_path}"])
    assert roots.find("/d/1.jpg", HERE) == str(tmp_path / "d" / "1.jpg")
    assert roots.find("d/1.jpg", HERE) == "/split/d/1.jpg"


def test_a_folder_alone_is_for_relative_paths(tmp_path):
    roots = ImageRoots.parse([str(tmp_path)])
    assert roots == ImageRoots(tmp_path)
    assert roots.find("a.jpg", HERE) == str(tmp_path / "a.jpg")


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    (folder := tmp_path / "a=b").mkdir()
    assert ImageRoots.parse([str(folder)]) == ImageRoots(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["=here"], "FROM=TO with something on both sides, got '=here'"),
        (["there="], "FROM=TO with something on both sides, got 'there='"),
        ([""], "something on both sides, got ''"),
        (["/a=/nowhere"], "--images: there is no folder /nowhere"),
        (["nowhere"], "--images: there is no folder nowhere"),
        (["/", "/tmp"], "--images: / and /tmp are both for relative paths; give one"),
        (["/a=/", "/a/=/tmp"], "--images: /a/ is moved twice; give it once"),
    ],
)
def test_malformed_roots_are_refused(options, message):
    with pytest.raises(PromptError, match=message):
        ImageRoots.parse(options)


# Options


def test_options_are_cut_out_of_a_text():
    text = "What is\nit?\n(A) a cat\n (B) (small) dog \n(C) 3\nAnswer with the letter."
    assert split_options(text) == ("What is\nit?", ("a cat", "(small) dog", "3"))


@pytest.mark.parametrize("text", ["Which? (A) is better", "Which?\n(B) two\n(C) three", "(a) x"])
def test_what_only_resembles_options_stays(text):
    assert split_options(text) == (text, ())


def test_options_end_where_the_letters_do():
    assert split_options("Q\n(A) x\n(B) y\n(D) z\n(C) w") == ("Q", ("x", "y"))


_OPTION_TEXT = st.text("abc ()1", min_size=1).map(str.strip).filter(bool)


@given(st.lists(_OPTION_TEXT, min_size=2, max_size=26, unique=True))
def test_what_is_asked_can_be_cut_again(choices):
    sample = Sample("1", (), "Which one?", choices=tuple(choices))
    assert split_options(ask_with_options(sample)) == ("Which one?", tuple(choices))


def test_letters_that_stand_in_the_picture_are_not_listed():
    sample = Sample("1", (), "Which point?", choices=("A", "B", "C"))
    assert ask_with_options(sample) == f"Which point?\n{ASK_LETTER}"


def test_without_options_the_question_is_asked_alone():
    assert ask_with_options(Sample("1", (), "Why?")) == "Why?"


@pytest.mark.parametrize(
    "answer", ["B", "b", "(B)", "B.", " (b): ", "Dog", " dog ", "Ｂ", "（b）", "ＤＯＧ"]
)
def test_an_answer_names_an_option_by_letter_or_text(answer):
    assert letter_of(answer, ("cat", "dog")) == "B"


@pytest.mark.parametrize(
    ("answer", "choices", "message"),
    [
        ("C", ("cat", "dog"), "answer 'C' is none of the choices: cat, dog"),
        ("", ("cat", "dog"), "is none of the choices"),
        ("cow", ("cat", "dog"), "answer 'cow' is none of the choices"),
        ("A", ("b", "a"), "answer 'A' may mean A and B"),
        ("cat", ("cat", "Cat"), "answer 'cat' may mean A and B; write the letter in parentheses"),
    ],
)
def test_an_answer_that_names_no_single_option_is_refused(answer, choices, message):
    with pytest.raises(DataError, match=message):
        letter_of(answer, choices)


def test_a_letter_in_parentheses_is_no_text():
    assert letter_of("(A)", ("b", "a")) == "A"


@pytest.mark.parametrize("number", [0, 1, 27])
def test_too_few_or_too_many_choices_are_refused(number):
    with pytest.raises(DataError, match=f"expected 2 to 26 choices, got {number}"):
        offer(Sample("1", (), "Q"), tuple(map(str, range(number))))
    assert len(offer(Sample("1", (), "Q"), tuple(LETTERS)).choices) == 26


# Boxes


def test_boxes_of_both_orders_are_read():
    assert read_box([1, 2, 3, 4.5]) == (1, 2, 3, 4.5)
    assert read_box((1, 2, 3, 4.5), is_xywh=True) == (1, 2, 4, 6.5)
    assert box_around([(1, 2, 3, 4), (0, 3, 2, 9)]) == (0, 2, 3, 9)


@pytest.mark.parametrize(
    "box", [None, 5, "1234", [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, True], [0, 0, 1, 1e999]]
)
def test_what_is_no_box_is_refused(box):
    with pytest.raises(DataError, match="expected a box to be four numbers x0, y0, x1, y1 in"):
        read_box(box)


@pytest.mark.parametrize(("box", "is_xywh"), [([3, 0, 3, 4], False), ([1, 1, 0, 5], True)])
def test_an_empty_box_is_refused(box, is_xywh):
    with pytest.raises(DataError, match="is empty or reversed"):
        read_box(box, is_xywh=is_xywh)


@pytest.mark.parametrize(("box", "is_xywh"), [([0, 0, 1, 1], False), ([0.5, 0.5, 0.5, 0.5], True)])
def test_a_box_of_fractions_is_refused(box, is_xywh):
    with pytest.raises(DataError, match=r"of 0 to 1, as fractions .* multiply them by the width"):
        read_box(box, is_xywh=is_xywh)


# Rows


def test_every_row_gives_one_thing_in_order():
    def read_row(row, name):
        if "bad" in row:
            raise DataError("it is bad")
        return Sample(name, (), "Q")

    rows = [{}, {"bad": 1}, 7, {"id": "x"}, {"id": "y", "bad": 1}]
    assert list(read_rows(rows, read_row, lambda row: row.get("id", ""))) == [
        Sample("0", (), "Q"),
        BadRow("1", "row 1: it is bad"),
        BadRow("2", "row 2: expected a JSON object, got int"),
        Sample("x", (), "Q"),
        BadRow("y", "row 4: it is bad"),
    ]


@pytest.mark.parametrize(("value", "text"), [(" a b ", "a b"), (3, "3"), (2.5, "2.5")])
def test_texts_and_numbers_are_texts(value, text):
    assert as_text(value, "answer") == text


@pytest.mark.parametrize("value", [None, "", " ", True, [], b"a", "x" * 0])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(DataError, match="expected 'answer' to be a text that is not empty, got"):
        as_text(value, "answer")


def test_half_a_character_is_refused():
    with pytest.raises(DataError, match="half of a surrogate pair"):
        as_text("a\ud800", "question")


# Formats


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"messages": []}]', "released"),
        ('\ufeff\n[\n  {"messages": [], "image": 1}, broken', "released"),
        ('{"question": "q", "image": "a"}\n{"messages": []}', "plain"),
        ('{"question": "q", "image": "a", "mode": "", "family": "", "look": ""}', "embedded"),
        ('{"question_id": 1, "image": "a", "text": "q", "category": ""}', "aurora"),
        ('{"question_id": 1, "image": "a", "text": "q", "label": "A"}', "vstar"),
        ('{"image": "a"}', None),
        ("[]", None),
        ("[[1]]", None),
        ("", None),
        ("question,answer", None),
    ],
)
def test_the_first_row_shows_the_format(tmp_path, content, expected):
    (tmp_path / "f.json").write_text(content, encoding="utf-8")
    assert guess_format(tmp_path / "f.json") == expected


def test_parquet_is_told_by_its_name():
    assert guess_format(Path("x.parquet")) == "plain"


def test_no_format_is_guessed_of_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        guess_format(tmp_path / "none.jsonl")
