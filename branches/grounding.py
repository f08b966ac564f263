"""The grounding branch: open-vocabulary boxes for a phrase, and their features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vpt.branches.base import BranchError, Features
from vpt.branches.encoder import check_images, check_values, read_settings
from vpt.branches.groundingdino import (
    Caption,
    Detections,
    check_tokenizer,
    decode_phrase,
    detect,
    load_port,
    load_released,
    load_tokenizer,
    make_caption,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RELEASED_EDGES_PX = 800, 1333  # of an image: the shortest edge, the most for the longest
IMAGE_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
# Entries of a preprocessor_config.json; all but the size are those of the released detectors.
_STEPS = ("do_convert_annotations", "do_normalize", "do_pad", "do_rescale", "do_resize")
_SETTINGS = dict.fromkeys(
    (*_STEPS, "format", "image_mean", "image_std", "resample", "rescale_factor", "size")
)

Pixels = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Proposal:
    """One box that a phrase may mean."""

    box_xyxy_px: tuple[int, int, int, int]  # whole pixels of the original image, never empty
    score: float  # 0 to 1
    phrase: str  # part of the caption that this box matches; may be ""


@dataclass(frozen=True)
class GroundedFeatures(Features):
    """The best decoder queries for a phrase, best first; ``grid_hw`` is ``(1, k)``."""

    boxes_cxcywh: Tensor  # [k, 4] centre and size, 0 to 1 of the image
    scores: Tensor  # [k]


class GroundingBranch(nn.Module):
    """GroundingDINO (arXiv 2303.05499). Use a classmethod to build one.

    Args:
        encoder: a ``GroundingDinoForObjectDetection``.
        tokenizer: of its text encoder (BERT); `BranchError` if the tokens that GroundingDINO splits
            captions by do not have their ids of ``bert-base-uncased``.
        edges_px: the shortest edge of an image after resizing, and the most for the longest.
    """

    name = "grounding"

    def __init__(
        self,
        encoder: Any,
        tokenizer: PreTrainedTokenizerBase,
        edges_px: tuple[int, int] = RELEASED_EDGES_PX,
    ) -> None:
        super().__init__()
        check_tokenizer(tokenizer)
        self.encoder = encoder
        self.tokenizer, self.edges_px = tokenizer, edges_px
        self.feature_dim: int = encoder.config.d_model

    @classmethod
    def from_checkpoint(
        cls, weights_path: str | Path, tokenizer: PreTrainedTokenizerBase
    ) -> GroundingBranch:
        """Load weights of the GroundingDINO repository, in evaluation mode.

        Args:
            weights_path: e.g. ``groundingdino_swint_ogc.pth``; read as tensors only, no code.
            tokenizer: that of ``bert-base-uncased``.

        Raises:
            BranchError: if the file holds something else.
        """
        return cls(load_released(weights_path), tokenizer).eval()

    @classmethod
    def from_transformers(
        cls,
        path_or_id: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> GroundingBranch:
        """Load a detector in transformers' format, in evaluation mode.

        Args:
            path_or_id: folder or hub id, e.g. ``IDEA-Research/grounding-dino-tiny``. The ``size``
                in its ``preprocessor_config.json`` sets ``edges_px``.
            tokenizer: by default the one in that folder.
            **kwargs: for ``GroundingDinoForObjectDetection.from_pretrained``.

        Raises:
            BranchError: if the preprocessor settings are not supported, or the text encoder runs in
                eager attention, which is wrong in transformers.
        """
        encoder = load_port(path_or_id, **kwargs)
        tokenizer = tokenizer or load_tokenizer(path_or_id, **kwargs)
        settings = read_settings(path_or_id, _SETTINGS, kwargs) or {}
        return cls(encoder, tokenizer, _edges_px(settings)).eval()

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize RGB images to `edges_px`, normalise and pad them.

        Returns:
            ``pixel_values`` ``[B, 3, H, W]`` float32 and ``pixel_mask`` ``[B, H, W]`` bool, False
            where the batch is padded.
        """
        pixel_values, pixel_mask = pad(
            [normalise(resize(image, self.edges_px)) for image in check_images(images)]
        )
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}

    def encode(
        self,
        pixel_values: Tensor,
        phrase: str,
        *,
        pixel_mask: Tensor | None = None,
        num_queries: int = 16,
    ) -> list[GroundedFeatures]:
        """Encode images for one phrase.

        Each image is encoded without its padding, which would change the result through Swin's
        windows and later convolutions.

        Args:
            pixel_values: ``[B, 3, H, W]`` normalised.
            phrase: what to look for, in all images.
            pixel_mask: ``[B, H, W]`` bool, True at pixels of the image; by default everywhere.
            num_queries: k, the best scored decoder queries to keep.

        Returns:
            B features of ``[k, feature_dim]``, each with its boxes and scores.

        Raises:
            BranchError: if the phrase is empty or too long, or k larger than the decoder has.
        """
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(pixel_values[:, 0].shape, dtype=torch.bool)
        caption = make_caption(self.tokenizer, phrase, self.encoder.config.max_text_len)
        features = []
        for pixels, mask in zip(pixel_values, pixel_mask, strict=True):
            height, width = int(mask[:, 0].sum()), int(mask[0].sum())
            found = self._look(pixels[None, :, :height, :width], caption)
            features.append(_best(found, num_queries))
        return features

    @torch.no_grad()
    def propose(
        self,
        image: Image.Image,
        phrase: str,
        *,
        box_threshold: float = 0.35,
        text_threshold: float = 0.25,
        max_proposals: int = 16,
    ) -> list[Proposal]:
        """Find boxes for a phrase, as ``groundingdino.util.inference.predict`` does.

        Args:
            phrase: what to look for; several, separated by ``" . "``, share one pass.
            box_threshold: a box is kept if the score of its best token is above.
            text_threshold: a token belongs to a box's phrase if its score is above.

        Returns:
            Best first; boxes are rounded outwards to whole pixels and lie inside the image.

        Raises:
            BranchError: if the image is not RGB, or the phrase empty or too long.
        """
        pixels = self.preprocess([image])
        caption = make_caption(self.tokenizer, phrase, self.encoder.config.max_text_len)
        found = self._look(pixels["pixel_values"], caption)
        scores, order = found.token_scores.amax(dim=-1).sort(descending=True, stable=True)
        proposals = []
        for score, row in zip(scores.tolist()[:max_proposals], order.tolist(), strict=False):
            if score > box_threshold:
                box = to_pixels(found.boxes_cxcywh[row].tolist(), image.size)
                chosen = found.token_scores[row] > text_threshold
                text = decode_phrase(self.tokenizer, caption, chosen)
                proposals.append(Proposal(box, score, text))
        return proposals

    def _look(self, pixel_values: Tensor, caption: Caption) -> Detections:
        weight = next(self.encoder.parameters())
        tokens = {name: ids.to(weight.device) for name, ids in caption.tokens.items()}
        return detect(self.encoder, pixel_values.to(weight), Caption(caption.text, tokens))


def _edges_px(settings: Mapping[str, Any]) -> tuple[int, int]:
    """The edges that the settings of an image processor name; by default the released ones."""
    check_values(settings)
    size = settings.get("size", {})
    if unknown := set(size) - {"shortest_edge", "longest_edge"}:
        raise BranchError(f"size: expected shortest_edge and longest_edge, got {sorted(unknown)}")
    shortest, longest = RELEASED_EDGES_PX
    return size.get("shortest_edge", shortest), size.get("longest_edge", longest)


def _best(found: Detections, num_queries: int) -> GroundedFeatures:
    scores = found.token_scores.amax(dim=-1)  # [Q]
    if not 1 <= num_queries <= len(scores):
        raise BranchError(
            f"num_queries must be 1 to {len(scores)}, the decoder's; got {num_queries}"
        )
    scores, rows = scores.topk(num_queries)
    boxes = found.boxes_cxcywh[rows]
    return GroundedFeatures(found.hidden_states[rows], (1, num_queries), boxes, scores)


def resize(image: Image.Image, edges_px: tuple[int, int] = RELEASED_EDGES_PX) -> Image.Image:
    """Resize as ``RandomResize`` of groundingdino/datasets/transforms.py, to at least one pixel."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    edge, longest = edges_px
    if long / short * edge > longest:
        edge = round(longest * short / long)
    if short == edge:
        return image
    scaled = int(edge * long / short) or longest
    edge = edge or 1  # of a line of pixels
    size = (edge, scaled) if width < height else (scaled, edge)
    return image.resize(size, Image.Resampling.BILINEAR)


def normalise(image: Image.Image) -> Pixels:
    """Turn an RGB image into ``[3, h, w]`` with the mean and spread of ImageNet removed."""
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)  # [h, w, 3]
    return np.ascontiguousarray(((pixels - IMAGE_MEAN) / IMAGE_STD).transpose(2, 0, 1))


def to_pixels(box_cxcywh: Sequence[float], size_wh: tuple[int, int]) -> tuple[int, int, int, int]:
    """Round outwards to whole pixels inside the image, at least one wide and high."""
    edges = []
    for centre, extent, size in zip(box_cxcywh[:2], box_cxcywh[2:], size_wh, strict=True):
        low = math.floor((centre - extent / 2) * size)
        high = math.ceil((centre + extent / 2) * size)
        low = min(max(low, 0), size - 1)
        edges.append((low, min(max(high, low + 1), size)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def pad(arrays: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
    """Batch ``[3, h, w]`` arrays, padded right and bottom; the mask is False there."""
    height = max(array.shape[1] for array in arrays)
    width = max(array.shape[2] for array in arrays)
    pixel_values = torch.zeros(len(arrays), 3, height, width)
    pixel_mask = torch.zeros(len(arrays), height, width, dtype=torch.bool)
    for i, array in enumerate(arrays):
        pixel_values[i, :, : array.shape[1], : array.shape[2]] = torch.from_numpy(array)
        pixel_mask[i, : array.shape[1], : array.shape[2]] = True
    return pixel_values, pixel_mask
