"""Conditions, and records of samples asked under them."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_model import tiny_model

import vpt.evaluation.samples as samples_module
from vpt.boxes import GridBox, contains, crop_box_px
from vpt.branches import Proposal
from vpt.errors import ImageError, PromptError
from vpt.evaluation.runner import (
    TOOL_VALUE,
    Decoding,
    LocalAsker,
    Task,
    Work,
    find_conditions,
    run_tasks,
)
from vpt.evaluation.samples import BadRow, ImageRef, Sample
from vpt.evaluation.scores.table import SCORES
from vpt.inference.conversation import Conversation
from vpt.protocol.tokens import PERCEPTION_MODES
from vpt.runtime import Runtime
from vpt.trace.records import Trace

CONDITIONS = {name: find_conditions([name])[0] for name in (*PERCEPTION_MODES, *TOOL_VALUE)}
WITH_BOX = Sample("1", (), "?", box=(100, 40, 120, 60))


def test_every_mode_of_the_runtime_is_a_condition():
    assert set(PERCEPTION_MODES) <= set(CONDITIONS)
    assert set(TOOL_VALUE) <= set(CONDITIONS)
    for mode in PERCEPTION_MODES:
        assert CONDITIONS[mode].request_options(WITH_BOX, (448, 448), 8) == {"perception": mode}


@pytest.mark.parametrize("name", ["blank", "random"])
def test_a_replaced_look_is_the_models_own_call(name):
    options = CONDITIONS[name].request_options(WITH_BOX, (448, 448), 8)
    assert options == {"perception": "auto", "replace_looks": name}


def test_the_true_region_shows_the_evidence():
    options = CONDITIONS["truth"].request_options(WITH_BOX, (448, 300), 8)
    assert isinstance(options["region"], GridBox)
    assert contains(crop_box_px(options["region"], (448, 300)), WITH_BOX.box)


@pytest.mark.parametrize("box", [None, (500, 400, 600, 500)])
def test_without_evidence_in_the_image_there_is_no_true_region(box):
    assert CONDITIONS["truth"].request_options(Sample("1", (), "?", box=box), (448, 300), 8) is None


def test_a_phrase_is_looked_for_where_a_row_has_one(runtime, samples):
    (condition,) = find_conditions(["phrase"])
    one = dataclasses.replace(samples[0], facts={"look_for": "the red one"})
    assert condition.request_options(one, (448, 300), 8)["look_for"] == "the red one"
    assert condition.request_options(samples[1], (448, 300), 8) is None
    found = Runtime(runtime.model, runtime.processor, detector=Everywhere())
    of_phrase = dataclasses.replace(task(), condition=condition)
    (record,) = run_task(found, of_phrase, [one, samples[1]], DECODING)
    assert record.trace["proposals"][0]["phrase"] == "the red one"
    assert record.trace["calls"][0]["region"] == (1, 1, 2, 2)  # its crop is a cell wider


class Everywhere:
    """Finds anything in the upper left quarter."""

    def propose(self, image, phrase):
        return [Proposal((0, 0, image.width // 2, image.height // 2), 0.5, phrase)]


def test_conditions_are_found_once_each_in_order():
    names = [condition.name for condition in find_conditions(["none", "auto", "none"])]
    assert names == ["none", "auto"]
    older = find_conditions(["region", "crop", "detection"])
    assert [condition.name for condition in older] == ["crop", "dino"]


@pytest.mark.parametrize(
    ("names", "words"), [([], "name at least one"), (["atuo"], "unknown perception 'atuo'; avail")]
)
def test_wrong_names_are_told(names, words):
    with pytest.raises(PromptError, match=words):
        find_conditions(names)


DECODING = Decoding(max_calls=1)


def task(condition="auto", max_new_tokens=6):
    return Task(
        "own", CONDITIONS[condition], lambda s: s.question, SCORES["exact_match"], max_new_tokens
    )


def sample(tmp_path, number, **changes):
    path = tmp_path / f"{number}.png"
    given = {"images": (ImageRef(str(path), path.name),), "question": f"Number {number}?"}
    return Sample(str(number), answers=("x",), **{**given, **changes})


def run_task(runtime, task, samples, decoding, batch_size=8):
    return run_tasks(runtime, [(task, one) for one in samples], decoding, batch_size)


@pytest.fixture
def samples(own_split):
    return [sample(own_split.parent, number) for number in range(5)]


def test_a_record_holds_what_was_asked_and_what_came_of_it(runtime, samples):
    (record,) = run_task(runtime, task(), samples[:1], DECODING)
    answer = runtime.ask(samples[0].images[0].source, "Number 0?", max_new_tokens=6, max_calls=1)
    assert record.prediction == answer.text
    assert record.key == ("own", "auto", "0")
    assert (record.question, record.answers, record.images) == ("Number 0?", ("x",), ("0.png",))
    assert record.error is None
    assert record.scores["exact_match"] == float(answer.text == "x")
    assert isinstance(record.read_trace(), Trace)


def test_batches_change_nothing(runtime, samples):
    def predictions(batch_size):
        records = run_task(runtime, task(), samples, DECODING, batch_size)
        return {record.id: record.prediction for record in records}

    assert predictions(1) == predictions(4)


def test_rows_and_images_that_cannot_be_used_are_counted(runtime, samples, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    mixed = [
        samples[0],
        BadRow("row 1", "no question"),
        sample(tmp_path, "gone"),
        sample(tmp_path, "torn"),
        samples[1],
        BadRow("row 5", "no image"),
    ]
    records = {record.id: record for record in run_task(runtime, task(), mixed, DECODING, 2)}
    assert list(records) != [] and set(records) == {"0", "row 1", "gone", "torn", "1", "row 5"}
    kinds = {i: record.error and record.error["kind"] for i, record in records.items()}
    assert kinds == {
        "0": None, "1": None, "row 1": "row", "row 5": "row", "gone": "image", "torn": "image"
    }  # fmt: skip
    assert "does not exist" in records["gone"].error["message"]
    assert not records["gone"].scores and records["gone"].question == "Number gone?"


def test_a_run_that_fails_does_not_take_others_with_it(runtime, samples):
    def prompt(sample):
        return "" if sample.id in "13" else sample.question

    failing = dataclasses.replace(task(), prompt=prompt)
    records = {r.id: r for r in run_task(runtime, failing, samples, DECODING, batch_size=2)}
    assert {i for i, record in records.items() if record.error} == {"1", "3"}
    assert len(records) == 5
    assert records["1"].error["kind"] == "run" and "question" in records["1"].error["message"]


@pytest.mark.parametrize("where", ["prompt", "score", "run"])
def test_any_exception_of_one_sample_is_its_failed_record(runtime, samples, monkeypatch, where):
    def fails_for_2(function):
        def failing(*args):
            if any(getattr(arg, "id", None) == "2" for arg in args):
                raise KeyError("ours")
            return function(*args)

        return failing

    asked = task()
    if where == "prompt":
        asked = dataclasses.replace(asked, prompt=fails_for_2(asked.prompt))
    elif where == "score":
        score = dataclasses.replace(asked.score, per_sample=fails_for_2(asked.score.per_sample))
        asked = dataclasses.replace(asked, score=score)
    else:
        whole = Conversation._source

        def source(conversation):
            if conversation.request.question == "Number 2?":
                raise KeyError("ours")
            return whole(conversation)

        monkeypatch.setattr(Conversation, "_source", source)
    records = {r.id: r for r in run_task(runtime, asked, samples, DECODING, batch_size=3)}
    assert {i for i, record in records.items() if record.error} == {"2"}
    assert len(records) == 5
    error = {"kind": "run", "message": "the run failed with KeyError: 'ours'"}
    assert records["2"].error == error


@pytest.mark.parametrize(
    "wrong", [{"max_calls": "8"}, {"seed": 2**64}, {"max_new_tokens": 0}, {"constrain": 1}]
)
def test_decoding_that_cannot_be_is_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(PromptError, match=f"^{name} must be"):
        Decoding(**wrong)
    assert json.dumps(dataclasses.asdict(Decoding(max_calls=np.int64(3), top_p=np.float32(1))))


def test_a_row_whose_answer_cannot_be_scored_is_told(runtime, samples):
    asked = dataclasses.replace(task(), score=SCORES["yes_no"])
    (record,) = run_task(runtime, asked, samples[:1], DECODING)
    assert record.error["kind"] == "row" and "yes" in record.error["message"]
    assert not record.scores


def test_without_evidence_there_is_no_true_region_and_no_record(runtime, samples):
    with_box = dataclasses.replace(samples[0], box=(8, 8, 40, 30))
    records = list(run_task(runtime, task("truth", 20), [with_box, samples[1]], DECODING))
    assert [record.id for record in records] == ["0"]
    assert records[0].trace["calls"][0]["branch"] == "crop"
    assert records[0].scores["region_shown"] == 1.0


def test_decoding_reaches_the_model(runtime, samples):
    decoding = Decoding(max_new_tokens=3, temperature=1.5, seed=1)
    (record,) = run_task(runtime, task(), samples[:1], decoding)
    settings = record.trace["settings"]
    assert (settings["max_new_tokens"], settings["temperature"]) == (3, 1.5)
    (other,) = run_task(runtime, task(), samples[:1], dataclasses.replace(decoding, seed=2))
    assert other.trace["settings"]["seed"] != settings["seed"]


def test_what_a_model_cannot_do_is_told_before_anything_is_asked(runtime):
    LocalAsker(runtime).check([one for name, one in CONDITIONS.items() if name != "grounding"])
    for name, lacks in (("phrase", "detector"), ("mask", "segmenter"), ("grounding", "detector")):
        with pytest.raises(PromptError, match=f"needs (its tokens and )?a {lacks}"):
            LocalAsker(runtime).check(find_conditions([name]))
    asker = LocalAsker(Runtime(*tiny_model(("clip",))))
    asker.check([CONDITIONS["auto"], CONDITIONS["truth"], CONDITIONS["clip"]])
    with pytest.raises(PromptError, match="this model cannot do perception='sam'"):
        asker.check([CONDITIONS["sam"]])


def test_all_conditions_of_a_sample_follow_each_other_and_share_its_prompt(runtime, samples):
    work = [Work(task(name), tuple(samples[:2])) for name in ("none", "auto")]
    store = runtime.engine.prefixes
    before = store.num_reused
    records = list(LocalAsker(runtime).ask(work, DECODING, batch_size=2))
    keys = [(record.id, record.condition) for record in records]
    assert sorted(keys[:2]) == [("0", "auto"), ("0", "none")]
    assert sorted(keys[2:]) == [("1", "auto"), ("1", "none")]
    assert store.num_reused > before


def test_the_image_of_a_sample_is_opened_once_for_all_conditions(runtime, samples, monkeypatch):
    opened = []
    load = samples_module.load_image
    monkeypatch.setattr(
        samples_module, "load_image", lambda path: opened.append(path) or load(path)
    )
    work = [Work(task(name), tuple(samples)) for name in ("none", "auto")]
    records = list(LocalAsker(runtime).ask(work, DECODING, batch_size=2))
    assert len(records) == 10 and not any(record.error for record in records)
    assert opened == [one.images[0].source for one in samples]


def test_a_sample_may_be_about_a_part_of_its_image(samples):
    image = dataclasses.replace(samples[0].images[0], crop=(10, 20, 40, 60))
    assert image.open().size_wh == (30, 40)
    with pytest.raises(ImageError, match="does not exist"):
        ImageRef("none.png", "none.png").open()
