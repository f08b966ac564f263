"""Rows of the released dataset format -> token ids, labels and pixels, alone or in batches.

A row has ``messages`` (role, content) and, per kind, a list of image paths in the order of their
placeholders in the text: ``images`` for ``<image>``, ``clip_images`` for ``<clip_image>``, and so
on. A path that ends in ``.png_x0,y0,x1,y1`` means that box of the image.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.config import VPTConfig
from vpt.errors import FeatureCountError, PromptError, RegionError
from vpt.images import LoadedImage, from_pixels, load_image
from vpt.pixels import Pixels, join_pixels
from vpt.processing import DEFAULT_SYSTEM, VPTProcessor
from vpt.tokens import BRANCH_TOKENS, IMAGE_PAD, TURN_END, TURN_START, VISION_END, VISION_START

IGNORE_INDEX = -100
ROLES = ("user", "assistant")

_CROP_SUFFIX = re.compile(r"(.+\.[^./_]+)_(-?\d+),(-?\d+),(-?\d+),(-?\d+)")


@dataclass(frozen=True)
class Kind:
    """One kind of image in a row.

    Attributes:
        branch: ``"image"``, or the branch that re-encodes it.
        column: of the row, with the paths.
        placeholder: what stands for one image in the text.
        pad: token that stands once per feature in the ids.
    """

    branch: str
    column: str
    placeholder: str
    pad: str


KINDS = {"image": Kind("image", "images", "<image>", IMAGE_PAD)} | {
    branch: Kind(branch, f"{row.released}_images", row.placeholder, row.pad)
    for branch, row in BRANCH_TOKENS.items()
}
"""Kinds of images a row may have, by ``branch``."""


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


def split_crop_suffix(path: str) -> tuple[str, tuple[int, int, int, int] | None]:
    """Take the box off a path that carries one, ``"a.png_1,2,3,4"`` -> ``("a.png", (1, 2, 3, 4))``.

    The box is XYXY in pixels of the image.
    """
    if (match := _CROP_SUFFIX.fullmatch(path)) is None:
        return path, None
    x0, y0, x1, y1 = (int(value) for value in match.groups()[1:])
    return match[1], (x0, y0, x1, y1)


def open_image(path: str, root: Path | None = None) -> LoadedImage:
    """Open an image of a row, its crop suffix understood.

    Args:
        path: as in the row.
        root: folder of relative paths.

    Raises:
        ImageError: if it cannot be read.
        RegionError: if the box is empty. One that reaches out of the image is filled with
            black, as released.
    """
    plain, box = split_crop_suffix(path)
    image = load_image(Path(root or "") / plain)
    if box is None:
        return image
    if box[2] <= box[0] or box[3] <= box[1]:
        raise RegionError(f"{path} names an empty box; expected x0 < x1 and y0 < y1")
    return from_pixels(image.pixels.crop(box), path)


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
        open_image: Callable[[str], LoadedImage] = open_image,
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


def read_turns(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """System words of a row, and what was asked and answered, turn by turn.

    Raises:
        PromptError: if the turns are not user and assistant by turns.
    """
    messages = list(row.get("messages") or [])
    system = ""
    if messages and messages[0].get("role") == "system":
        system = messages.pop(0)["content"]
    roles = [message.get("role") for message in messages]
    expected = [ROLES[number % 2] for number in range(len(messages))]
    if not messages or len(messages) % 2 or roles != expected:
        raise PromptError(
            "expected user and assistant by turns, the assistant last; "
            f"got {', '.join(map(str, roles))}"
        )
    contents = [message["content"] for message in messages]
    return system, list(zip(contents[::2], contents[1::2], strict=True))


def list_images(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kind and path of every image of a row; those of one kind in the order of the text."""
    return [(kind.branch, path) for kind in KINDS.values() for path in row.get(kind.column) or []]


def write_turns(
    system: str, asked: Sequence[str], answered: Sequence[str]
) -> list[tuple[str, str]]:
    """Write turns as the released models read them: per turn, prompt and answer.

    Args:
        system: system words; empty for the usual ones.
        asked: what the user says in each turn, placeholders written out.
        answered: what the assistant says in each.
    """
    before = f"{TURN_START}system\n{system or DEFAULT_SYSTEM}{TURN_END}\n"
    written = []
    for question, answer in zip(asked, answered, strict=True):
        prompt = f"{before}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
        written.append((prompt, answer + TURN_END))
        before = "\n"
    return written


def write_placeholders(texts: Sequence[str], sizes: Mapping[str, Sequence[int]]) -> list[str]:
    """Write each placeholder of a row's texts as tokens.

    Args:
        texts: what is asked, in order.
        sizes: kind of image -> number of tokens of each, in the order of the texts.

    Raises:
        FeatureCountError: if placeholders and images of a kind differ in number.
    """
    texts = list(texts)
    for kind in KINDS.values():
        waiting = list(sizes.get(kind.branch, ()))
        for number, text in enumerate(texts):
            first, *rest = text.split(kind.placeholder)
            if len(rest) > len(waiting):
                raise FeatureCountError(
                    f"the text has more {kind.placeholder} than the row has images"
                )
            runs = [VISION_START + kind.pad * size + VISION_END for size in waiting[: len(rest)]]
            texts[number] = first + "".join(
                run + part for run, part in zip(runs, rest, strict=True)
            )
            del waiting[: len(rest)]
        if waiting:
            raise FeatureCountError(
                f"the row has {len(waiting)} image(s) more than its text has {kind.placeholder}"
            )
    return texts
