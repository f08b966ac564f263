"""Rows encoded for a model: token ids, labels and pixels, alone or in batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vpt.branches.base import ModelBranch
from vpt.errors import FeatureCountError, PromptError, RegionError
from vpt.images import LoadedImage, fit_for_tower, from_pixels, load_image, locate_image
from vpt.model.config import VPTSettings
from vpt.model.modeling import backbone_of, build_branch
from vpt.model.processing import VPTProcessor
from vpt.model.projectors import token_grid
from vpt.protocol.rows import (
    KINDS,
    list_images,
    read_turns,
    split_crop_suffix,
    write_placeholders,
    write_turns,
)
from vpt.protocol.tokens import BRANCH_TOKENS, PLAIN, VISION_END

IGNORE_INDEX = -100


def open_row_image(path: str, root: Path | None = None) -> LoadedImage:
    """Open an image of a row and cut what its crop suffix names; black outside, as released.

    Raises:
        ImageError: if it cannot be read.
        RegionError: if the box is empty.
    """
    plain, box = split_crop_suffix(path)
    image = load_image(locate_image(plain, root))
    if box is None:
        return image
    if box[2] <= box[0] or box[3] <= box[1]:
        raise RegionError(f"{path} names an empty box; expected x0 < x1 and y0 < y1")
    return from_pixels(image.pixels.crop(box), path)


class Pixels:
    """Opens images and preprocesses them for a model."""

    def __init__(
        self,
        config: VPTSettings,
        processor: VPTProcessor,
        open_image: Callable[[Any], LoadedImage],
    ) -> None:
        self.config = config
        self.open_image = open_image
        backbone = backbone_of(config, image_processor=processor.image_processor)
        with torch.device("meta"):  # only their preprocessing is used here
            self._branches = {
                name: build_branch(name, config, backbone) for name in (PLAIN, *config.branches)
            }
        self._opened: dict[Hashable, LoadedImage] = {}

    def __call__(
        self, images: Sequence[tuple[str, Hashable]]
    ) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Open and preprocess images.

        Args:
            images: kind, a key of :data:`vpt.protocol.rows.KINDS`, and path of each.

        Returns:
            Arguments of forward, in which images of one kind keep their order; and per kind how
            many placeholder tokens each image takes.
        """
        pixels: dict[str, Tensor] = {}
        sizes: dict[str, list[int]] = {}
        for kind, opened in self._open(images).items():
            sizes[kind] = [self.num_tokens(kind, image.size_wh) for image in opened]
            values = self.preprocess(kind, [image.pixels for image in opened])
            pixels |= zip(forward_arguments(kind), values, strict=True)
        return pixels, sizes

    def count(self, images: Sequence[tuple[str, Hashable]]) -> dict[str, list[int]]:
        """Placeholder tokens of images, as ``__call__`` returns them, without preprocessing.

        Every image is opened, so that unreadable ones are found before training.
        """
        return {
            kind: [self.num_tokens(kind, image.size_wh) for image in opened]
            for kind, opened in self._open(images).items()
        }

    def _open(self, images: Sequence[tuple[str, Hashable]]) -> dict[str, list[LoadedImage]]:
        """Open images, once each, and not again those of the row before: rows often share one."""
        for kind, _ in images:
            if kind not in (PLAIN, *self.config.branches):
                have = ", ".join(self.config.branches) or "none"
                raise PromptError(
                    f"the row has images for {kind!r}, but the model lacks that branch; "
                    f"it has: {have}"
                )
        known = self._opened
        self._opened = {
            source: known[source] if source in known else self.open_image(source)
            for source in dict.fromkeys(source for _, source in images)
        }
        opened: dict[str, list[LoadedImage]] = {}
        for kind, source in images:
            opened.setdefault(kind, []).append(self._opened[source])
        return opened

    def preprocess(self, kind: str, images: Sequence[Image.Image]) -> list[Tensor]:
        """Pixels of RGB images of a kind, in the order of :func:`forward_arguments`."""
        fitted = [self._fit(kind, image) for image in images]
        return list(self._encoder(kind).preprocess(fitted).values())

    def num_tokens(self, kind: str, size_wh: tuple[int, int]) -> int:
        """Placeholder tokens of an image of this size."""
        height, width = self.grid_hw(kind, size_wh)
        return height * width

    def grid_hw(self, kind: str, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Grid of the placeholder tokens of an image of this size."""
        fitted = self._fit(kind, Image.new("1", size_wh))
        grid_hw = self._encoder(kind).grid_hw(fitted.size)
        return token_grid(BRANCH_TOKENS[kind].stem, grid_hw) if kind in BRANCH_TOKENS else grid_hw

    def _encoder(self, kind: str) -> ModelBranch:
        return self._branches[kind]

    def _fit(self, kind: str, pixels: Image.Image) -> Image.Image:
        min_side, max_side = self._encoder(kind).min_side, self.config.max_side(kind)
        return fit_for_tower(pixels, min_side=min_side, max_side=max_side)


def forward_arguments(kind: str) -> tuple[str, ...]:
    """Names of the pixels of a kind of image in :meth:`VPTForConditionalGeneration.forward`."""
    return ("pixel_values", "image_grid_thw") if kind == PLAIN else BRANCH_TOKENS[kind].arguments


def join_pixels(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Arguments of forward for a batch, of those of its rows."""
    names = [name for kind in KINDS for name in forward_arguments(kind)]
    parts = {name: [pixels[name] for pixels in rows if name in pixels] for name in names}
    return {name: torch.cat(values) for name, values in parts.items() if values}


@dataclass(frozen=True)
class EncodedRow:
    """One encoded row.

    Attributes:
        input_ids: ``[S]``; for prediction the prompt only.
        labels: for training ``[S]``, -100 outside assistant turns and on control tokens; for
            prediction the last answer.
        pixels: arguments of the model's forward.
    """

    input_ids: list[int]
    labels: list[int]
    pixels: Mapping[str, Tensor] = field(default_factory=dict)


class RowEncoder:
    """Encodes rows for a model."""

    def __init__(
        self,
        config: VPTSettings,
        processor: VPTProcessor,
        open_image: Callable[[str], LoadedImage] = open_row_image,
    ) -> None:
        self.processor = processor
        self.pixels = Pixels(config, processor, open_image)
        self._actions = {config.action_id(name) for name in config.branches}

    def encode(
        self, row: Mapping[str, Any], *, predict: bool = False, cutoff_len: int | None = None
    ) -> EncodedRow:
        """Encode one row.

        Args:
            predict: leave the last answer out of the ids and make it the labels.
            cutoff_len: tokens at most, in training; each turn is cut as :func:`share_room`
                says, and turns without room are left out. An image may lose placeholders: the
                model then refuses the sample.

        Raises:
            PromptError: if the turns are not user and assistant by turns.
            FeatureCountError: if placeholders and images of a row differ in number.
        """
        turns = read_turns(row)
        pixels, sizes = self.pixels(list_images(row))
        ids, labels = self.encode_turns(turns, sizes, predict=predict, cutoff_len=cutoff_len)
        return EncodedRow(ids, labels, pixels)

    def encode_turns(
        self,
        turns: tuple[str, Sequence[tuple[str, str]]],
        sizes: Mapping[str, Sequence[int]],
        *,
        predict: bool = False,
        cutoff_len: int | None = None,
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of :meth:`encode`, without pixels.

        Args:
            turns: as :func:`vpt.protocol.rows.read_turns` reads them.
            sizes: kind of image -> number of tokens of each.
            predict: as in :meth:`encode`.
            cutoff_len: as in :meth:`encode`.

        Raises:
            FeatureCountError: if placeholders and sizes of a kind differ in number.
        """
        system, pairs = turns
        asked = write_placeholders([asked for asked, _ in pairs], sizes)
        ids: list[int] = []
        labels: list[int] = []
        texts = write_turns(system, asked, [answered for _, answered in pairs])
        for number, (prompt, answer) in enumerate(texts):
            prompt_ids = self.processor.encode_text(prompt).ids
            answer_ids = list(self.processor.encode_text(answer).ids)
            if cutoff_len is not None and not predict:
                room = cutoff_len - len(ids)
                num_prompt, num_answer = share_room(len(prompt_ids), len(answer_ids), room)
                prompt_ids, answer_ids = prompt_ids[:num_prompt], answer_ids[:num_answer]
            ids += prompt_ids
            labels += [IGNORE_INDEX] * len(prompt_ids)
            if predict and number == len(texts) - 1:
                labels = answer_ids
                break
            ids += answer_ids
            labels += [IGNORE_INDEX if i in self._actions else i for i in answer_ids]
        return ids, labels


def share_room(num_prompt: int, num_answer: int, room: int) -> tuple[int, int]:
    """Numbers of tokens kept of a prompt and its answer, as LLaMA-Factory 0.9 shares room.

    A short answer is kept whole and the prompt is cut; with a short prompt the answer is cut; of
    two long ones each keeps its share. Both are cut at their ends.
    """
    room = max(room, 0)
    if 2 * num_answer < room:
        kept_answer = num_answer
    elif 2 * num_prompt < room:
        kept_answer = min(num_answer, room - num_prompt)
    else:
        kept_answer = min(num_answer, int(room * (num_answer / (num_prompt + num_answer))))
    return min(num_prompt, room - kept_answer), kept_answer


def drop_cut_images(
    ids: list[int], sizes: Mapping[str, Sequence[int]], tokenizer: Any
) -> dict[str, int]:
    """Overwrite the rest of an image through which a row was cut with padding, in place.

    Args:
        sizes: kind of image -> number of tokens of each before the cut.

    Returns:
        Kind -> number of whole images, which are the first ones.
    """
    vision_end = tokenizer.convert_tokens_to_ids(VISION_END)
    kind_of_pad = {tokenizer.convert_tokens_to_ids(KINDS[k].pad): k for k in KINDS}
    num_kept = dict.fromkeys(sizes, 0)
    start = 0
    for token_id, run in itertools.groupby(list(ids)):
        end = start + len(list(run))
        if (kind := kind_of_pad.get(token_id)) is not None:
            waiting = sizes.get(kind, ())[num_kept.get(kind, 0) :]
            is_cut = end == len(ids) or ids[end] != vision_end
            if waiting and end - start == waiting[0]:
                num_kept[kind] += 1
            elif waiting and end - start < waiting[0] and is_cut:
                ids[start:end] = [tokenizer.pad_token_id] * (end - start)
            else:
                size = waiting[0] if waiting else 0
                raise FeatureCountError(
                    f"{end - start} {KINDS[kind].pad} tokens for an image of {size}; was the row "
                    "encoded for another model? If LLaMA-Factory had it in a cache, set "
                    "`overwrite_cache: true`"
                )
        start = end
    return num_kept


def collate(
    samples: Sequence[EncodedRow],
    pad_token_id: int,
    *,
    side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Make a padded batch: ``input_ids``, ``attention_mask``, ``labels`` ``[B, S]``, and pixels.

    Args:
        side: of the padding: ``"right"`` for training, ``"left"`` for generation.
        pad_to_multiple_of: round the length up to a multiple of this.
    """
    columns = {
        "input_ids": (pad_token_id, [sample.input_ids for sample in samples]),
        "attention_mask": (0, [[1] * len(sample.input_ids) for sample in samples]),
        "labels": (IGNORE_INDEX, [sample.labels for sample in samples]),
    }
    batch = {}
    for name, (fill, rows) in columns.items():
        multiple = pad_to_multiple_of or 1
        width = -(-max(len(row) for row in rows) // multiple) * multiple
        padding = [[fill] * (width - len(row)) for row in rows]
        pairs = zip(rows, padding, strict=True)
        padded = [row + pad if side == "right" else pad + row for row, pad in pairs]
        batch[name] = torch.tensor(padded)
    return batch | join_pixels([sample.pixels for sample in samples])
