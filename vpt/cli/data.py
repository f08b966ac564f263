"""``vpt data``: what has to do with the data that models are trained and measured on."""

from __future__ import annotations

from vpt.cli import (
    data_build,
    data_check,
    data_make_counting_rows,
    data_make_curriculum,
    data_make_depth_rows,
)
from vpt.cli.parser import CommandGroup

COMMANDS = CommandGroup(
    help="build and check training data",
    description=(
        "Build data for training, and find out what is wrong with data before it is used.\n\n"
        "For models that write depth maps and boxes (Aurora): make-depth-rows and\n"
        "make-counting-rows, and make-curriculum, which mixes their rows. Generated pictures are\n"
        "made in a checkout: python -m recipes --help."
    ),
    commands={
        "build": data_build.COMMAND,
        "check": data_check.COMMAND,
        "make-depth-rows": data_make_depth_rows.COMMAND,
        "make-counting-rows": data_make_counting_rows.COMMAND,
        "make-curriculum": data_make_curriculum.COMMAND,
        # A further command is one file with a Command, and one row here.
    },
)
