"""Replies of a judge kept on disk, so that nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path

from vpt.errors import DataError
from vpt.evaluation.lines import LineFile, read_lines


class ReplyCache:
    """A file of replies, one JSON line each, see :class:`vpt.evaluation.lines.LineFile`.

    Args:
        path: of the file; it and its folder are made by the first :meth:`put`. ``None`` to keep
            replies in memory only.

    Raises:
        DataError: if the file cannot be read, or a whole line of it is no reply.
    """

    def __init__(self, path: Path | None) -> None:
        self._replies: dict[str, str] = {}
        self._lines = None if path is None else LineFile(path)
        if path is not None:
            for number, line in enumerate(read_lines(path), 1):
                key, reply = _read_line(line, f"{path}, line {number}")
                self._replies[key] = reply

    def get(self, key: str) -> str | None:
        """The reply under a key, or ``None``."""
        return self._replies.get(key)

    def put(self, key: str, reply: str, **about: str) -> None:
        """Keep a reply; it is on disk when this returns.

        Args:
            key: to find it by.
            reply: as it came.
            about: what else the line should say to a reader; it is not read back.

        Raises:
            DataError: if it cannot be written; the replies before it stay.
        """
        self._replies[key] = reply
        if self._lines is not None:
            self._lines.append(json.dumps({"key": key, **about, "reply": reply}) + "\n")

    def close(self) -> None:
        """Let go of the file."""
        if self._lines is not None:
            self._lines.close()


def _read_line(line: str, place: str) -> tuple[str, str]:
    try:
        content = json.loads(line)
        key, reply = content["key"], content["reply"]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise DataError(
            f"{place} is no reply of a judge ({type(exc).__name__}: {exc}); delete the line to "
            "have the judge asked again"
        ) from exc
    if not isinstance(key, str) or not isinstance(reply, str):
        raise DataError(f"{place}: key and reply must be strings; delete the line")
    return key, reply
