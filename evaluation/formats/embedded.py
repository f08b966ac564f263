"""Held-out questions of the embedded model: one's own format, grouped by how to look and at what.

`python -m recipes make-embedded` writes them, see :func:`recipes.embedded.make.heldout_entries`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from vpt.evaluation.formats import plain
from vpt.evaluation.formats.image_roots import ImageRoots
from vpt.evaluation.samples import BadRow, Sample


def read(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read held-out questions.

    The group is ``mode-family``, as ``"region-lines"``; ``facts`` are ``mode``, ``family`` and
    ``look``.

    Args:
        file: ``heldout.jsonl``.
        images: where they are; relative paths are in the folder of the file.

    Raises:
        DataError: if the file cannot be read.
    """
    for number, sample in enumerate(plain.read(file, images)):
        if isinstance(sample, BadRow):
            yield sample
            continue
        names = [sample.facts.get(key) for key in ("mode", "family")]
        if all(isinstance(name, str) and name for name in names):
            yield dataclasses.replace(sample, group="-".join(map(str, names)))
        else:
            yield BadRow(sample.id, f"row {number}: expected 'mode' and 'family', got {names}")
