"""Phrases for objects, from files of RefCOCO and LVIS, become rows that call for them."""

import json

import pytest
from PIL import Image

from vpt.cli import main
from vpt.data.referring import find_coco, read_phrases
from vpt.errors import DataError

PICTURE = {"id": 7, "width": 200, "height": 100, "file_name": "a.jpg"}
THINGS = [
    {"id": 1, "image_id": 7, "category_id": 1, "bbox": [20, 10, 40.5, 30]},
    {"id": 2, "image_id": 7, "category_id": 2, "bbox": [100, 50, 20, 20]},
    {"id": 3, "image_id": 7, "category_id": 2, "bbox": [150, 50, 20, 20]},
]
CATEGORIES = [{"id": 1, "name": "wine_bucket"}, {"id": 2, "name": "cup"}]
LVIS = {"images": [PICTURE], "annotations": THINGS, "categories": CATEGORIES}
REFS = [{"ann_id": 3, "sentences": [{"sent": "right  cup"}, {"sent": "the last cup"}]}]


def saved(folder, **changes):
    file = folder / "annotations.json"
    file.write_text(json.dumps({**LVIS, **changes}), encoding="utf-8")
    return file


def test_a_category_with_one_object_is_a_phrase(tmp_path):
    (entry,), left_out = read_phrases(saved(tmp_path))
    assert entry == {
        "image": "a.jpg",
        "question": "Where is the wine bucket?",
        "answer": "(100,100),(305,400)",
        "box": [20, 10, 60.5, 40],
        "phrase": "the wine bucket",
    }
    assert left_out == {"a category with several objects in the picture": 2}


def test_expressions_of_refcoco_are_phrases(tmp_path):
    entries, left_out = read_phrases(saved(tmp_path, refs=REFS))
    assert [entry["phrase"] for entry in entries] == ["right cup", "the last cup"]
    assert {tuple(entry["box"]) for entry in entries} == {(150, 50, 170, 70)}
    assert not left_out


def test_a_caption_of_one_object_is_a_phrase(tmp_path):
    pictures = [{**PICTURE, "caption": "left cup"}, {**PICTURE, "id": 8, "caption": "cups"}]
    things = [THINGS[1], {**THINGS[1], "id": 4, "image_id": 8}, {**THINGS[2], "image_id": 8}]
    entries, left_out = read_phrases(saved(tmp_path, images=pictures, annotations=things))
    assert [entry["question"] for entry in entries] == ["Where is left cup?"]
    assert left_out == {"a caption of several objects": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotations": [{**THINGS[0], "bbox": [0, 0, 0, 5]}]}, "a box that is empty"),
        ({"annotations": [{**THINGS[0], "bbox": [190, 0, 50, 5]}]}, "a box that is empty"),
        ({"images": [{**PICTURE, "not_exhaustive_category_ids": [1]}]}, "not exhaustive"),
        ({"annotations": [{**THINGS[0], "iscrowd": 1}]}, "several objects"),
    ],
)
def test_phrases_without_a_sound_box_are_left_out(tmp_path, changes, reason):
    entries, left_out = read_phrases(saved(tmp_path, **changes))
    assert not entries and any(reason in one for one in left_out)


def test_a_reference_to_nothing_is_an_error(tmp_path):
    refs = [{"ann_id": 9, "sentences": []}]
    with pytest.raises(DataError, match="refs name annotation 9, which is none"):
        read_phrases(saved(tmp_path, refs=refs))


def test_only_an_object_with_annotations_is_taken_for_coco(tmp_path):
    assert find_coco(saved(tmp_path))
    file = tmp_path / "notes.jsonl"
    for text in ('{"image": "a"}', '{"image": "a"}\n{"image": "b"}', "[]", "{", ""):
        file.write_text(text, encoding="utf-8")
        assert not find_coco(file)


def test_rows_are_built_and_nothing_is_wrong_with_them(tmp_path, capsys):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg")
    out = tmp_path / "rows.jsonl"
    words = ["--images", tmp_path, "--out", out, "--kinds", "grounding,direct"]
    file = saved(tmp_path, refs=REFS)
    assert not main(["data", "build", *map(str, [file, *words])])
    assert "2 direct, 2 grounding" in capsys.readouterr().err
    row = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
    question, call, result, answer = (message["content"] for message in row["messages"])
    assert question.startswith("<image>\nWhere is right cup? Identify the region")
    assert call == "<|ground_start|>right cup<|ground_end|>"
    assert result == f"<image>{answer}" == "<image>(750,500),(850,700)"
    assert row["images"] == ["a.jpg", "a.jpg_150,37,200,75"]
    assert not main(["data", "check", str(out), "--images", str(tmp_path)])
    assert "nothing found" in "".join(capsys.readouterr())


def test_a_result_without_a_crop_says_that_nothing_was_found(tmp_path, capsys):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg")

    def check(result):
        turns = ["<image>\nWhere is it?", "<|ground_start|>it<|ground_end|>", result, "Nowhere."]
        roles = ["user", "assistant"] * 2
        pairs = zip(roles, turns, strict=True)
        row = {"messages": [{"role": r, "content": c} for r, c in pairs], "images": ["a.jpg"]}
        file = tmp_path / "row.jsonl"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        code = main(["data", "check", str(file), "--images", str(tmp_path)])
        return code, "".join(capsys.readouterr())

    assert check("not found")[0] is None or check("not found")[0] == 0
    code, report = check("nothing")
    assert code == 1 and "call-without-image" in report
