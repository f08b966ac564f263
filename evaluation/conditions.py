"""Conditions under which samples are asked: ways to look, and looks that are not what they seem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpt.data.regions import region_to_show
from vpt.errors import PromptError, RegionError
from vpt.evaluation.samples import Sample
from vpt.protocol.tokens import PERCEPTION_MODES


@dataclass(frozen=True)
class Condition:
    """One way to ask every sample of a split.

    Attributes:
        name: as on the command line.
        about: what it does, in a line.
        options: of :class:`vpt.inference.conversation.Request`.
        true_region: whether the first call is the region around the sample's evidence.
    """

    name: str
    about: str
    options: Mapping[str, Any]
    true_region: bool = False

    def request_options(
        self, sample: Sample, size_wh: tuple[int, int], grid_size: int
    ) -> dict[str, Any] | None:
        """Options for one sample, or ``None`` if it cannot be asked so.

        Args:
            sample: to ask.
            size_wh: of its first image, in pixels.
            grid_size: cells along each side of the model's region grid.
        """
        if not self.true_region:
            return dict(self.options)
        if sample.box is None:
            return None
        try:
            region = region_to_show(sample.box, size_wh, grid_size=grid_size)
        except RegionError:
            return None
        return {**self.options, "region": region}


_MODE_WORDS = {
    "auto": "the model's own calls",
    "none": "no calls",
    "region": "a region is asked for",
    "reencode": "a re-encoding is asked for",
}
CONDITIONS: Mapping[str, Condition] = {
    **{
        mode: Condition(
            mode,
            _MODE_WORDS.get(mode, f"a re-encoding by {mode} is asked for"),
            {"perception": mode},
        )
        for mode in PERCEPTION_MODES
    },
    "blank": Condition(
        "blank",
        "own calls, each brings a gray picture",
        {"perception": "auto", "replace_looks": "blank"},
    ),
    "random": Condition(
        "random",
        "own calls, each region is cut from a random place",
        {"perception": "auto", "replace_looks": "random"},
    ),
    "truth": Condition(
        "truth", "the first call is the region of the evidence", {"perception": "auto"}, True
    ),
}
TOOL_VALUE = ("none", "auto", "blank", "random", "truth")
"""What it takes to see whether looking again helps."""


def find_conditions(names: Sequence[str]) -> list[Condition]:
    """Look conditions up by their names, each once, in the order given.

    Raises:
        PromptError: for an unknown name, or no names.
    """
    if not names:
        raise PromptError(f"name at least one perception; available: {', '.join(CONDITIONS)}")
    for name in names:
        if name not in CONDITIONS:
            raise PromptError(f"unknown perception {name!r}; available: {', '.join(CONDITIONS)}")
    return [CONDITIONS[name] for name in dict.fromkeys(names)]
