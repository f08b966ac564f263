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
from vpt.branches.encoder import check_images
from vpt.branches.groundingdino import (
    Caption,
    Detect,
    Detections,
    build_package_encoder,
    check_tokenizer,
    decode_phrase,
    detect_by_package,
    detect_by_port,
    load_package_weights,
    load_port,
    load_tokenizer,
    make_caption,
)

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedTokenizerBase


SHORTEST_EDGE_PX, LONGEST_EDGE_PX = 800, 1333
IMAGE_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)

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
        encoder: a GroundingDINO of either implementation.
        tokenizer: of its text encoder (BERT); `BranchError` if it lacks a token that GroundingDINO
            splits captions by.
        max_text_len: tokens a caption may have.
    """

    name = "grounding"

    def __init__(
        self,
        encoder: nn.Module,
        detect: Detect,
        tokenizer: PreTrainedTokenizerBase,
        *,
        feature_dim: int,
        max_text_len: int,
    ) -> None:
        super().__init__()
        check_tokenizer(tokenizer)
        self.encoder, self.tokenizer = encoder, tokenizer
        self.feature_dim, self._max_text_len = feature_dim, max_text_len
        self._detect = detect

    @classmethod
    def from_config(
        cls,
        config: str | Path | Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_config: BertConfig | None = None,
    ) -> GroundingBranch:
        """Build groundingdino-py's model with random weights, in evaluation mode.

        Args:
            config: a config file of the package (``groundingdino/config/*.py``; it is Python and
                is run) or its entries.
            tokenizer: of the text encoder, e.g. that of ``bert-base-uncased``.
            text_config: of the text encoder; by default BERT base.

        Raises:
            BranchError: if the package is missing or of an unknown version, or the config is not
                supported.
        """
        check_tokenizer(tokenizer)
        encoder = build_package_encoder(config, tokenizer, text_config)
        sizes = {"feature_dim": encoder.hidden_dim, "max_text_len": encoder.max_text_len}
        return cls(encoder, detect_by_package, tokenizer, **sizes).eval()

    @classmethod
    def from_checkpoint(
        cls,
        weights_path: str | Path,
        config_path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_config: BertConfig | None = None,
    ) -> GroundingBranch:
        """Build groundingdino-py's model and load its released weights; see `from_config`.

        Args:
            weights_path: e.g. ``groundingdino_swint_ogc.pth``; read as tensors only, no code.
            config_path: the config file of these weights.

        Raises:
            BranchError: as `from_config`, or if the weights do not fit.
        """
        branch = cls.from_config(config_path, tokenizer, text_config=text_config)
        load_package_weights(branch.encoder, weights_path)
        return branch

    @classmethod
    def from_transformers(
        cls,
        path_or_id: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> GroundingBranch:
        """Load transformers' own port, which needs no other package, in evaluation mode.

        Args:
            path_or_id: folder or hub id, e.g. ``IDEA-Research/grounding-dino-tiny``.
            tokenizer: by default the one in that folder.
            **kwargs: for ``GroundingDinoForObjectDetection.from_pretrained``.

        Raises:
            BranchError: if the installed transformers computes wrong positions in a phrase
                (5.0 to 5.17), or the text encoder runs in eager attention, which is wrong too.
        """
        encoder = load_port(path_or_id, **kwargs)
        tokenizer = tokenizer or load_tokenizer(path_or_id, **kwargs)
        config = encoder.config
        sizes = {"feature_dim": config.d_model, "max_text_len": config.max_text_len}
        return cls(encoder, detect_by_port, tokenizer, **sizes).eval()

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize RGB images (shortest edge 800, longest at most 1333), normalise and pad them.

        Returns:
            ``pixel_values`` ``[B, 3, H, W]`` float32 and ``pixel_mask`` ``[B, H, W]`` bool, False
            where the batch is padded.
        """
        pixel_values, pixel_mask = pad([normalise(resize(image)) for image in check_images(images)])
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
        caption = make_caption(self.tokenizer, phrase, self._max_text_len)
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
        caption = make_caption(self.tokenizer, phrase, self._max_text_len)
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
        return self._detect(self.encoder, pixel_values.to(weight), Caption(caption.text, tokens))


def _best(found: Detections, num_queries: int) -> GroundedFeatures:
    scores = found.token_scores.amax(dim=-1)  # [Q]
    if not 1 <= num_queries <= len(scores):
        raise BranchError(
            f"num_queries must be 1 to {len(scores)}, the decoder's; got {num_queries}"
        )
    scores, rows = scores.topk(num_queries)
    boxes = found.boxes_cxcywh[rows]
    return GroundedFeatures(found.hidden_states[rows], (1, num_queries), boxes, scores)


def resize(image: Image.Image) -> Image.Image:
    """Resize as ``RandomResize([800], max_size=1333)`` of groundingdino/datasets/transforms.py."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    edge = SHORTEST_EDGE_PX
    if long / short * edge > LONGEST_EDGE_PX:
        edge = round(LONGEST_EDGE_PX * short / long)
    if short == edge:
        return image
    scaled = int(edge * long / short)
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
