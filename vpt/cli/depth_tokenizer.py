"""``vpt depth-tokenizer``: depth maps as tokens, and the network that makes them so."""

from __future__ import annotations

from vpt.cli import (
    depth_tokenizer_decode,
    depth_tokenizer_encode,
    depth_tokenizer_report,
    depth_tokenizer_train,
)
from vpt.cli.parser import CommandGroup

COMMANDS = CommandGroup(
    help="turn depth maps into tokens and back",
    description=(
        "Turn depth maps into the tokens by which a model writes them (Aurora, arXiv 2412.03548),\n"
        "and back; train the tokenizer that does it, and measure what it keeps."
    ),
    commands={
        "train": depth_tokenizer_train.COMMAND,
        "encode": depth_tokenizer_encode.COMMAND,
        "decode": depth_tokenizer_decode.COMMAND,
        "report": depth_tokenizer_report.COMMAND,
    },
)
