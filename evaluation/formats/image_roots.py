"""Where images are that a file names: a folder for relative paths, and beginnings that moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vpt.errors import PromptError
from vpt.images import place_image


@dataclass(frozen=True)
class ImageRoots:
    """Where images are.

    Attributes:
        root: folder of relative paths; ``None`` for the one that a format expects, mostly that of
            the file that names them.
        moved: ``(FROM, TO)``: paths that begin with FROM are in TO. The longest FROM comes first.
    """

    root: Path | None = None
    moved: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, options: Sequence[str]) -> ImageRoots:
        """Read what a person typed.

        Args:
            options: ``FROM=TO`` each, or a folder.

        Raises:
            PromptError: if one is malformed or contradicts another, or its folder does not exist.
        """
        root: Path | None = None
        moved: dict[str, str] = {}
        for option in options:
            start, equals, target = option.partition("=")
            if option and (Path(option).is_dir() or not equals):
                if root is not None:
                    raise PromptError(
                        f"--images: {root} and {option} are both for relative paths; give one"
                    )
                root = Path(_folder(option))
            elif not start or not target:
                raise PromptError(
                    "--images: expected a folder, or FROM=TO with something on both sides, "
                    f"got {option!r}"
                )
            elif moved.setdefault(start.rstrip("/"), _folder(target)) != target:
                raise PromptError(f"--images: {start} is moved twice; give it once")
        return cls(root, tuple(sorted(moved.items(), key=lambda item: -len(item[0]))))

    def find(self, path: str, folder: Path) -> str:
        """Say where an image is.

        Args:
            path: as the file has it.
            folder: of relative paths, if :attr:`root` names none.

        Returns:
            A path; an absolute one that was not moved as it is.
        """
        for start, target in self.moved:  # FROM without the slash at its end: "/" is ""
            if path == start or path.startswith(f"{start}/"):
                return str(Path(target) / path[len(start) :].lstrip("/"))
        return place_image(path, self.root or folder)


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise PromptError(f"--images: there is no folder {text}")
    return text
