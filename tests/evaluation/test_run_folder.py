"""A run's folder takes the same run up again, and no other."""

import errno
import os
import subprocess
import sys

import pytest

from vpt.errors import DataError
from vpt.evaluation.records import Record, RunFolder

IDENTITY = {"model": {"hash": "a"}, "decoding": {"seed": 0}}


def test_the_same_run_goes_on(tmp_path):
    for _ in range(2):
        RunFolder(tmp_path / "run").start(IDENTITY, resume=True)


def test_another_run_is_refused(tmp_path):
    RunFolder(tmp_path).start(IDENTITY, resume=True)
    other = {**IDENTITY, "model": {"hash": "b"}}
    words = r"holds a run with model {'hash': 'a'}, this one has {'hash': 'b'}; choose another"
    with pytest.raises(DataError, match=words):
        RunFolder(tmp_path).start(other, resume=True)


def test_nothing_is_gone_on_with_unless_it_may_be(tmp_path):
    RunFolder(tmp_path).start(IDENTITY, resume=False)
    with pytest.raises(DataError, match="omit --no-resume"):
        RunFolder(tmp_path).start(IDENTITY, resume=False)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot write to .*; choose another --out"):
        RunFolder(tmp_path / "file" / "run").start(IDENTITY, resume=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot write to"):
        RunFolder(tmp_path / "run").start(IDENTITY, resume=True)


def test_a_broken_run_file_is_told(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json is no JSON"):
        RunFolder(tmp_path).start(IDENTITY, resume=True)


def test_records_are_kept_apart_by_split_and_condition(tmp_path):
    folder = RunFolder(tmp_path)
    made = [Record("a/b", "auto", "1", "?"), Record("a/b", "none", "1", "?")]
    for record in made:
        file = folder.records(record.split, record.condition)
        file.append(record.to_line())
        file.close()
    assert folder.read("a/b", "auto") == {"1": made[0]}
    assert sorted(folder.read_all(), key=lambda record: record.condition) == made


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.held():
        words = rf"run is in use by process {os.getpid()} on .*; wait until that ends, or choose"
        with pytest.raises(DataError, match=words), RunFolder(folder.path).held():
            raise AssertionError
    with folder.held():
        pass


def test_a_run_that_was_killed_lets_go_of_its_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from vpt.evaluation.records import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=f"in use by process {other.pid} on"):
            RunFolder(tmp_path).held().__enter__()
    finally:
        other.kill()
        other.communicate()
    with RunFolder(tmp_path).held():
        pass


def test_a_folder_that_cannot_be_locked_is_used_and_the_risk_told(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunFolder(tmp_path).held():
        assert "cannot lock" in caplog.text


def test_splits_whose_names_make_one_file_are_not_mixed_up(tmp_path):
    folder = RunFolder(tmp_path)
    made = [Record("a/b", "auto", "1", "?"), Record("a_b", "auto", "1", "other")]
    for record in made:
        file = folder.records(record.split, record.condition)
        file.append(record.to_line())
        file.close()
    assert [folder.read(record.split, "auto") for record in made] == [{"1": r} for r in made]
    assert list(folder.read_all()) == made


def test_the_last_record_of_a_sample_counts(tmp_path):
    folder = RunFolder(tmp_path)
    file = folder.records("a", "auto")
    for prediction in ("x", "y"):
        file.append(Record("a", "auto", "1", "?", prediction).to_line())
    file.close()
    assert folder.read("a", "auto")["1"].prediction == "y"
    assert [record.prediction for record in folder.read_all()] == ["y"]


def test_results_come_back(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(DataError, match="holds no results"):
        folder.read_results()
    folder.write_results({"n": 1})
    assert folder.read_results() == {"n": 1}
