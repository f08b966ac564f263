"""What a command that makes rows could not use, and why."""

from __future__ import annotations

from collections.abc import Sequence

from vpt.cli.terminal import print_err
from vpt.view.wording import count_words

_NUM_LISTED = 5


def say_left_out(problems: Sequence[tuple[str, str]], noun: str) -> None:
    """Say how many sources were left out, and of the first ones why.

    Args:
        problems: which, and why.
        noun: what the sources are, e.g. ``"photo"``.
    """
    if not problems:
        return
    print_err(f"{count_words(len(problems), noun)} left out:")
    for which, why in problems[:_NUM_LISTED]:
        print_err(f"  {which}: {why}")
