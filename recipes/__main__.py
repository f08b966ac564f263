"""``python -m recipes``: data of the shipped model and of small experiments, pictures in docs."""

import sys

from recipes import pictures
from recipes.counting import command as counting
from recipes.embedded import command as embedded
from recipes.embedded import detector
from recipes.scenes import command as scenes
from vpt.cli.parser import CommandGroup
from vpt.cli.run import run

COMMANDS = CommandGroup(
    help="",
    description=__doc__ or "",
    examples="example:\n  python -m recipes make-embedded --out data/few --fraction 0.001",
    commands={
        "make-embedded": embedded.COMMAND,
        "make-detector": detector.COMMAND,
        "make-scenes": scenes.COMMAND,
        "make-counting-scenes": counting.COMMAND,
        "draw-docs": pictures.COMMAND,
    },
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return run(COMMANDS, "python -m recipes", argv)


if __name__ == "__main__":
    sys.exit(main())
