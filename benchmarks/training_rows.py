"""Batches for ``training_step.py``: rows that call, what encoders made of them, what is trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from random_models import picture
from torch import Tensor
from two_pass_step import Look, find_looks

from vpt.branches import Features
from vpt.images import LoadedImage
from vpt.model.encoding import RowEncoder, collate
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.positions import batch_mrope_positions
from vpt.model.processing import VPTProcessor
from vpt.protocol.tokens import BRANCH_TOKENS, branches_named

REGION = "<|region_token_start|><|x_2|><|y_1|><|x_5|><|y_4|><|region_token_end|>"
QUESTIONS = (
    "What colour is the door of the second house?",
    "How many of the people at the stop near the bridge carry an umbrella, and how many a bag?",
    "Which way does the arrow on the sign point?",
    "Read the words on the board over the shop to the left of the bakery.",
)
ANSWERS = (
    "It is green.",
    "Three of them carry an umbrella and two of them carry a bag.",
    "It points to the left, away from the river.",
    "Fresh bread every day.",
)
BATCHES = {
    "clip, equal rows": [("clip",)] * 4,
    "clip": [("clip",)] * 4,
    "dino": [("dino",)] * 4,
    "region": [("region",)] * 4,
    "mixed": [(), ("clip",), ("region",), ("dino",), ("clip", "dino"), ("answer", "clip")],
}
"""Name -> what happens between question and answer in each row; ``answer`` is a plain turn."""


@dataclass(frozen=True)
class Batch:
    """Arguments of forward, and what the encoders made of the pictures in them.

    Attributes:
        inputs: with ``position_ids``.
        image_embeds: ``[N, D]``, plain images end to end.
        features: branch -> its images.
        projected: branch -> ``[N, D]``, the same as an unsteered projector shows them to the LLM.
        looks: the same, with the calls they answer.
        seed: under which half of the rows with looks lose their question.
        rows_without_question: these rows.
    """

    inputs: dict[str, Tensor]
    image_embeds: Tensor
    features: dict[str, list[Features]]
    projected: dict[str, Tensor]
    looks: list[Look]
    seed: int
    rows_without_question: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding left out."""
        return int(self.inputs["attention_mask"].sum())

    @property
    def num_trained(self) -> int:
        """Tokens that are trained."""
        return int((self.inputs["labels"][:, 1:] != -100).sum())


def write_row(looks: tuple[str, ...], number: int, text: int) -> dict[str, Any]:
    """Write a row of the released format.

    Args:
        looks: entry of a batch in :data:`BATCHES`.
        number: of the picture.
        text: of question and answer.
    """
    row: dict[str, Any] = {"images": [f"{number}"]}
    question, answer = QUESTIONS[text], ANSWERS[text]
    messages = [("user", f"<image>\n{question}")]
    for look in looks:
        if look == "answer":
            messages += [("assistant", answer), ("user", QUESTIONS[text - 1])]
        elif look == "region":
            row["images"].append(f"{number} cut")
            messages += [("assistant", REGION), ("user", "<image>")]
        else:
            tokens = BRANCH_TOKENS[branches_named([look])[0]]
            row.setdefault(f"{tokens.released}_images", []).append(f"{number}")
            messages += [("assistant", tokens.call), ("user", tokens.placeholder)]
    messages.append(("assistant", answer))
    return {**row, "messages": [{"role": r, "content": c} for r, c in messages]}


@torch.no_grad()
def make_batch(
    name: str,
    model: VPTForConditionalGeneration,
    processor: VPTProcessor,
    image_wh: tuple[int, int],
) -> Batch:
    """Make one of :data:`BATCHES` for a model, right-padded.

    Args:
        name: of the batch.
        model: encodes the pictures.
        processor: of the model.
        image_wh: of the pictures, in pixels; a region has 5/8 of each side.
    """

    def open_image(path: str) -> LoadedImage:
        number, _, cut = path.partition(" ")
        width, height = (side * 5 // 8 if cut else side for side in image_wh)
        return picture((width, height), seed=int(number))

    encoder = RowEncoder(model.config, processor, open_image)
    rows = [
        write_row(looks, number, 0 if "equal" in name else number % len(QUESTIONS))
        for number, looks in enumerate(BATCHES[name])
    ]
    pad_token_id = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    inputs = collate([encoder.encode(row) for row in rows], pad_token_id)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    inputs["position_ids"] = batch_mrope_positions(
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["image_grid_thw"],
        model.config.image_token_id,
        model.config.vision_config.spatial_merge_size,
    )
    image_embeds = model.tower(inputs["pixel_values"], inputs["image_grid_thw"])
    features = {}
    if "clip_pixel_values" in inputs:
        pixels = (inputs["clip_pixel_values"], inputs["clip_images_grid_thw"])
        features["reencode"] = model.encode("reencode", *pixels)
    if "detection_images" in inputs:
        features["dino"] = model.encode("dino", inputs["detection_images"])
    projected = {
        branch: torch.cat([model.projector(branch)(seen).values for seen in of_branch])
        for branch, of_branch in features.items()
    }
    looks = find_looks(model, inputs["input_ids"], features)
    seed, drawn = _draw_half(sorted({look.row for look in looks}))
    return Batch(inputs, image_embeds, features, projected, looks, seed, drawn)


def _draw_half(rows: list[int]) -> tuple[int, tuple[int, ...]]:
    """A seed under which the model, drawing with ratio 0.5, hides the question in half the rows."""
    for seed in itertools.count():
        torch.manual_seed(seed)
        drawn = tuple(row for row in rows if float(torch.rand(())) < 0.5)
        if len(drawn) == len(rows) // 2:
            return seed, drawn
    raise AssertionError("itertools.count() ended")


@contextmanager
def encoded_before(model: VPTForConditionalGeneration, batch: Batch) -> Iterator[None]:
    """Let the model's forward take the features that are there in place of its encoders."""
    with (
        mock.patch.object(model, "tower", lambda *pixels: batch.image_embeds),
        mock.patch.object(model, "encode", lambda name, *pixels: batch.features[name]),
    ):
        yield
