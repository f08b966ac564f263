"""Calls and the images that answer them, matched by token ids; pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from vpt.branches import Features
from vpt.errors import FeatureCountError, PositionError
from vpt.model.config import VPTSettings
from vpt.model.projectors import token_grid
from vpt.protocol.tokens import BRANCH_TOKENS

Placed = tuple[Features, Tensor]
"""Features of one image, and ``[N]`` positions of its placeholders."""


@dataclass(frozen=True)
class ControlCall:
    """A control token in a batch, and the images that are re-encoded for it."""

    branch: str
    row: int
    position: int
    images: list[Placed]


def in_rounds(calls: Iterable[ControlCall]) -> list[list[ControlCall]]:
    """The first call of every row, the second of every row that has two, and so on."""
    rounds: list[list[ControlCall]] = []
    num_seen: dict[int, int] = {}
    for call in sorted(calls, key=lambda call: (call.row, call.position)):
        number = num_seen.setdefault(call.row, 0)
        num_seen[call.row] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(call)
    return rounds


def find_calls(
    config: VPTSettings, input_ids: Tensor, features: Mapping[str, Sequence[Features]]
) -> list[ControlCall]:
    """Match control tokens, placeholders and features, per branch and row.

    Without conditioning, as in alignment data, there are images without calls; they get
    ``position`` -1.

    Args:
        features: branch -> features of all its images, in reading order.
    """
    calls: list[ControlCall] = []
    for name in config.branches:
        places = input_ids == config.pad_id(name)
        action_id = config.action_id(name)
        for row, images in enumerate(_match_pads(name, places, features.get(name, ()))):
            if not config.is_conditioned:
                calls.append(ControlCall(name, row, -1, images))
                continue
            actions = (input_ids[row] == action_id).nonzero().flatten().tolist()
            calls += _match_actions(name, row, actions, images, config.projector_scale)
    return calls


def _match_pads(name: str, places: Tensor, features: Sequence[Features]) -> list[list[Placed]]:
    """Images of one branch, per row, each with the positions of its placeholders."""
    pad = BRANCH_TOKENS[name].pad
    grids = [token_grid(BRANCH_TOKENS[name].stem, one.grid_hw) for one in features]
    num_features = sum(h * w for h, w in grids)
    if (num_places := int(places.sum())) != num_features and (features or num_places):
        raise FeatureCountError(
            f"{num_places} {pad} tokens but {num_features} features of {len(features)} image(s)"
        )
    images: list[list[Placed]] = []
    used = 0
    for row in places:
        positions = row.nonzero().flatten()
        row_looks = []
        while len(positions):
            if used == len(grids) or (size := grids[used][0] * grids[used][1]) > len(positions):
                raise FeatureCountError(f"the {pad} tokens of one row do not hold whole images")
            row_looks.append((features[used], positions[:size]))
            positions = positions[size:]
            used += 1
        images.append(row_looks)
    return images


def _match_actions(
    name: str, row: int, actions: list[int], images: list[Placed], scale: int
) -> list[ControlCall]:
    """Calls of one branch in one row, each with its images; ``scale`` actions make a condition."""
    word = BRANCH_TOKENS[name].action
    if actions and actions[0] == 0:
        raise PositionError(f"{word} stands at the start of row {row}; nothing precedes it")
    if not images:
        return [ControlCall(name, row, position, []) for position in actions]
    if len(actions) == scale:  # one condition for all images of the row, as released
        groups = [images]
    elif len(actions) == scale * len(images) or _come_last(actions[scale * len(images) :], images):
        groups = [[look] for look in images]
    else:
        raise PositionError(
            f"row {row} has {len(actions)} {word} token(s) but {len(images)} re-encoded "
            f"image(s); expected {scale} token(s) per image, or {scale} for all"
        )
    calls = [ControlCall(name, row, position, []) for position in actions]
    for index, group in enumerate(groups):
        last = (index + 1) * scale - 1
        if any(int(pads[0]) <= actions[last] for _, pads in group):
            raise PositionError(f"a re-encoded image of row {row} precedes its {word} token")
        calls[last] = ControlCall(name, row, actions[last], group)
    return calls


def _come_last(actions: list[int], images: list[Placed]) -> bool:
    """Whether there are calls after all images: a row may end with one, or have been cut."""
    return bool(actions) and all(int(pads[-1]) < actions[0] for _, pads in images)


def draw_paragraph_mask(
    config: VPTSettings, input_ids: Tensor, calls: Iterable[ControlCall]
) -> Tensor | None:
    """Draw the paragraphs hidden from the final pass in training: ``[B, S]``, True if hidden."""
    if config.para_mask_id == 0:
        return None
    paragraphs = (1,) if config.para_mask_id == 1 else (1, 3)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row in sorted({call.row for call in calls if call.images}):
        starts = input_ids[row].eq(cast(int, config.para_start_id)).nonzero().flatten()
        ends = input_ids[row].eq(cast(int, config.para_end_id)).nonzero().flatten()
        for paragraph in paragraphs:
            if float(torch.rand(())) < config.para_mask_ratio and len(ends) > paragraph:
                mask[row, int(starts[paragraph]) + 1 : int(ends[paragraph])] = True
    return mask if mask.any() else None
