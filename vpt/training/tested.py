"""The LLaMA-Factory all this was tested with, and the one way in which its names are replaced."""

from __future__ import annotations

from collections.abc import Callable

from llamafactory.train.sft import workflow

from vpt.errors import TrainingError

TESTED = "llamafactory 0.9.5"
"""Named by errors about any other."""


def replace_in_workflow(
    name: str, stock: object, ours: object, is_ours: Callable[[object], bool]
) -> None:
    """Replace a name that LLaMA-Factory's fine-tuning uses, for which it has no registry.

    Args:
        name: in ``llamafactory.train.sft.workflow``.
        stock: what is there in the tested version.
        ours: what takes its place.
        is_ours: whether something there is an earlier one of ours.

    Raises:
        TrainingError: if the name is not used as in the tested version.
    """
    current = getattr(workflow, name, None)
    used = getattr(workflow.run_sft, "__code__", None)
    if used is None or name not in used.co_names or not (current is stock or is_ours(current)):
        raise TrainingError(
            f"llamafactory.train.sft.workflow does not use {name} as expected; this was tested "
            f"with {TESTED}"
        )
    setattr(workflow, name, ours)
