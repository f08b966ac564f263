"""Replies of a judge outlive the process that got them, and a torn line does no harm."""

import json

import pytest

from vpt.errors import DataError
from vpt.evaluation.judge import ReplyCache


def filled(path, **replies):
    cache = ReplyCache(path)
    for key, reply in replies.items():
        cache.put(key, reply, model="m")
    cache.close()
    return path


def test_replies_are_found_by_the_next_run(tmp_path):
    path = filled(tmp_path / "new" / "cache.jsonl", a="score: 1", b="score: 0\n é \u2028")
    cache = ReplyCache(path)
    assert [cache.get(key) for key in "abc"] == ["score: 1", "score: 0\n é \u2028", None]


def test_a_line_says_what_it_is_about(tmp_path):
    line = filled(tmp_path / "cache.jsonl", a="yes").read_text()
    assert json.loads(line) == {"key": "a", "model": "m", "reply": "yes"}


def test_a_reply_is_on_disk_before_put_returns(tmp_path):
    cache = ReplyCache(tmp_path / "cache.jsonl")
    cache.put("a", "yes")
    assert ReplyCache(tmp_path / "cache.jsonl").get("a") == "yes"
    cache.close()


def test_reading_makes_no_file(tmp_path):
    cache = ReplyCache(tmp_path / "cache.jsonl")
    assert cache.get("a") is None
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_lines_are_only_added(tmp_path):
    path = filled(tmp_path / "cache.jsonl", a="yes")
    before = path.read_bytes()
    filled(path, b="no")
    assert path.read_bytes().startswith(before)
    assert ReplyCache(path).get("a") == "yes"


@pytest.mark.parametrize("num_bytes", [1, 10, -1])
def test_a_torn_last_line_is_ignored_and_then_replaced(tmp_path, num_bytes):
    path = filled(tmp_path / "cache.jsonl", a="yes")
    whole = path.read_bytes()
    torn = whole + b'{"key": "b", "reply": "no"}\n'[:num_bytes]
    path.write_bytes(torn)
    cache = ReplyCache(path)
    assert (cache.get("a"), cache.get("b")) == ("yes", None)
    assert path.read_bytes() == torn  # reading changes nothing
    filled(path, c="new")
    assert path.read_bytes().startswith(whole + b'{"key": "c"')
    assert ReplyCache(path).get("c") == "new"


@pytest.mark.parametrize(
    "line", ["not JSON", "[]", "{}", '{"key": "a"}', '{"key": 1, "reply": ""}']
)
def test_a_damaged_whole_line_is_an_error_that_names_it(tmp_path, line):
    path = filled(tmp_path / "cache.jsonl", a="yes")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"cache.jsonl, line 2.*delete the line"):
        ReplyCache(path)


def test_without_a_path_replies_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = ReplyCache(None)
    cache.put("a", "yes")
    assert cache.get("a") == "yes"
    assert list(tmp_path.iterdir()) == []
