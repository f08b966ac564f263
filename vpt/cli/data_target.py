"""What ``vpt data check`` is pointed at: a file of rows, or a split that an evaluation knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vpt.data.findings import FINDINGS
from vpt.errors import PromptError


class Target(Protocol):
    """What is to be checked."""

    @property
    def file(self) -> Path:
        """With the rows."""

    @property
    def findings(self) -> Mapping[str, str]:
        """Kinds of findings, with what each means."""

    @property
    def find_image(self) -> Callable[[str], str]:
        """Path in a row, without crop suffix -> where the file is."""

    @property
    def check(self) -> Callable[..., Any] | None:
        """Checks what is no rows, and gives a ``Report`` with ``num_images`` and ``num_left``.

        Its arguments are ``limit``, ``open_images``, ``ignored`` and ``watch``, which is
        :func:`vpt.cli.output.progress`. ``None`` for rows: they are checked here.
        """


@dataclass(frozen=True)
class RowsTarget:
    """A file of rows.

    Attributes:
        file: with the rows.
        images: folder of relative paths.
        findings: see `Target`.
        check: none, see `Target`.
    """

    file: Path
    images: Path
    findings: Mapping[str, str]
    check: None = None

    def find_image(self, path: str) -> str:
        """Where an image is."""
        from vpt.images import place_image

        return place_image(path, self.images)


def find_target(name: str, data: Path, images: Sequence[str]) -> Target:
    """Say what a name stands for: a split that the evaluation knows, or else a file of rows.

    Args:
        name: as typed.
        data: folder of data.
        images: as typed behind ``--images``.

    Raises:
        PromptError: if the name or ``--images`` makes no sense.
        DataError: if the data of a split is missing.
    """
    from vpt.evaluation.doctor import check_target

    if target := check_target(name, data, images):
        return target
    if len(images) > 1:
        raise PromptError(f"--images: expected one folder, got {', '.join(images)}")
    if images and not Path(images[0]).is_dir():
        raise PromptError(f"--images: there is no folder {images[0]}")
    return RowsTarget(Path(name), Path(*images), FINDINGS)
