"""The detector behind ``look_for``: boxes for a phrase, by GroundingDINO or by one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image

from vpt.boxes import iou
from vpt.branches import BranchError
from vpt.errors import CheckpointError, PromptError
from vpt.finders import Finder
from vpt.images import LoadedImage
from vpt.model.folder import model_type
from vpt.model.hub import as_checkpoint_error
from vpt.released import DEFAULT_DETECTOR

if TYPE_CHECKING:
    from vpt.branches import GroundingBranch, Proposal

TEXT_ENCODER = "bert-base-uncased"  # of all released GroundingDINOs

_MODEL_TYPE = "grounding-dino"
_SAME_PLACE_IOU = 0.6  # GroundingDINO may propose several boxes for one thing


class Proposer(Protocol):
    """What finds boxes for a phrase, such as a :class:`vpt.branches.GroundingBranch`."""

    def propose(self, image: Image.Image, phrase: str) -> Sequence[Proposal]:
        """Boxes in an RGB image, best first."""


class Detector(Finder[Proposer, tuple[str, str], "list[Proposal]"]):
    """Finds boxes for phrases, from any number of threads; GroundingDINO is loaded when needed.

    Args:
        source: a folder or hub id in transformers' format; a file ``*.pth`` of weights released by
            IDEA-Research; a :class:`Proposer`; or ``None`` for none.
        device: of the weights, which are float32.

    Attributes:
        name: path, id, or class of the source; empty without one.
    """

    _lacking = (
        f"look_for needs a detector: load the model with detector={DEFAULT_DETECTOR!r}, or "
        "another one (--detector at the command line)"
    )
    _most_kept = 256

    def propose(self, image: LoadedImage, phrase: str) -> list[Proposal]:
        """Boxes for a phrase in an image, best first; those of recent questions are kept.

        Raises:
            CheckpointError: if the detector cannot be loaded.
            PromptError: if there is no detector, or it cannot read the phrase.
        """
        source, words = self.load(), " ".join(phrase.split())

        def find() -> list[Proposal]:
            try:
                return list(_propose(source, image.pixels, words))
            except BranchError as exc:
                raise PromptError(f"look_for={phrase!r}: {exc}") from exc

        return self._find((image.digest, words), find)

    @staticmethod
    def _load(source: str, device: torch.device | str) -> Proposer:
        return _load(source, device)


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
