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
from vpt.model.config import VPTConfig
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
from vpt.protocol.tokens import BRANCH_TOKENS, TOWER, VISION_END

IGNORE_INDEX = -100


def open_row_image(path: str, root: Path | None = None) -> LoadedImage:
    """Open an image of a row, its crop suffix understood.

    Raises:
        ImageError: if it cannot be read.
        RegionError: if the box is empty. One that reaches out of the image is filled with
            black, as released.
    """
    plain, box = split_crop_suffix(path)
    image = load_image(locate_image(plain, root))
    if box is None:
        return image
    if box[2] <= box[0] or box[3] <= box[1]:
        raise RegionError(f"{path} names an empty box; expected x0 < x1 and y0 < y1")
    return from_pixels(image.pixels.crop(box), path)


class Pixels:
    """Opens and preprocesses images as the model of a configuration wants them.

    Args:
        open_image: path in a row, or whatever stands for one -> image.
    """

    def __init__(
        self,
        config: VPTConfig,
        processor: VPTProcessor,
        open_image: Callable[[Any], LoadedImage],
    ) -> None:
        self.config = config
        self.processor = processor
        self.open_image = open_image
        backbone = backbone_of(config, image_processor=processor.image_processor)
        with torch.device("meta"):  # only their preprocessing is used here
            self._branches = {
                name: build_branch(name, config, backbone) for name in (TOWER, *config.branches)
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
        opened = self._open(images)
        pixels: dict[str, Tensor] = {}
        sizes: dict[str, list[int]] = {}
        for kind in dict.fromkeys(kind for kind, _ in opened):
            of_kind = [image for other, image in opened if other == kind]
            sizes[kind] = [self.num_tokens(kind, image.size_wh) for image in of_kind]
            values = self._preprocess(kind, of_kind)
            pixels |= zip(forward_arguments(kind), values, strict=True)
        return pixels, sizes

    def count(self, images: Sequence[tuple[str, Hashable]]) -> dict[str, list[int]]:
        """How many placeholder tokens images take, as ``__call__`` says, but sooner.

        Every image is opened all the same, so that what cannot be read is known before training.
        """
        sizes: dict[str, list[int]] = {}
        for kind, image in self._open(images):
            sizes.setdefault(kind, []).append(self.num_tokens(kind, image.size_wh))
        return sizes

    def _open(self, images: Sequence[tuple[str, Hashable]]) -> list[tuple[str, LoadedImage]]:
        """Open images, once each, and not again those of the row before.

        Several branches may see one image, and rows about one image often stand together.
        """
        for kind, _ in images:
            if kind not in ("image", *self.config.branches):
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
        return [(kind, self._opened[source]) for kind, source in images]

    def num_tokens(self, kind: str, size_wh: tuple[int, int]) -> int:
        """Placeholder tokens of an image of this size, which need not be there."""
        fitted = self._fit(kind, Image.new("1", size_wh))
        height, width = self._encoder(kind).grid_hw(fitted.size)
        if kind in BRANCH_TOKENS:
            height, width = token_grid(BRANCH_TOKENS[kind].stem, (height, width))
        return height * width

    def _preprocess(self, kind: str, images: Sequence[LoadedImage]) -> list[Tensor]:
        """Pixels of images of one kind."""
        fitted = [self._fit(kind, image.pixels) for image in images]
        return list(self._encoder(kind).preprocess(fitted).values())

    def _encoder(self, kind: str) -> ModelBranch:
        return self._branches[TOWER if kind == "image" else kind]

    def _fit(self, kind: str, pixels: Image.Image) -> Image.Image:
        min_side, max_side = self._encoder(kind).min_side, self.config.max_side(kind)
        return fit_for_tower(pixels, min_side=min_side, max_side=max_side)


def forward_arguments(kind: str) -> tuple[str, ...]:
    """Names of the pixels of a kind of image in :meth:`VPTForConditionalGeneration.forward`."""
    return ("pixel_values", "image_grid_thw") if kind == "image" else BRANCH_TOKENS[kind].arguments


def join_pixels(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Arguments of forward for a batch, of those of its rows."""
    names = [name for kind in KINDS for name in forward_arguments(kind)]
    parts = {name: [pixels[name] for pixels in rows if name in pixels] for name in names}
    return {name: torch.cat(values) for name, values in parts.items() if values}


@dataclass(frozen=True)
class Sample:
    """One encoded row.

    Attributes:
        input_ids: ``[S]``; for prediction the prompt only.
        labels: for training ``[S]``, -100 outside assistant turns and on control tokens; for
            prediction the last answer.
        pixels: arguments of the model's forward, of this row's images.
    """

    input_ids: list[int]
    labels: list[int]
    pixels: Mapping[str, Tensor] = field(default_factory=dict)


class RowEncoder:
    """Encodes rows for a model.

    Args:
        open_image: path in a row -> image.
    """

    def __init__(
        self,
        config: VPTConfig,
        processor: VPTProcessor,
        open_image: Callable[[str], LoadedImage] = open_row_image,
    ) -> None:
        self.processor = processor
        self.pixels = Pixels(config, processor, open_image)
        self._actions = {config.action_id(name) for name in config.branches}

    def encode(
        self, row: Mapping[str, Any], *, predict: bool = False, cutoff_len: int | None = None
    ) -> Sample:
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
        system, turns = read_turns(row)
        pixels, sizes = self.pixels(list_images(row))
        asked = write_placeholders([asked for asked, _ in turns], sizes)
        ids: list[int] = []
        labels: list[int] = []
        texts = write_turns(system, asked, [answered for _, answered in turns])
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
            labels += self._labels(answer_ids)
        return Sample(ids, labels, pixels)

    def _labels(self, answer_ids: list[int]) -> list[int]:
        return [IGNORE_INDEX if i in self._actions else i for i in answer_ids]


def share_room(num_prompt: int, num_answer: int, room: int) -> tuple[int, int]:
    """How many tokens of a prompt and its answer are kept, as LLaMA-Factory 0.9 shares room.

    A short answer is kept whole and the prompt gives way; beside a short prompt the answer gives
    way; of two long ones each keeps its share. Both are cut at their ends.
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
    """Blank what is left of an image through which a row was cut.

    Args:
        ids: of the row; what is left of the cut image becomes padding tokens, in place.
        sizes: kind of image -> number of tokens of each before the cut.

    Returns:
        Kind -> number of images that are whole, which are the first ones.
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
    samples: Sequence[Sample],
    pad_token_id: int,
    *,
    side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Make a padded batch of samples.

    Args:
        pad_token_id: fills ``input_ids``; ``labels`` are filled with -100.
        side: ``"right"`` for training, ``"left"`` for generation.
        pad_to_multiple_of: round the length up to a multiple of this.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` ``[B, S]``, and the pixels of all rows.
    """
    batch = {
        "input_ids": _pad([s.input_ids for s in samples], pad_token_id, side, pad_to_multiple_of),
        "attention_mask": _pad(
            [[1] * len(s.input_ids) for s in samples], 0, side, pad_to_multiple_of
        ),
        "labels": _pad([s.labels for s in samples], IGNORE_INDEX, side, pad_to_multiple_of),
    }
    return batch | join_pixels([s.pixels for s in samples])


def _pad(rows: list[list[int]], fill: int, side: str, multiple: int | None) -> Tensor:
    width = max(len(row) for row in rows)
    width = width if multiple is None else -(-width // multiple) * multiple
    padding = [[fill] * (width - len(row)) for row in rows]
    pairs = zip(rows, padding, strict=True)
    return torch.tensor([row + pad if side == "right" else pad + row for row, pad in pairs])
