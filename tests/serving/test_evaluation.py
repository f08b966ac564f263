"""The evaluation asks a server, and has the records that the same model gives in process."""

import json
import re
import subprocess
import sys

import pytest
from served import EXAMPLES, QUESTIONS, serving

from vpt.errors import PromptError, ServiceError
from vpt.evaluation.evaluate import evaluate, make_plan
from vpt.evaluation.records import RunFolder
from vpt.evaluation.remote import RemoteAsker, add_call
from vpt.evaluation.runner import Decoding, LocalAsker, find_conditions
from vpt.trace.records import Trace

CONDITIONS = ("auto", "none", "blank", "truth", "dino")
FIELDS = ("branch", "image", "region", "box_xyxy_px", "result_image", "num_tokens", "outcome")


@pytest.fixture
def split(tmp_path):
    """A file with the example questions; every other one has evidence."""
    lines = []
    for number, one in enumerate(QUESTIONS):
        line = {"image": str(EXAMPLES / one["picture"]), "question": one["question"]}
        line |= {"answer": one["answer"], "id": f"q{number}"}
        lines.append({**line, "box": [120, 60, 200, 200]} if number % 2 else line)
    lines.append({"image": "missing.jpg", "question": "?", "answer": "x"})
    file = tmp_path / "split.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def plan_of(split, conditions=CONDITIONS, **options):
    return make_plan(splits=[str(split)], conditions=conditions, data=split.parent, **options)


def comparable(folder):
    """What records in process and over a server share."""
    found = {}
    for record in RunFolder(folder).read_all():
        trace = record.trace or {"calls": [], "stop_reason": ""}
        calls = [[call[name] for name in FIELDS] for call in trace["calls"]]
        if record.trace:
            record.read_trace()  # it can be drawn
        kind = record.error and record.error["kind"]
        what = (record.prediction, record.scores, kind, trace["stop_reason"], calls)
        found[record.key] = json.loads(json.dumps(what))
    return found


def test_a_server_gives_the_records_of_the_model_in_process(embedded, url, split, tmp_path):
    decoding = Decoding(max_new_tokens=24, temperature=0.7, seed=3)
    here = evaluate(LocalAsker(embedded), plan_of(split), decoding, RunFolder(tmp_path / "here"))
    asker, folder = RemoteAsker(url), RunFolder(tmp_path / "there")
    there = evaluate(asker, plan_of(split), decoding, folder, batch_size=3)
    assert len(comparable(tmp_path / "here")) > 30
    assert comparable(tmp_path / "there") == comparable(tmp_path / "here")
    assert there["model"] == {"name": embedded.name, "server": f"{url}/v1"}
    for mine, theirs in zip(there["splits"], here["splits"], strict=True):
        for key in ("n", "not_asked", "failures", "scores", "called"):
            assert mine[key] == theirs[key], key
    assert there["tokens"]["generated"] == here["tokens"]["generated"]
    assert (tmp_path / "there" / "report.html").stat().st_size > 1000


@pytest.mark.slow
def test_the_command_asks_a_server_without_torch(run, url, split, tmp_path):
    out = tmp_path / "out"
    words = ["eval", "--model", url, "--splits", str(split), "--limit", "2", "--out", str(out)]
    code = f"import sys; from vpt.cli import main; c = main({words!r}); "
    code += "print(c, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["0", "False"], done.stderr
    assert {r.prediction for r in RunFolder(out).read_all()} == {"3", "rising"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cpu"), r"--device is for models in this process; give it to `vpt serve`"),
        (("--workers", "2"), r"--workers is for models in this process"),
        (("--model", "ftp://a/v1"), r"'ftp://a/v1' is not a server; expected http://HOST:PORT/v1"),
    ],
)
def test_options_of_loading_are_refused_with_a_server(run, split, words, message):
    code, _, err = run("eval", "--model", "http://127.0.0.1:1/v1", "--splits", split, *words)
    assert code == 2 and re.search(message, err)


def test_a_server_that_is_down_ends_the_run(split, tmp_path, monkeypatch):
    monkeypatch.setattr("vpt.evaluation.remote._MAX_RETRIES", 0)
    with pytest.raises(
        ServiceError, match=r"no answer from the server at http://127\.0\.0\.1:1/v1"
    ):
        evaluate(
            RemoteAsker("http://127.0.0.1:1/v1"), plan_of(split), Decoding(), RunFolder(tmp_path)
        )


def test_the_key_comes_from_the_environment(embedded, monkeypatch):
    with serving(embedded, api_key="secret-key") as (url, _):
        with pytest.raises(ServiceError, match="and the key in VPT_API_KEY") as caught:
            RemoteAsker(url).describe()
        monkeypatch.setenv("VPT_API_KEY", "secret-key")
        assert RemoteAsker(url).describe()["model"]["name"] == embedded.name
    assert "secret-key" not in str(caught.value)


def test_a_condition_that_the_model_lacks_is_refused_before_a_question(endless):
    with serving(endless) as (url, _):
        asker = RemoteAsker(url)
        asker.check(find_conditions(["auto", "truth", "dino"]))
        asker._card = {**asker.card, "branches": ["crop"]}
        with pytest.raises(PromptError, match="dino"):
            asker.check(find_conditions(["dino"]))


def test_the_server_names_its_branches(url, client, embedded):
    card = client.models.list().data[0]
    assert card.branches == list(embedded.vocabulary.branches)
    assert card.grid_size == embedded.vocabulary.grid_size


def test_a_call_that_was_not_executed_stays_one():
    trace = Trace("?", "auto")
    call = {"branch": "crop", "image": 0, "region": [3, 2, 3, 2], "box_xyxy_px": [1, 2, 3, 4]}
    for outcome in ("executed", "not_executed"):
        add_call(trace, 0, {**call, "outcome": outcome})
    assert [one.outcome for one in trace.calls] == ["executed", "not_executed"]
    assert [one.box_xyxy_px for one in trace.images] == [(1, 2, 3, 4)]
