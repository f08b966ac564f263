"""The arguments by which tokens are chosen, wherever a command has answers written."""

from __future__ import annotations

import argparse

from vpt.cli.parser import number, whole_number


def add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    """Add one argument per field of :class:`vpt.inference.sampling.Sampling`."""
    group.add_argument(
        "--temperature",
        type=number(0),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default: 0)",
    )
    group.add_argument(
        "--top-p",
        type=number(0, 1),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that hold this probability (default: 1)",
    )
    group.add_argument(
        "--top-k",
        type=whole_number(0),
        default=0,
        metavar="K",
        help="sample from so many of the likeliest tokens; 0 for all (default: 0)",
    )
    group.add_argument("--seed", type=whole_number(0), default=0, metavar="S", help="(default: 0)")
