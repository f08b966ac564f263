"""Records survive a kill at any moment, and nothing is lost or read as another."""

import contextlib
import dataclasses

import pytest

from vpt.errors import DataError
from vpt.evaluation.records import LineFile, Record, read_records

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


def test_a_line_that_is_no_record_is_told_with_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, RECORDS[:1])
    path.write_bytes(path.read_bytes() + b'{"split": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is no record .* delete the line"):
        list(read_records(path))


def test_only_executed_calls_are_counted():
    calls = [{"outcome": "executed"}, {"outcome": "not_executed"}]
    assert dataclasses.replace(RECORDS[0], trace={"calls": calls}).num_calls == 1
    assert RECORDS[0].num_calls == 0


def test_a_record_of_an_error_has_no_trace():
    with pytest.raises(DataError, match=r"sample 3 of S has no trace: .*does not exist"):
        RECORDS[2].read_trace()
