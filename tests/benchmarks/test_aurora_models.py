"""The benchmark of small models that write depth maps or boxes reads answers as they are meant."""

import json

import aurora_models
import numpy as np
import pytest
from aurora_pictures import draw_boxes, draw_maps
from drawing import CONTENT, SHAPE, noise
from PIL import Image
from tiny_model import tiny_model

from vpt.data.content_rows import CategoryBoxes, counting_rows
from vpt.depth.tokenizer import DepthTokenizer, load_depth_tokenizer
from vpt.runtime import Answer
from vpt.trace.records import ContentRecord, Trace


def answer(text, boxes=()):
    trace = Trace(question="?", perception="auto", answer=text, turns=[text])
    if boxes:
        trace.content.append(ContentRecord("boxes", 0, 0, 0, 4, True, boxes=[*boxes]))
    return Answer(text, "stop", trace)


def test_answers_are_read_at_their_end():
    assert aurora_models.right_count({"answer": "2"}, answer("1 or so. The answer is 2."))
    assert not aurora_models.right_count({"answer": "2"}, answer(""))
    assert aurora_models.right_depth({"answer": "(B)"}, answer("A 10, B 20. The answer is (B)."))
    assert not aurora_models.right_depth({"answer": "(B)"}, answer("The answer is (A)."))


def test_boxes_are_matched_with_the_true_ones():
    entry = {"boxes": [[0, 0, 10, 10], [50, 50, 90, 90]]}
    written = answer("The answer is 2.", [(0, 0, 10, 9), (200, 200, 220, 220)])
    facts = aurora_models.count_facts([entry], [written])
    assert facts["the answer is the number of written boxes"].startswith("1.000")
    assert facts["true boxes that were written (IoU 0.5)"].startswith("0.500")
    assert facts["written boxes that are true (IoU 0.5)"].startswith("0.500")
    assert facts["F1 of boxes (IoU 0.5)"] == "0.500"
    twice = answer("The answer is 2.", [(0, 0, 10, 10), (0, 0, 10, 9)])  # only one is right
    assert aurora_models.count_facts([entry], [twice])["F1 of boxes (IoU 0.5)"] == "0.500"
    assert set(aurora_models.count_facts([entry], [answer("2")]).values()) == {"-"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a depth tokenizer, and one question for either task."""
    folder = tmp_path_factory.mktemp("aurora")
    model, processor = tiny_model(("clip",), content=CONTENT)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    DepthTokenizer(SHAPE.build(3), SHAPE).save(folder / "tokenizer")
    noise(1).save(folder / "a.png")
    noise(2).convert("L").save(folder / "map.png")
    point = {"letter": "A", "x": 10, "y": 10, "depth": 0.9}
    question = {"question_id": 1, "image": "a.png", "photo": "a.png", "map": "map.png"}
    question |= {"text": "How many stars are in the image?", "boxes": [[0, 0, 9, 9]]}
    question |= {"points": [point, {**point, "letter": "B", "x": 300, "depth": 0.1}]}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    (folder / "answers.jsonl").write_text(json.dumps({"question_id": 1, "text": "1"}))
    return folder


def words_for(folder, task, *more):
    model = folder / "model"
    return [task, "--data", folder, "--model", model, "--direct", model, *more]


@pytest.fixture
def run(monkeypatch):
    def command(words):
        monkeypatch.setattr("sys.argv", ["aurora_models.py", *map(str, words)])
        monkeypatch.setattr(aurora_models, "_MAX_NEW_TOKENS", 8)
        aurora_models.main()

    return command


@pytest.mark.parametrize(
    ("task", "rows"), [("depth", ("asked", "true", "its codes", "written")), ("count", (1, 2))]
)
def test_both_models_are_asked(run, folder, task, rows, tmp_path, capsys):
    file = tmp_path / "look.png"
    more = ("--depth-tokenizer", folder / "tokenizer") if task == "depth" else ()
    run(words_for(folder, task, *more, "--picture", file))
    printed = capsys.readouterr().out
    for name in ("through its own content", "from direct labels", "difference"):
        assert f"| {name} | " in printed
    with Image.open(file) as picture:
        assert len(rows) * 160 < picture.height < (len(rows) + 1) * 160


@pytest.mark.parametrize("task", ["maps", "boxes"])
def test_content_alone_is_asked_for(run, folder, task, capsys):
    run(
        [
            task,
            "--data",
            folder,
            "--model",
            folder / "model",
            "--depth-tokenizer",
            folder / "tokenizer",
        ]
    )
    printed = capsys.readouterr().out
    assert "through its own content" not in printed and "a guess" not in printed
    assert ("wrote a whole map" in printed) == (task == "maps")


def test_the_questions_for_content_are_those_of_the_rows():
    entry = {"text": "How many stars are in the image?", "photo": "b.png", "image": "a.png"}
    (boxes, *_) = counting_rows("", CategoryBoxes("star", ()))
    asked = aurora_models.ask_for_content("boxes", entry)["text"]
    assert boxes["messages"][0]["content"] == f"<image>\n{asked}"
    assert aurora_models.ask_for_content("maps", entry)["image"] == "b.png"


def test_maps_are_drawn_beside_the_true_ones(folder):
    tokenizer = load_depth_tokenizer(folder / "tokenizer")
    entry = {"image": "a.png", "map": "map.png", "answer": "(A)"}
    codes = (0,) * SHAPE.num_cells
    one, other = answer("It is (B)."), answer("")
    one.trace.content.append(ContentRecord("depth", 0, 0, 0, 6, True, codes=codes))
    picture = np.asarray(draw_maps([entry, entry], [one, other], folder, tokenizer))
    with_map, without = (picture[3 * 164 : 3 * 164 + 160, x : x + 160] for x in (92, 256))
    assert not np.array_equal(with_map, without)
    assert (without == without[0, 0]).all()  # it wrote none


def test_boxes_are_drawn_where_they_are(folder):
    entry = {"image": "a.png", "boxes": [[0, 0, 168, 168]], "answer": "1"}
    picture = draw_boxes([entry], [answer("1", [(168, 168, 335, 335)])], folder)
    assert picture.getpixel((92 + 80, 40)) == (0x1F, 0xA3, 0x4A)
    assert picture.getpixel((92 + 80, 164 + 120)) == (0xE0, 0x24, 0x5E)


def test_a_picture_that_cannot_be_made_is_refused_before_the_models_are_asked(
    run, folder, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        run(words_for(folder, "depth", "--picture", tmp_path / "look.png"))
    assert "--picture of depth maps needs --depth-tokenizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(words_for(folder, "count", "--picture", tmp_path / "no" / "look.png"))
    assert "--picture: there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(words_for(folder, "count", "--picture", tmp_path / "look.text"))
    assert "expected a name that ends in .png or .jpg" in capsys.readouterr().err


def test_data_that_are_not_there_are_named(run, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(["depth", "--data", tmp_path, "--model", folder / "model"])
    assert f"--data: there is no {tmp_path / 'questions.jsonl'}" in capsys.readouterr().err
