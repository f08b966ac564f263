"""Replies of a judge kept on disk, so that nothing is asked twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from vpt.errors import DataError


class ReplyCache:
    """A file of replies, one JSON line each, to which lines are only ever added.

    A line goes to the system in one write before :meth:`put` returns; a line that a kill cut in
    two is ignored, and taken away by the next :meth:`put`.

    Args:
        path: of the file; it and its folder are made by the first :meth:`put`. ``None`` to keep
            replies in memory only.

    Raises:
        DataError: if a whole line of the file is no reply.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._replies: dict[str, str] = {}
        self._torn_at: int | None = None
        if path is not None and path.exists():
            self._read(path)

    def get(self, key: str) -> str | None:
        """The reply under a key, or ``None``."""
        return self._replies.get(key)

    def put(self, key: str, reply: str, **about: str) -> None:
        """Keep a reply.

        Args:
            key: to find it by.
            reply: as it came.
            about: what else the line should say to a reader; it is not read back.
        """
        self._replies[key] = reply
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._torn_at is not None:
                os.truncate(self._path, self._torn_at)
            self._file = self._path.open("ab", buffering=0)
        self._file.write(json.dumps({"key": key, **about, "reply": reply}).encode() + b"\n")

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, path: Path) -> None:
        num_bytes = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._torn_at = num_bytes
                    return
                num_bytes += len(line)
                key, reply = _read_line(line, f"{path}, line {number}")
                self._replies[key] = reply


def _read_line(line: bytes, place: str) -> tuple[str, str]:
    try:
        content = json.loads(line)
        key, reply = content["key"], content["reply"]
    except (ValueError, TypeError, KeyError) as exc:
        raise DataError(
            f"{place} is no reply of a judge ({type(exc).__name__}: {exc}); delete the line to "
            "have the judge asked again"
        ) from exc
    if not isinstance(key, str) or not isinstance(reply, str):
        raise DataError(f"{place}: key and reply must be strings; delete the line")
    return key, reply
