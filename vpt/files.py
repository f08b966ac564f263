"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def write_atomic(text: str, file: Path) -> None:
    """Write a file wholly or not at all: no reader ever sees a part of it.

    A link is replaced by a file; what it points to, such as a blob of the hub's cache that other
    snapshots share, stays as it is.

    Raises:
        OSError: if it cannot be written; the file is then as it was before.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def replace_atomically(folder: Path) -> Iterator[Path]:
    """Let a library write several files, each of which then replaces its namesake whole.

    Links are replaced as by :func:`write_atomic`. Files that are mapped into memory keep their
    content for those who read them.

    Args:
        folder: made if need be.

    Yields:
        An empty folder to write into; if the block raises, ``folder`` stays as it was.

    Raises:
        OSError: if a file cannot be written or replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".draft-") as name:
        draft = Path(name)
        yield draft
        # A list of shards comes after the shards that it names.
        for file in sorted(draft.rglob("*"), key=lambda one: (one.suffix == ".json", one)):
            target = folder / file.relative_to(draft)
            if file.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
