"""The ``vpt`` command and its subcommands."""

from vpt.cli.run import main

__all__ = ["main"]
