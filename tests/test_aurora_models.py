"""The benchmark of small models that write depth maps or boxes reads answers as they are meant."""

import json

import aurora_models
import pytest
from drawing import CONTENT, noise

from vpt.building import tiny_model
from vpt.runtime import Answer
from vpt.trace import ContentRecord, Trace


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
    assert set(aurora_models.count_facts([entry], [answer("2")]).values()) == {"-"}


@pytest.mark.parametrize("task", ["depth", "count"])
def test_both_models_are_asked(task, tmp_path, monkeypatch, capsys):
    model, processor = tiny_model(("clip",), content=CONTENT)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    noise(1).save(tmp_path / "a.png")
    point = {"letter": "A", "x": 10, "y": 10}
    question = {"question_id": 1, "image": "a.png", "text": "?", "boxes": [[0, 0, 9, 9]]}
    question["points"] = [point, {**point, "letter": "B", "x": 300}]
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question_id": 1, "text": "1"}))
    folder = str(tmp_path / "model")
    words = [task, "--data", str(tmp_path), "--model", folder, "--direct", folder]
    monkeypatch.setattr("sys.argv", ["aurora_models.py", *words])
    monkeypatch.setattr(aurora_models, "_MAX_NEW_TOKENS", 8)
    aurora_models.main()
    printed = capsys.readouterr().out
    assert "| through its own content | " in printed and "| from direct labels | " in printed
