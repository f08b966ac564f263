"""The detector behind ``look_for``: boxes for a phrase, by GroundingDINO or by one's own."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image

from vpt.boxes import iou
from vpt.branches import BranchError
from vpt.errors import CheckpointError, PromptError
from vpt.images import LoadedImage
from vpt.model.folder import model_type
from vpt.model.hub import as_checkpoint_error
from vpt.released import DEFAULT_DETECTOR

if TYPE_CHECKING:
    from vpt.branches import GroundingBranch, Proposal

TEXT_ENCODER = "bert-base-uncased"  # of all released GroundingDINOs

_MODEL_TYPE = "grounding-dino"
_MOST_KEPT = 256  # results
_SAME_PLACE_IOU = 0.6  # GroundingDINO may propose several boxes for one thing


class Proposer(Protocol):
    """What finds boxes for a phrase, such as a :class:`vpt.branches.GroundingBranch`."""

    def propose(self, image: Image.Image, phrase: str) -> Sequence[Proposal]:
        """Boxes in an RGB image, best first."""


class Detector:
    """Finds boxes for phrases, from any number of threads; GroundingDINO is loaded when needed.

    Args:
        source: a folder or hub id in transformers' format; a file ``*.pth`` of weights released by
            IDEA-Research; a :class:`Proposer`; or ``None`` for none.
        device: of the weights, which are float32.

    Attributes:
        name: path, id, or class of the source; empty without one.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Proposer | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._source, self._device = source, device
        self.name = source_name(source)
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, str], list[Proposal]] = OrderedDict()

    def check(self) -> None:
        """Raise ``PromptError`` if there is no detector."""
        if self._source is None:
            raise PromptError(
                f"look_for needs a detector: load the model with detector={DEFAULT_DETECTOR!r}, or "
                "another one (--detector at the command line)"
            )

    def propose(self, image: LoadedImage, phrase: str) -> list[Proposal]:
        """Boxes for a phrase in an image, best first; those of recent questions are kept.

        Raises:
            CheckpointError: if the detector cannot be loaded.
            PromptError: if there is no detector, or it cannot read the phrase.
        """
        self.check()
        key = image.digest, " ".join(phrase.split())
        with self._lock:
            if key not in self._found:
                if isinstance(self._source, str | os.PathLike):
                    self._source = _load(os.fspath(self._source), self._device)
                assert self._source is not None  # or check would have refused
                try:
                    self._found[key] = list(_propose(self._source, image.pixels, key[1]))
                except BranchError as exc:
                    raise PromptError(f"look_for={phrase!r}: {exc}") from exc
            self._found.move_to_end(key)
            if len(self._found) > _MOST_KEPT:
                self._found.popitem(last=False)
            return self._found[key]


def source_name(source: object) -> str:
    """Name of what a detector or segmenter is made of, for records of runs."""
    if source is None:
        return ""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__qualname__


def _propose(source: Proposer, image: Image.Image, phrase: str) -> Sequence[Proposal]:
    """Proposals of a detector; of those of GroundingDINO, the best one for each place."""
    from vpt.branches import GroundingBranch

    if not isinstance(source, GroundingBranch):
        return source.propose(image, phrase)
    phrase = phrase.strip(" .?")
    if set(".?") & set(phrase):
        raise BranchError(
            "expected one phrase; got several, because GroundingDINO splits at each full stop "
            "and question mark; leave these out, or ask for each phrase by itself"
        )
    found: list[Proposal] = []
    for one in source.propose(image, phrase):
        if all(iou(one.box_xyxy_px, better.box_xyxy_px) < _SAME_PLACE_IOU for better in found):
            found.append(one)
    return found


def _load(source: str, device: torch.device | str) -> GroundingBranch:
    from vpt.branches import GroundingBranch
    from vpt.branches.groundingdino import load_tokenizer

    with as_checkpoint_error(f"cannot load the detector {source}"):
        if not source.endswith(".pth"):
            if (kind := model_type(source)) not in (None, _MODEL_TYPE):
                raise CheckpointError(f"{source} holds a model of type {kind!r}, no {_MODEL_TYPE}")
            return GroundingBranch.from_transformers(source).to(device)
        if not Path(source).is_file():
            raise FileNotFoundError("there is no such file")
        with as_checkpoint_error(f"cannot load the words of {source}, those of {TEXT_ENCODER}"):
            tokenizer = load_tokenizer(TEXT_ENCODER)
        return GroundingBranch.from_checkpoint(source, tokenizer).to(device)
