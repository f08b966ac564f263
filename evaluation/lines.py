"""Files of lines that are only added, and survive a kill and a full disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from vpt.errors import DataError


class LineFile:
    """A file to which whole lines are added.

    Each line is on disk before :meth:`append` returns. A line that a kill cut in two is removed
    when the file is opened again; all lines before it stay.

    Args:
        path: of the file; it and its folder are made when first needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def append(self, line: str) -> None:
        """Write a line.

        Args:
            line: with its end.

        Raises:
            DataError: if it cannot be written; the lines before it stay whole.
        """
        with writing(self.path):
            if self._file is None:
                self._file = _open(self.path)
            length = self._file.seek(0, os.SEEK_END)
            try:
                rest = line.encode()
                while rest:  # a disk that fills up takes a part
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):  # else the next opening does it
                    self._file.truncate(length)
                raise

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_lines(path: Path) -> Iterator[str]:
    """Read the whole lines of a file; one that does not exist has none.

    Raises:
        DataError: if it cannot be read, or is not in UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # cut by a kill
                try:
                    yield line.decode()
                except UnicodeDecodeError as exc:
                    raise DataError(f"{path}, line {number} is not in UTF-8; delete it") from exc
    except FileNotFoundError:
        return
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}") from exc


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report in words that a file of a run cannot be written.

    Raises:
        DataError: for an ``OSError`` in the block: a full disk, a folder without permission.
    """
    try:
        yield
    except OSError as exc:
        raise DataError(
            f"cannot write to {path}: {exc.strerror or exc}; choose another --out, or make room "
            "there and run the same command again to resume: all that was written before is kept"
        ) from exc


def _open(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    file.seek(0)
    content = file.readall()
    if not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)
    return file
