"""``python -m recipes``: the generated data of the shipped model and of the small experiments."""

import sys

from recipes.counting import command as counting
from recipes.embedded import command as embedded
from recipes.scenes import command as scenes
from vpt.cli.parser import build_parser
from vpt.cli.run import EXIT_CODES, run

COMMANDS = {
    "make-embedded": embedded.COMMAND,
    "make-scenes": scenes.COMMAND,
    "make-counting-scenes": counting.COMMAND,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    example = "example:\n  python -m recipes make-embedded --out data/few --fraction 0.001"
    parser = build_parser(COMMANDS, example, EXIT_CODES, "python -m recipes", __doc__ or "")
    return run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
