"""``python evaluation/evaluation.py``: run a model over benchmark splits, or compare two runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vpt.cli.eval import COMPARE, RUN
from vpt.cli.run import run

PROG = "evaluation.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or with ``compare`` as first word compare; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        return run(COMPARE, f"{PROG} compare", words[1:])
    return run(RUN, PROG, words)


if __name__ == "__main__":
    sys.exit(main())
