"""Rows of the released dataset format -> token ids, labels and pixels, alone or in batches.

A row has ``messages`` (role, content) and, per kind, a list of image paths in the order of their
placeholders in the text: ``images`` for ``<image>``, ``clip_images`` for ``<clip_image>``, and so
on. A path that ends in ``.png_x0,y0,x1,y1`` means that box of the image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.config import VPTConfig
from vpt.errors import FeatureCountError, PromptError, RegionError
from vpt.images import LoadedImage, fit_for_tower, from_pixels, load_image
from vpt.modeling import build_branch
from vpt.processing import DEFAULT_SYSTEM, VPTProcessor
from vpt.projectors import PROJECTOR_STEMS, token_grid
from vpt.tokens import BRANCH_TOKENS, IMAGE_PAD, TURN_END, TURN_START, VISION_END, VISION_START

IGNORE_INDEX = -100
ROLES = ("user", "assistant")

_CROP_SUFFIX = re.compile(r"(.+\.[^./_]+)_(-?\d+),(-?\d+),(-?\d+),(-?\d+)")
_IMAGE_COLUMN = "images"


@dataclass(frozen=True)
class _Kind:
    """One kind of image in a row."""

    column: str
    placeholder: str
    pad: str
    branch: str


_KINDS = [_Kind(_IMAGE_COLUMN, "<image>", IMAGE_PAD, "image")] + [
    _Kind(f"{row.released}_images", row.placeholder, row.pad, row.branch)
    for row in BRANCH_TOKENS.values()
]
_FORWARD_ARGUMENTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "reencode": ("clip_pixel_values", "clip_images_grid_thw"),
    "dino": ("detection_images",),
    "sam": ("seg_images",),
}


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
        self.config = config
        self.processor = processor
        self.open_image = open_image
        with torch.device("meta"):  # only their preprocessing is used here
            self.branches = {name: build_branch(name, config) for name in config.branches}

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
        system, turns = _read_turns(row)
        pixels, counts = self._preprocess(row)
        ids: list[int] = []
        labels: list[int] = []
        before = f"{TURN_START}system\n{system}{TURN_END}\n"
        for number, (asked, answered) in enumerate(turns):
            asked = _write_placeholders(asked, counts)
            prompt = f"{before}{TURN_START}user\n{asked}{TURN_END}\n{TURN_START}assistant\n"
            prompt_ids = self.processor.encode_text(prompt).ids
            answer_ids = list(self.processor.encode_text(answered + TURN_END).ids)
            if cutoff_len is not None and not predict:
                room = cutoff_len - len(ids)
                num_prompt, num_answer = share_room(len(prompt_ids), len(answer_ids), room)
                prompt_ids, answer_ids = prompt_ids[:num_prompt], answer_ids[:num_answer]
            ids += prompt_ids
            labels += [IGNORE_INDEX] * len(prompt_ids)
            if predict and number == len(turns) - 1:
                labels = answer_ids
                break
            ids += answer_ids
            labels += self._labels(answer_ids)
            before = "\n"
        _check_all_used(counts)
        return Sample(ids, labels, pixels)

    def _labels(self, answer_ids: list[int]) -> list[int]:
        tokenizer = self.processor.tokenizer
        actions = {
            tokenizer.convert_tokens_to_ids(BRANCH_TOKENS[name].action) for name in self.branches
        }
        return [IGNORE_INDEX if i in actions else i for i in answer_ids]

    def _preprocess(
        self, row: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, list[tuple[str, int]]]]:
        """Pixels, and per placeholder the ``(pad, number of tokens)`` of each of its images."""
        pixels: dict[str, Tensor] = {}
        counts: dict[str, list[tuple[str, int]]] = {}
        for kind in _KINDS:
            paths = row.get(kind.column) or []
            if paths and kind.branch != "image" and kind.branch not in self.branches:
                raise PromptError(
                    f"the row has {kind.column}, but the model lacks that branch; it has: "
                    f"{', '.join(self.branches) or 'none'}"
                )
            if not paths:
                counts[kind.placeholder] = []
                continue
            images = [self.open_image(path) for path in paths]
            values, sizes = self._pixels_of(kind.branch, images)
            names = _FORWARD_ARGUMENTS[kind.branch]
            pixels.update(zip(names, values, strict=True))
            counts[kind.placeholder] = [(kind.pad, size) for size in sizes]
        return pixels, counts

    def _pixels_of(
        self, branch: str, images: Sequence[LoadedImage]
    ) -> tuple[tuple[Tensor, ...], list[int]]:
        """Pixels of images under a branch, and how many tokens each will take."""
        encoder = self.branches.get(branch)
        max_side = self.config.max_side(branch)
        if encoder is None:
            pixel_values, grid_thw = self.processor.preprocess_images(images, max_side)
            merge = self.processor.image_processor.merge_size
            return (pixel_values, grid_thw), (grid_thw.prod(-1) // merge**2).tolist()
        fitted = [fit_for_tower(image.pixels, max_side=max_side) for image in images]
        pixel_values = encoder.preprocess(fitted)["pixel_values"]
        patch = encoder.encoder.config.patch_size
        height, width = pixel_values.shape[-2:]
        h, w = token_grid(PROJECTOR_STEMS[branch], (height // patch, width // patch))
        return (pixel_values,), [h * w] * len(images)


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
    for name in [name for names in _FORWARD_ARGUMENTS.values() for name in names]:
        if parts := [s.pixels[name] for s in samples if name in s.pixels]:
            batch[name] = torch.cat(parts)
    return batch


def _pad(rows: list[list[int]], fill: int, side: str, multiple: int | None) -> Tensor:
    width = max(len(row) for row in rows)
    width = width if multiple is None else -(-width // multiple) * multiple
    padding = [[fill] * (width - len(row)) for row in rows]
    pairs = zip(rows, padding, strict=True)
    return torch.tensor([row + pad if side == "right" else pad + row for row, pad in pairs])


def _read_turns(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """System words, and pairs of what was asked and answered."""
    messages = list(row.get("messages") or [])
    system = DEFAULT_SYSTEM
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


def _write_placeholders(text: str, counts: Mapping[str, list[tuple[str, int]]]) -> str:
    for placeholder, waiting in counts.items():
        parts = text.split(placeholder)
        text = parts[0]
        for part in parts[1:]:
            if not waiting:
                raise FeatureCountError(f"the text has more {placeholder} than the row has images")
            pad, size = waiting.pop(0)
            text += VISION_START + pad * size + VISION_END + part
    return text


def _check_all_used(counts: Mapping[str, list[tuple[str, int]]]) -> None:
    for placeholder, waiting in counts.items():
        if waiting:
            raise FeatureCountError(
                f"the row has {len(waiting)} image(s) more than its text has {placeholder}"
            )
