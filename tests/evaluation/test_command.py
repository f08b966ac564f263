"""The command as people type it: in processes of its own, from any folder, killed and taken up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vpt.cli.run import main as vpt_main
from vpt.evaluation.evaluation import main
from vpt.evaluation.records import RunFolder

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "evaluation" / "evaluation.py"


def start(*words, folder=ROOT, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=env, **pipes, **options)


def finish(process):
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


@pytest.mark.parametrize("folder", [ROOT, ROOT / "evaluation"], ids=["root", "inside"])
def test_splits_are_listed_from_any_folder(folder):
    code, out, err = finish(start(SCRIPT.relative_to(folder), "--list", folder=folder))
    assert code == 0, err
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert {"DocVQA", "POPE", "HardBLINK_3", "VStar", "embedded_heldout"} <= set(names)


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_as_one_that_was_not(own_split, random_model, tmp_path):
    asked = ["--splits", own_split, "--model", random_model, "--device", "cpu"]
    asked += ["--perception", "none,truth", "--max-new-tokens", "40", "--batch-size", "1"]
    whole = start(SCRIPT, *asked, "--out", tmp_path / "whole")
    assert finish(whole)[0] == 0
    killed = start(SCRIPT, *asked, "--out", tmp_path / "killed")
    file = tmp_path / "killed" / "records"
    while not list(file.glob("*.jsonl")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert finish(killed)[0] == -9
    assert not (tmp_path / "killed" / "results.json").exists()
    code, out, err = finish(start(SCRIPT, *asked, "--out", tmp_path / "killed"))
    assert code == 0, err
    assert "none" in out and "truth" in out
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "killed")]
    for entry in [entry for one in results for entry in one["splits"]]:
        del entry["milliseconds"], entry["tokens"]["llm"]  # fewer with the prefixes that were kept
        entry["per_solved"] = entry["per_solved"] and entry["per_solved"]["tokens"]
    assert results[0]["splits"] == results[1]["splits"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "--splits is required; --list shows the names"),
        (["--splits", "DocVAQ"], 2, "DocVQA"),
        (["--splits", "DocVQA"], 2, "DocVQA is not there: looked for"),
        (["--splits", "DocVQA", "--perception", "look"], 2, "unknown perception 'look'; available"),
        (["--splits", "DocVQA", "--images", "=x"], 2, "FROM=TO"),
        (["--splits", "DocVQA", "--judge-url", "http://x/v1"], 2, "--judge-url needs --judge"),
        (["--splits", "DocVQA", "--judge", "m", "--judge-url", "ftp"], 2, "base_url must be like"),
        (["--splits", "DocVQA", "--revision", "r"], 2, "--revision needs --model"),
        (["compare", "a", "b"], 2, "a holds no results"),
    ],
)
def test_wrong_words_are_told(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    assert message in capsys.readouterr().err


def test_the_words_of_the_script_work_in_vpt_too(capsys):
    for words in (["compare", "a", "b"], ["eval", "compare", "a", "b"]):
        assert vpt_main(words) == 2
        assert "a holds no results" in capsys.readouterr().err


def test_a_run_is_not_gone_on_with_where_it_must_not_be(own_split, random_model, tmp_path, capsys):
    words = ["--splits", str(own_split), "--model", str(random_model), "--device", "cpu"]
    words += ["--limit", "1", "--perception", "none", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert main([*words, "--no-resume"]) == 2
    assert "omit --no-resume to resume it" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert main([*words[:-1], str(tmp_path / "file" / "out")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_a_run_without_a_single_answer_is_told(own_split, random_model, tmp_path, capsys):
    words = ["--splits", str(own_split), "--model", str(random_model), "--device", "cpu"]
    words += ["--limit", "2", "--perception", "none", "--out", str(tmp_path / "out")]
    picture = own_split.parent / "0.png"
    picture.rename(own_split.parent / "away.png")
    assert main(words) == 0  # the other sample was answered
    said = capsys.readouterr().err
    assert "own.jsonl (none): 1 of 2 samples failed; first: sample 0: " in said
    assert f'"error" in {tmp_path / "out" / "records"} has the reason of each failure' in said
    assert "no sample was answered" not in said
    assert main([*words, "--limit", "1"]) == 1
    assert "error: no sample was answered: 1 failed" in capsys.readouterr().err


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_under_way(
    own_split, random_model, tmp_path, capsys
):
    words = ["--splits", str(own_split), "--model", str(random_model), "--device", "cpu"]
    words += ["--limit", "1", "--perception", "none", "--out", str(tmp_path / "out")]
    with RunFolder(tmp_path / "out").held():
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text('{"model_type": "qwen2_vl_vpt"}')
        broken = ["--model", str(tmp_path / "broken")]  # a lock is reported before it is loaded
        assert main([*words, *broken]) == 2
    assert f"out is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert main(words) == 0


def test_a_judge_that_is_down_is_told_and_the_run_is_kept(
    own_split, random_model, tmp_path, capsys
):
    pytest.importorskip("openai")
    words = ["--splits", str(own_split), "--model", str(random_model), "--device", "cpu"]
    words += ["--limit", "1", "--perception", "none", "--out", str(tmp_path / "out")]
    judge = ["--judge", "m", "--judge-url", "http://127.0.0.1:9/v1", "--judge-retries", "0"]
    assert main([*words, *judge]) == 6
    assert "it cannot be reached" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "records").iterdir())) == 1
    assert main(words) == 0


def test_a_judge_without_free_form_answers_is_told(random_model, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text(
        '{"image": "a.png", "question": "Which?", "choices": ["x", "y"], "answer": "x"}\n'
    )
    words = ["--splits", str(tmp_path / "q.jsonl"), "--model", str(random_model)]
    assert main([*words, "--judge", "m", "--out", str(tmp_path / "out")]) == 2
    assert "--judge is for free-form splits (DocVQA" in capsys.readouterr().err
