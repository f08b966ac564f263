"""The released training forward, written plainly: two whole passes over a padded batch.

The first pass, whose projectors go without condition, finds the control states; the second uses
them. For several calls in one row, which the released code cannot do, each further call takes one
more finding pass. As released, tokens are looked up without gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt.branches import Features
from vpt.model.modeling import VPTForConditionalGeneration, scatter_features

QUESTION_PARAGRAPH = 1  # behind the system words


@dataclass(frozen=True)
class Look:
    """One re-encoded image in a batch, with the call it answers."""

    branch: str
    row: int
    action: int  # place of the control token in the row
    pads: Tensor  # [N] places of the placeholders
    features: Features


def find_looks(
    model: VPTForConditionalGeneration,
    input_ids: Tensor,
    features: Mapping[str, Sequence[Features]],
) -> list[Look]:
    """Match calls and re-encoded images, one by one, in reading order."""
    looks = []
    for branch, of_branch in features.items():
        waiting = iter(of_branch)
        for row, ids in enumerate(input_ids):
            pads = (ids == model.config.pad_id(branch)).nonzero().flatten()
            for action in (ids == model.config.action_id(branch)).nonzero().flatten().tolist():
                seen = next(waiting)
                h, w = model.projector(branch).output_grid(seen.grid_hw)
                looks.append(Look(branch, row, action, pads[: h * w], seen))
                pads = pads[h * w :]
    return looks


def two_pass_loss(
    model: VPTForConditionalGeneration,
    batch: Mapping[str, Tensor],
    image_embeds: Tensor,
    looks: Sequence[Look],
    rows_without_question: Collection[int] = (),
) -> Tensor:
    """Loss of a batch.

    Args:
        model: in training mode.
        batch: ``input_ids``, ``attention_mask``, ``labels`` ``[B, S]``, ``position_ids``
            ``[3, B, S]``.
        image_embeds: ``[N, D]`` of all plain images, end to end.
        looks: of the batch.
        rows_without_question: whose question the last pass does not see.
    """
    input_ids = batch["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(input_ids)
    embeds = scatter_features(embeds, input_ids == model.config.image_token_id, image_embeds)
    for look in looks:
        embeds = _write(model, embeds, look, None)
    rounds: list[list[Look]] = []
    for row in range(len(input_ids)):
        own = sorted((look for look in looks if look.row == row), key=lambda look: look.action)
        for number, look in enumerate(own):
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(look)
    conditions = []
    for round_ in rounds:
        hidden = _run(model, embeds, batch)
        for look in round_:
            conditions.append((look, hidden[look.row, look.action - 1]))
            embeds = _write(model, embeds, *conditions[-1])
    if not rounds:
        _run(model, embeds, batch)  # the released forward runs twice all the same
    for row in rows_without_question:
        start = (input_ids[row] == model.config.para_start_id).nonzero()[QUESTION_PARAGRAPH]
        end = (input_ids[row] == model.config.para_end_id).nonzero()[QUESTION_PARAGRAPH]
        hide = torch.zeros_like(input_ids, dtype=torch.bool)
        hide[row, int(start) + 1 : int(end)] = True
        embeds = embeds.masked_fill(hide.unsqueeze(-1), 0)
    logits = model.lm_head(_run(model, embeds, batch))
    return model.loss_function(
        logits=logits, labels=batch["labels"], vocab_size=model.config.text_config.vocab_size
    )


def _write(
    model: VPTForConditionalGeneration, embeds: Tensor, look: Look, condition: Tensor | None
) -> Tensor:
    projected = model.projector(look.branch)(look.features, condition).values
    embeds = embeds.clone()
    embeds[look.row, look.pads] = projected.to(embeds)
    if condition is not None:
        embeds[look.row, look.action] = condition.to(embeds)
    return embeds


def _run(model: VPTForConditionalGeneration, embeds: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
