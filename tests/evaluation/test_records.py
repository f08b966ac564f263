"""Records survive a kill at any moment; a run's folder resumes the same run, and no other."""

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys

import pytest

from vpt.errors import DataError
from vpt.evaluation.records import LineFile, Record, RunFolder, read_records

RECORDS = [
    Record("S", "auto", "1", "What?", "a", ("a", "b"), {"exact_match": 1.0}, "g", (1, 2, 3, 4)),
    Record("S", "auto", "2", "Où\n?", "\u2028x", (), {}, images=("p.png",)),
    Record("S", "auto", "3", "", error={"kind": "image", "message": "p.png does not exist"}),
]


def write(path, records):
    file = LineFile(path)
    for record in records:
        file.append(record.to_line())
    file.close()


def test_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    write(path, RECORDS)
    assert list(read_records(path)) == RECORDS


def test_a_file_that_is_not_there_has_no_records(tmp_path):
    assert list(read_records(tmp_path / "none.jsonl")) == []


def test_each_record_is_in_the_file_before_the_next(tmp_path):
    file = LineFile(tmp_path / "a.jsonl")
    for number, record in enumerate(RECORDS, 1):
        file.append(record.to_line())
        assert len(list(read_records(file.path))) == number
    file.close()


def test_a_line_cut_at_any_byte_costs_one_record(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, RECORDS)
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert list(read_records(path)) == RECORDS[:2]
        write(path, RECORDS[2:])
        assert path.read_bytes() == whole


@contextlib.contextmanager
def files_at_most(num_bytes):
    """Let the system refuse longer files, as a full disk does: after a part of a write."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_and_what_was_written_stays_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, RECORDS[:1])
    whole = path.read_bytes()
    file = LineFile(path)
    words = r"cannot write to .*a\.jsonl: File too large; .* run the same command again to resume"
    with files_at_most(len(whole) + 20), pytest.raises(DataError, match=words):
        file.append(RECORDS[1].to_line())
    assert path.read_bytes() == whole
    file.append(RECORDS[1].to_line())  # there is room again
    file.close()
    assert list(read_records(path)) == RECORDS[:2]


def test_a_folder_that_no_records_can_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        DataError, match=r"cannot write to .*b\.jsonl: (Not a directory|File exists)"
    ):
        LineFile(tmp_path / "file" / "b.jsonl").append(RECORDS[0].to_line())
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        list(read_records(tmp_path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected|should be"),
        ('{"split": 1, "condition": "auto", "id": "1", "question": ""}', "split: .* valid string"),
        ('{"split": "S", "condition": "auto", "id": "1"}', "question: .*required"),
        (RECORDS[0].to_line().replace('"group"', '"grop"'), "grop: [Uu]nexpected keyword"),
        (RECORDS[0].to_line().replace("1.0", '"high"'), r"scores\.exact_match: .* valid number"),
        (RECORDS[0].to_line().replace("[1, 2, 3, 4]", "[1, 2, 3]"), r"box\.3: .*required"),
    ],
)
def test_a_line_that_is_no_record_is_told_with_its_number(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    write(path, RECORDS[:1])
    path.write_bytes(path.read_bytes() + line.strip().encode() + b"\n")
    words = rf"a\.jsonl, line 2 is no record \(.*{reason}.*\); delete the line"
    with pytest.raises(DataError, match=words):
        list(read_records(path))


def test_only_executed_calls_are_counted():
    calls = [{"outcome": "executed"}, {"outcome": "not_executed"}]
    assert dataclasses.replace(RECORDS[0], trace={"calls": calls}).num_calls == 1
    assert RECORDS[0].num_calls == 0


def test_a_record_of_an_error_has_no_trace():
    with pytest.raises(DataError, match=r"sample 3 of S has no trace: .*does not exist"):
        RECORDS[2].read_trace()


IDENTITY = {"model": {"hash": "a"}, "decoding": {"seed": 0}}


def test_the_same_run_goes_on(tmp_path):
    for _ in range(2):
        RunFolder(tmp_path / "run").start(IDENTITY, resume=True)


def test_another_run_is_refused(tmp_path):
    RunFolder(tmp_path).start(IDENTITY, resume=True)
    other = {**IDENTITY, "model": {"hash": "b"}}
    words = r"holds a run with model hash a, this one has b; choose another"
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


def test_a_folder_with_the_older_name_of_a_condition_is_read_and_resumed(tmp_path):
    older, newer = (Record("S", "region", n, "?") for n in ("1", "2"))
    write(tmp_path / "records" / "S--region.jsonl", [older])
    folder = RunFolder(tmp_path)
    file = folder.records("S", "crop")
    file.append(dataclasses.replace(newer, condition="crop").to_line())
    file.close()
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["S--region.jsonl"]
    assert folder.read("S", "crop").keys() == {"1", "2"}
    assert {record.condition for record in folder.read_all()} == {"crop"}


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


def test_records_of_a_condition_under_its_older_name_are_resumed(tmp_path):
    file = tmp_path / "records" / "own--region.jsonl"
    write(file, [Record("own", "region", "1", "?", "x")])
    folder = RunFolder(tmp_path)
    assert folder.records("own", "crop").path == file
    assert folder.read("own", "crop")["1"].prediction == "x"
    assert [record.condition for record in folder.read_all()] == ["crop"]
