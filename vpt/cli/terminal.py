"""Write to the person at the terminal, without harm to the terminal."""

from __future__ import annotations

import sys

from vpt.view.wording import printable


def print_out(text: str, *, end: str = "\n") -> None:
    """Write what was asked for, on stdout, at once."""
    sys.stdout.write(printable(text) + end)
    sys.stdout.flush()


def print_err(text: str, *, name: str = "vpt: ", before: str = "") -> None:
    """Write lines about the run, on stderr, at once."""
    sys.stderr.write(f"{before}{name}{printable(text)}\n")
    sys.stderr.flush()
