"""Records of a run, one JSON line per sample, and the folder that holds them and the results."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from io import FileIO
from pathlib import Path
from typing import IO, Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from vpt.errors import DataError
from vpt.files import write_atomic
from vpt.protocol.tokens import canonical_mode
from vpt.trace.records import Trace

ERRORS = ("image", "row", "run")
"""Why a sample has no score: its image or its row cannot be used, or the run of it failed."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """The outcome of one sample under one condition: a trace and scores, or an error.

    Attributes:
        question: as it was put to the model.
        answers: accepted ones.
        box: of the evidence, XYXY in pixels of the first image.
        images: names of the sample's images.
        trace: of the run, as ``Trace.to_dict`` returns it.
        error: ``{"kind": one of ERRORS, "message": ...}``, or ``None``.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    split: str
    condition: str
    id: str
    question: str
    prediction: str = ""
    answers: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    group: str = ""
    box: tuple[float, float, float, float] | None = None
    images: tuple[str, ...] = ()
    trace: dict[str, Any] | None = None
    error: dict[str, str] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Split, condition and id: unique in a run."""
        return self.split, self.condition, self.id

    @property
    def num_calls(self) -> int:
        """Perception calls that were executed."""
        calls = self.trace["calls"] if self.trace else []
        return sum(call["outcome"] == "executed" for call in calls)

    def read_trace(self) -> Trace:
        """The trace as an object; raises ``DataError`` if there is none."""
        if self.trace is None:
            raise DataError(f"sample {self.id} of {self.split} has no trace: {self.error}")
        return Trace.from_dict(self.trace)

    def to_line(self) -> str:
        """One line of JSON, newline included."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=True) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Read what :meth:`to_line` wrote; raises ``ValueError`` for anything else."""
        # Parsed by json: pydantic's own parser refuses half of a surrogate pair.
        record = _adapter().validate_python(json.loads(line))
        return dataclasses.replace(record, condition=canonical_mode(record.condition))


@cache
def _adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


def read_records(path: Path) -> Iterator[Record]:
    """Read a file of records, none if it is missing; ``DataError`` if a line is not a record."""
    for number, line in enumerate(read_lines(path), 1):
        try:
            yield Record.from_line(line)
        except (ValueError, RecursionError) as exc:
            reason = str(exc)
            if isinstance(exc, ValidationError):
                first = exc.errors(include_url=False)[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise DataError(
                f"{path}, line {number} is no record ({reason}); delete the line to have its "
                "sample run again"
            ) from exc


class LineFile:
    """A file of lines that is only appended to, and survives a kill and a full disk.

    Each line is on disk before :meth:`append` returns. A line that a kill cut in two is removed
    when the file is opened again; all lines before it stay. File and folder are made when needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def append(self, line: str) -> None:
        """Write a line with its newline; if that fails (``DataError``), those before it stay."""
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
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    file.seek(0)
    content = file.readall()
    if not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)
    return file


def read_lines(path: Path) -> Iterator[str]:
    """Read the whole lines of a file, none if it is missing; ``DataError`` if it is not UTF-8."""
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
    """Turn an ``OSError`` in the block (full disk, no permission) into a ``DataError``."""
    try:
        yield
    except OSError as exc:
        raise DataError(
            f"cannot write to {path}: {exc.strerror or exc}; choose another --out, or make room "
            "there and run the same command again to resume: all that was written before is kept"
        ) from exc


@dataclass(frozen=True)
class RunFolder:
    """The folder that a run writes, and in which the same run resumes."""

    path: Path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder during the block; ``DataError`` if another run has it."""
        file = self.path / "run.lock"
        with ExitStack() as stack:
            with writing(file):
                self.path.mkdir(parents=True, exist_ok=True)
                stream = stack.enter_context(file.open("a+", encoding="utf-8"))
            if not _lock(stream):
                stream.seek(0)
                raise DataError(
                    f"{self.path} is in use by {stream.read().strip() or 'another run'}; wait "
                    "until that ends, or choose another --out"
                )
            with writing(file):
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {platform.node()}\n")
                stream.flush()
            yield

    def start(self, identity: Mapping[str, Any], resume: bool) -> None:
        """Make the folder; ``DataError`` if it is that of a run that does not compare with ours."""
        file = self.path / "run.json"
        wanted = {"version": 1, **json.loads(json.dumps(identity))}
        try:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    write_atomic(json.dumps(wanted, indent=1) + "\n", file)
                    return
                known = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise DataError(f"{file} is no JSON ({exc}); choose another --out") from exc
        if not resume:
            raise DataError(
                f"{self.path} holds a run; omit --no-resume to resume it, or choose another --out"
            )
        for key, (held, ours) in _differences(known, wanted).items():
            raise DataError(
                f"{self.path} holds a run with {key} {held}, this one has {ours}; choose another "
                "--out"
            )

    def read_parts(self) -> list[dict[str, Any]]:
        """Start and seconds of each part of the run; a killed part counts up to its last record."""
        file = self.path / "parts.json"
        try:
            if file.exists():
                parts: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))
                return parts
            if self.has_results():  # of a release that stored no parts
                return [{"started": None, "seconds": self.read_results()["seconds"]}]
        except (OSError, ValueError) as exc:
            raise DataError(
                f"cannot read {file} ({exc}); delete it to measure the time from now on"
            ) from exc
        return []

    def write_parts(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Write what :meth:`read_parts` reads."""
        file = self.path / "parts.json"
        with writing(file):
            write_atomic(json.dumps(parts, indent=1) + "\n", file)

    def records(self, split: str, condition: str) -> LineFile:
        """The file of a split under a condition."""
        return LineFile(self._file(split, condition))

    def read(self, split: str, condition: str) -> dict[str, Record]:
        """Records of a split under a condition: id -> record, the last one of each."""
        records = read_records(self._file(split, condition))  # "a/b" and "a_b" share a file
        return {r.id: r for r in records if (r.split, r.condition) == (split, condition)}

    def read_all(self) -> Iterator[Record]:
        """Every record, in the order of the files' names, the last one of each sample."""
        for file in sorted((self.path / "records").glob("*.jsonl")):
            yield from {record.key: record for record in read_records(file)}.values()

    def has_results(self) -> bool:
        """Whether a run ended here, or was interrupted by Ctrl-C."""
        return (self.path / "results.json").exists()

    def read_results(self) -> dict[str, Any]:
        """Read what :meth:`write_results` wrote; ``DataError`` if it did not."""
        try:
            results: dict[str, Any] = json.loads((self.path / "results.json").read_text("utf-8"))
        except (OSError, ValueError) as exc:
            raise DataError(
                f"{self.path} holds no results ({exc}); give the --out folder of a finished run"
            ) from exc
        return results

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write the numbers."""
        file = self.path / "results.json"
        with writing(file):
            write_atomic(json.dumps(results, indent=1) + "\n", file)

    def _file(self, split: str, condition: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in split)
        file = self.path / "records" / f"{safe}--{condition}.jsonl"
        older = self.path / "records" / f"{safe}--region.jsonl"  # its older name
        return older if condition == "crop" and older.exists() and not file.exists() else file


def _differences(
    known: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, nested ones by their full name, such as ``"decoding seed"``."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*wanted, *known}):
        held, ours = known.get(key), wanted.get(key)
        if isinstance(held, Mapping) and isinstance(ours, Mapping):
            found |= _differences(held, ours, f"{prefix}{key} ")
        elif held != ours:
            found[f"{prefix}{key}"] = held, ours
    return found


def _lock(stream: IO[str]) -> bool:
    """Lock an open file until it is closed or the process ends; ``False`` if another has it."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as exc:  # Windows, and some network file systems
        _logger.error("cannot lock %s (%s); let no other run write there", stream.name, exc)
    return True
