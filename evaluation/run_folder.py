"""The folder of a run: its records, what run it is, and its results."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vpt.errors import DataError
from vpt.evaluation.lines import writing
from vpt.evaluation.records import Record, RecordFile, read_records
from vpt.files import write_whole

RUN_VERSION = 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """A folder that a run writes, and the same run goes on in.

    Attributes:
        path: of the folder.
    """

    path: Path

    @property
    def results_file(self) -> Path:
        """Numbers of the run."""
        return self.path / "results.json"

    @property
    def report_file(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    @property
    def judgements_file(self) -> Path:
        """What a judge said, kept so that it is asked once."""
        return self.path / "judgements.jsonl"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder against other runs during the block. The lock ends with the process.

        Raises:
            DataError: if another run holds the folder, naming its process, or it cannot be written.
        """
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
        """Make the folder, or make sure that what is in it belongs to the same run.

        Args:
            identity: what makes records comparable: weights, decoding, seed.
            resume: whether records that are there may be kept.

        Raises:
            DataError: if it cannot be written, or holds what is not of this run.
        """
        file = self.path / "run.json"
        try:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    run = json.dumps({"version": RUN_VERSION, **identity}, indent=1)
                    write_whole(run + "\n", file)
                    return
                known = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise DataError(f"{file} is no JSON ({exc}); choose another --out") from exc
        if not resume:
            raise DataError(
                f"{self.path} holds a run; leave --no-resume out to go on with it, or choose "
                "another --out"
            )
        wanted = {"version": RUN_VERSION, **json.loads(json.dumps(identity))}
        for key in sorted({*wanted, *known}):
            if wanted.get(key) != known.get(key):
                raise DataError(
                    f"{self.path} holds a run with {key} {known.get(key)}, this one has "
                    f"{wanted.get(key)}; choose another --out"
                )

    def records(self, split: str, condition: str) -> RecordFile:
        """The file of a split under a condition."""
        return RecordFile(self._file(split, condition))

    def read(self, split: str, condition: str) -> dict[str, Record]:
        """Records of a split under a condition: id -> record, the last one of each."""
        records = read_records(self._file(split, condition))  # "a/b" and "a_b" share a file
        return {r.id: r for r in records if (r.split, r.condition) == (split, condition)}

    def read_all(self) -> Iterator[Record]:
        """Every record, in the order of the files' names, the last one of each sample."""
        for file in sorted((self.path / "records").glob("*.jsonl")):
            yield from {record.key: record for record in read_records(file)}.values()

    def read_results(self) -> dict[str, Any]:
        """What :meth:`write_results` wrote.

        Raises:
            DataError: if there are none.
        """
        try:
            results: dict[str, Any] = json.loads(self.results_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise DataError(
                f"{self.path} holds no results ({exc}); give the --out folder of a finished run"
            ) from exc
        return results

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write the numbers.

        Raises:
            DataError: if they cannot be written.
        """
        with writing(self.results_file):
            write_whole(json.dumps(results, indent=1) + "\n", self.results_file)

    def _file(self, split: str, condition: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in split)
        return self.path / "records" / f"{safe}--{condition}.jsonl"


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
