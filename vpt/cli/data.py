"""``vpt data``: what has to do with the data that models are trained and measured on."""

from __future__ import annotations

from vpt.cli import data_build, data_check, data_make_embedded, data_make_scenes
from vpt.cli.parser import CommandGroup

COMMANDS = CommandGroup(
    help="build and check training data",
    description="Build data for training, and find out what is wrong with data before it is used.",
    commands={
        "build": data_build.COMMAND,
        "check": data_check.COMMAND,
        "make-embedded": data_make_embedded.COMMAND,
        "make-scenes": data_make_scenes.COMMAND,
        # A further command is one file with a Command, and one row here.
    },
)
