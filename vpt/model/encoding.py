"""Rows encoded for a model: token ids, labels and pixels, alone or in batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vpt.errors import FeatureCountError
from vpt.images import LoadedImage
from vpt.model.config import VPTConfig
from vpt.model.pixels import Pixels, join_pixels, open_row_image
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import KINDS, list_images, read_turns, write_placeholders, write_turns
from vpt.protocol.tokens import VISION_END

IGNORE_INDEX = -100


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
        config: of the model.
        processor: of the model.
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
            row: in the released format.
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
        tokenizer: of the model.

    Returns:
        Kind -> number of images that are whole, which are the first ones.

    Raises:
        FeatureCountError: if the row has other placeholders than a cut would have left.
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
        samples: encoded rows.
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
