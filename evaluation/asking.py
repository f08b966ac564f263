"""The model in this process, as an evaluation asks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vpt.evaluation.conditions import Condition
from vpt.evaluation.provenance import describe_model, describe_surroundings
from vpt.evaluation.records import Record
from vpt.evaluation.runner import Decoding, Work, run_task
from vpt.protocol.tokens import branches_of_mode

if TYPE_CHECKING:
    from vpt.runtime import Runtime


class LocalAsker:
    """Asks a runtime of this process.

    Args:
        runtime: of the model.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def describe(self) -> Mapping[str, Any]:
        """See :class:`vpt.evaluation.evaluate.Asker`."""
        return {
            "model": describe_model(self.runtime),
            "surroundings": describe_surroundings(self.runtime),
        }

    def check(self, conditions: Sequence[Condition]) -> None:
        """See :class:`vpt.evaluation.evaluate.Asker`."""
        check_conditions(conditions, self.runtime.vocabulary.branches)

    def ask(self, work: Sequence[Work], decoding: Decoding, batch_size: int) -> Iterator[Record]:
        """See :class:`vpt.evaluation.evaluate.Asker`; one task after the other."""
        for one in work:
            yield from run_task(self.runtime, one.task, one.samples, decoding, batch_size)


def check_conditions(conditions: Sequence[Condition], branches: Sequence[str]) -> None:
    """Make sure that a model can look as conditions want.

    Args:
        conditions: that are wanted.
        branches: of the model.

    Raises:
        PromptError: if it cannot.
    """
    for condition in conditions:
        mode = "region" if condition.true_region else condition.options["perception"]
        branches_of_mode(mode, branches)
