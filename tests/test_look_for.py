"""Looking for a phrase: a detector's box becomes the first region.

`tests/detector` was made by ``python -m recipes make-detector``.
"""

import json
import threading
from dataclasses import astuple

import pytest
from colors import ColorDetector
from PIL import Image

import vpt
from vpt.boxes import GridBox, contains, iou, region_to_show
from vpt.branches import GroundingBranch
from vpt.cli import main
from vpt.detector import Detector
from vpt.errors import CheckpointError, PromptError
from vpt.images import load_image
from vpt.inference.request import Request
from vpt.trace.records import Trace

EXAMPLE = "examples/tags.jpg"
QUESTION = "What number is on the blue one?"


@pytest.fixture(scope="module")
def detector():
    return ColorDetector()


@pytest.fixture(scope="module")
def shipped(detector):
    return vpt.load(device="cpu", detector=detector)


def tag(color, box, size=(400, 300)):
    image = Image.new("RGB", size, "white")
    image.paste(color, box)
    return image


@pytest.mark.parametrize("box", [(20, 30, 90, 80), (300, 200, 390, 290), (150, 100, 250, 160)])
def test_the_first_look_shows_what_was_found(shipped, box):
    answer = shipped.ask(tag((0, 0, 255), box), QUESTION, look_for="the blue tag", max_calls=1)
    (call,), (found,) = answer.trace.calls, answer.trace.proposals
    assert found.box_xyxy_px == box and found.score == 0.75
    assert contains(call.box_xyxy_px, box)
    assert call.region == astuple(region_to_show(box, (400, 300)))
    assert answer.trace.settings["look_for"] == "the blue tag"


def test_an_answer_comes_from_the_place_that_was_found(shipped):
    answer = shipped.ask(EXAMPLE, QUESTION, look_for="the blue tag", max_calls=1)
    own = shipped.ask(EXAMPLE, QUESTION)
    assert answer.text == own.text == "3"
    assert iou(answer.trace.calls[0].box_xyxy_px, own.trace.calls[0].box_xyxy_px) > 0.3


def test_without_a_find_the_model_looks_where_it_chooses(shipped):
    answer = shipped.ask(EXAMPLE, QUESTION, look_for="green  thing")
    assert answer.text == "3" and not answer.trace.proposals
    assert answer.warnings == [
        "'green  thing' was not found in image 0: the model looks where it chooses"
    ]


def test_proposals_are_saved_checked_and_absent_without_a_search(shipped, tmp_path):
    answer = shipped.ask(EXAMPLE, QUESTION, look_for="blue", max_calls=1, max_new_tokens=12)
    answer.trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json").proposals == answer.trace.proposals
    content = answer.trace.to_dict()
    content["proposals"][0]["image"] = 7
    with pytest.raises(PromptError, match=r"proposals\[0\] names image 7 of 2"):
        Trace.from_dict(content)
    content["proposals"][0] |= {"image": 0, "box_xyxy_px": [0, 0, 9999, 10]}
    with pytest.raises(PromptError, match=r"proposals\[0\]"):
        Trace.from_dict(content)
    plain = shipped.ask(EXAMPLE, QUESTION, max_new_tokens=12)
    assert "proposals" not in plain.trace.to_dict()


def test_a_phrase_is_looked_for_once_from_any_thread(shipped, detector):
    image = load_image(EXAMPLE)
    detector.asked.clear()

    def ask():
        shipped.ask(image, QUESTION, look_for="one blue tag", max_calls=1, max_new_tokens=12)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert detector.asked == ["one blue tag"]
    shipped.request(image, QUESTION, look_for="one\nblue tag")  # as one line
    assert detector.asked == ["one blue tag"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"look_for": " "}, "look_for must be a phrase such as 'the blue tag'"),
        ({"look_for": 3}, "look_for must be a phrase"),
        ({"look_for": "blue", "region": GridBox(0, 0, 1, 1)}, "both name the first look"),
        ({"look_for": "blue", "perception": "none"}, "look_for needs an image, a call"),
        ({"look_for": "blue", "max_calls": 0}, "max_calls=0"),
        ({"look_for": "a shape"}, "look_for='a shape': no colour in 'a shape'"),
    ],
)
def test_what_cannot_be_looked_for_is_told(shipped, options, words):
    with pytest.raises(PromptError, match=words):
        shipped.ask(EXAMPLE, QUESTION, **options)


def test_without_an_image_there_is_nowhere_to_look():
    with pytest.raises(PromptError, match="look_for needs an image"):
        Request([], "What?", look_for="a cat")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{}/missing", "there is no model folder .*missing; pass a folder that holds config.json"),
        ("{}/missing.pth", "cannot load the detector .*missing.pth: there is no such file"),
        ("{}", "holds no config.json, so it is no model folder"),
        ("vpt/embedded", "vpt/embedded holds a model of type 'qwen2_vl_vpt', no grounding-dino"),
    ],
)
def test_a_detector_that_cannot_be_loaded_is_told(tmp_path, source, words):
    with pytest.raises(CheckpointError, match=words):
        Detector(source.format(tmp_path)).propose(load_image(EXAMPLE), "a cat")


def test_released_weights_name_the_words_that_they_need(tmp_path, monkeypatch):
    file = tmp_path / "swint.pth"
    file.write_bytes(b"")
    monkeypatch.setattr("vpt.detector.TEXT_ENCODER", f"{tmp_path}/bert-base-uncased")
    with pytest.raises(CheckpointError, match=r"cannot load the words of .*swint.pth, those of"):
        Detector(file).propose(load_image(EXAMPLE), "a cat")


def test_the_command_line_says_what_was_found(capsys, monkeypatch, detector, tmp_path):
    load = vpt.load
    monkeypatch.setattr(
        "vpt.loading.load",
        lambda *args, **options: load(*args, **{**options, "detector": detector}),
    )
    words = [EXAMPLE, QUESTION, "--look-for", "the blue tag", "--max-calls", "1", "--device", "cpu"]
    assert not main(["ask", *words, "--trace", str(tmp_path / "trace.json")])
    out, err = capsys.readouterr()
    assert out.strip() == "3"
    assert "found 'the blue tag' in 1 place, the best with a score of 0.75" in err
    assert json.loads((tmp_path / "trace.json").read_text())["proposals"][0]["score"] == 0.75
    assert main(["ask", EXAMPLE, QUESTION, "--look-for", "", "--device", "cpu"]) == 2
    assert "look_for must be a phrase" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture", "question", "phrase", "expected"),
    [
        ("tags", "What number is on the blue one?", "the blue tag", "3"),
        ("patterns", "What pattern is on the pink one?", "the pink board", "rings"),
    ],
)
def test_a_trained_detector_finds_what_the_question_needs(
    shipped, capsys, tmp_path, picture, question, phrase, expected
):
    image = f"examples/{picture}.jpg"
    assert shipped.ask(image, question, perception="none", max_new_tokens=12).text != expected
    words = ["--look-for", phrase, "--detector", "tests/detector", "--device", "cpu"]
    words += ["--max-calls", "1", "--trace", str(tmp_path / "trace.json")]
    assert not main(["ask", image, question, *words])
    assert capsys.readouterr().out.strip() == expected
    trace = Trace.load(tmp_path / "trace.json")
    best, (call,) = trace.proposals[0], trace.calls
    assert contains(call.box_xyxy_px, best.box_xyxy_px) and best.score > 0.5


def test_of_boxes_for_one_thing_the_best_is_kept():
    branch, image = GroundingBranch.from_transformers("tests/detector"), load_image(EXAMPLE)
    proposed = branch.propose(image.pixels, "the blue tag")
    assert len(proposed) > 1
    assert Detector(branch).propose(image, "the blue tag") == proposed[:1]


def test_a_trained_detector_finds_nothing_where_nothing_is():
    detector = Detector("tests/detector")
    for phrase in ("the red tag", "the blue board"):
        assert not detector.propose(load_image(EXAMPLE), phrase)
