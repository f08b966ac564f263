"""``python evaluation/evaluation.py``: run a model over benchmark splits, or compare two runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Started as a file, Python looks for modules beside it, where `evaluation` is this very file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluation.command import COMPARE, RUN
from vpt.cli.parser import build_command_parser
from vpt.cli.run import EXIT_CODES, run

PROG = "evaluation.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or with ``compare`` as first word compare; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        parser = build_command_parser(COMPARE, f"{PROG} compare", EXIT_CODES)
        return run(parser, words[1:])
    return run(build_command_parser(RUN, PROG, EXIT_CODES), words)


if __name__ == "__main__":
    sys.exit(main())
