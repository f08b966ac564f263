"""A run's folder takes the same run up again, and no other."""

import os

import pytest

from evaluation.records import Record
from evaluation.run_folder import RunFolder
from vpt.errors import DataError

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
    with pytest.raises(DataError, match="leave --no-resume out"):
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
        file.append(record)
        file.close()
    assert folder.read("a/b", "auto") == {"1": made[0]}
    assert sorted(folder.read_all(), key=lambda record: record.condition) == made


def test_results_come_back(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(DataError, match="holds no results"):
        folder.read_results()
    folder.write_results({"n": 1})
    assert folder.read_results() == {"n": 1}
