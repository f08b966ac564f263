"""A whole evaluation of a model that draws before it answers."""

import json
import re

import pytest
from drawing import SHAPE, eager_model, noise

from vpt.depth.tokenizer import DepthTokenizer
from vpt.errors import DataError
from vpt.evaluation.evaluate import evaluate, make_plan
from vpt.evaluation.records import RunFolder, read_records
from vpt.evaluation.runner import Decoding, LocalAsker
from vpt.runtime import Runtime

NUM_SAMPLES = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """HardBLINK's layout, with the points of each question."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "hardblink"
    (folder / "images").mkdir(parents=True)
    points = [{"letter": letter, "x": 50 + 90 * n, "y": 160} for n, letter in enumerate("ABC")]
    questions, answers = [], []
    for number in range(NUM_SAMPLES):
        noise(number).save(folder / "images" / f"{number}.png")
        row = {"question_id": number, "image": f"{number}.png", "text": "What?", "points": points}
        questions.append(row)
        answers.append({"question_id": number, "text": "(B)"})
    for name, rows in (("questions", questions), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def runtime():
    return Runtime(
        *eager_model(), name="eager", depth_tokenizer=DepthTokenizer(SHAPE.build(3), SHAPE)
    )


def test_records_keep_what_was_drawn_and_the_report_shows_it(runtime, data, tmp_path):
    plan = make_plan(splits=["HardBLINK_3"], conditions=["auto", "none"], data=data)
    folder = RunFolder(tmp_path / "out")
    results = evaluate(LocalAsker(runtime), plan, Decoding(max_new_tokens=40), folder)
    assert [entry["n"] for entry in results["splits"]] == [NUM_SAMPLES] * 2
    auto, none = (
        [*read_records(folder.records("HardBLINK_3", name).path)] for name in ("auto", "none")
    )
    drawn = [one for record in auto for one in record.trace["content"]]
    assert {one["kind"] for one in drawn} == {"depth", "boxes"}
    assert any(one["picture"] for one in drawn)
    assert not any(record.trace["content"] for record in none)
    assert not any("<DEPTH" in record.prediction + record.prediction for record in auto)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "depth map of 4 codes, written by the model" in page
    assert 'far <span class="ramp"></span> near' in page and '<rect class="box"' in page
    assert "<dt>Wrote</dt>" in page
    assert re.search(r"b1(?: to b\d+)?: written by the model", page)


def test_another_depth_tokenizer_is_another_model(runtime, data, tmp_path):
    plan = make_plan(splits=["HardBLINK_3"], conditions=["none"], data=data)
    folder = RunFolder(tmp_path / "out")
    evaluate(LocalAsker(runtime), plan, Decoding(max_new_tokens=2), folder)
    other = Runtime(
        runtime.model,
        runtime.processor,
        name="eager",
        depth_tokenizer=DepthTokenizer(SHAPE.build(4), SHAPE),
    )
    with pytest.raises(DataError, match=r"holds a run with model .*depth_tokenizer"):
        evaluate(LocalAsker(other), plan, Decoding(max_new_tokens=2), folder)
