"""Rollouts: token streams that the engine samples, and their log-probabilities in training.

The policy is what the engine samples from: the model under the grammar and a temperature. The
training forward reads the same streams, whole, and applies the same rules to its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vpt.errors import RunError
from vpt.inference.conversation import Conversation
from vpt.inference.engine import Engine
from vpt.inference.events import Append, ErrorEvent, Exchange, Step, StopEvent
from vpt.inference.scheduler import Scheduler
from vpt.model.encoding import IGNORE_INDEX, EncodedRow, Pixels, collate
from vpt.model.generation import apply_rule_
from vpt.model.processing import ImagePiece, Piece, TokenPiece, VPTProcessor
from vpt.protocol.grammar import TokenRule
from vpt.protocol.rows import KINDS
from vpt.trace.records import Trace


@dataclass(frozen=True)
class ChosenToken:
    """A token that was chosen by a rule; all others of a stream were appended by the runtime.

    Attributes:
        piece: index of the piece of the stream that begins with it.
        log_prob: of the engine, under the rule.
    """

    token_id: int
    piece: int
    rule: TokenRule | None
    log_prob: float

    @property
    def is_forced(self) -> bool:
        """Whether the rule permitted no other token."""
        return self.rule is not None and self.rule.only is not None and len(self.rule.only) == 1


@dataclass
class Rollout:
    """One sampled stream: its pieces, the tokens that the model chose, and its trace."""

    trace: Trace
    pieces: list[Piece] = field(default_factory=list)
    chosen: list[ChosenToken] = field(default_factory=list)

    @property
    def sampled(self) -> list[ChosenToken]:
        """Chosen tokens that were not forced."""
        return [one for one in self.chosen if not one.is_forced]


def run_rollouts(engine: Engine, conversations: Sequence[Conversation]) -> list[Rollout]:
    """Run conversations together; deterministic, in this thread.

    Raises:
        VPTError: the first error of a run.
    """
    scheduler = Scheduler(engine, engine.num_slots)
    rollouts = [Rollout(one.recorder.trace) for one in conversations]
    for index, (one, rollout) in enumerate(zip(conversations, rollouts, strict=True)):
        scheduler.add(index, _record(one.run(), rollout), one.request.sampling)
    while scheduler.has_work:
        for _, event in scheduler.round():
            if isinstance(event, ErrorEvent):
                scheduler.close()
                raise event.error
    return rollouts


def _record(exchange: Exchange, rollout: Rollout) -> Exchange:
    """Pass an exchange on, and note what is appended and chosen."""
    step: Step | None = None
    token_id = -1
    while True:
        try:
            item = exchange.send(step)
        except StopIteration:
            return
        if isinstance(item, StopEvent) and token_id >= 0:  # the last token, which was never read
            rollout.pieces.append(TokenPiece((token_id,)))
        if not isinstance(item, Append):
            step = yield item
            continue
        rollout.pieces += item.pieces
        step = yield Append(item.pieces, item.rule, scored=True)
        assert step is not None and step.log_prob is not None
        token_id = step.token_id
        rollout.chosen.append(ChosenToken(token_id, len(rollout.pieces), item.rule, step.log_prob))


class RolloutEncoder:
    """Makes batches for the training forward of rollouts."""

    def __init__(self, config: Any, processor: VPTProcessor) -> None:
        self._pixels = Pixels(config, processor, lambda image: image)
        self._pad_ids = {kind.branch: kind.pad for kind in KINDS.values()}
        self._tokenizer = processor.tokenizer

    def row(self, rollout: Rollout) -> EncodedRow:
        """Ids and pixels of a stream; labels are the tokens that were sampled, at their places."""
        kinds = [_kind(piece) for piece in rollout.pieces]
        images = [
            (kind, piece.image)
            for kind, piece in zip(kinds, rollout.pieces, strict=True)
            if not isinstance(piece, TokenPiece)
        ]
        pixels, sizes = self._pixels(images)
        waiting = {kind: iter(of_kind) for kind, of_kind in sizes.items()}
        ids: list[int] = []
        starts: list[int] = []
        for kind, piece in zip(kinds, rollout.pieces, strict=True):
            starts.append(len(ids))
            if isinstance(piece, TokenPiece):
                ids += piece.ids
            else:
                pad = self._tokenizer.convert_tokens_to_ids(self._pad_ids[kind])
                ids += [pad] * next(waiting[kind])
        labels = [IGNORE_INDEX] * len(ids)
        for one in rollout.chosen:
            place = starts[one.piece]
            if ids[place] != one.token_id:
                raise RunError(f"token {one.token_id} was chosen, the stream has {ids[place]}")
            labels[place] = IGNORE_INDEX if one.is_forced else one.token_id
        return EncodedRow(ids, labels, pixels)

    def batch(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[dict[str, Tensor], list[TokenRule | None]]:
        """A padded batch, and the rule of each label in reading order."""
        rows = [self.row(one) for one in rollouts]
        rules = [token.rule for one in rollouts for token in one.sampled]
        return collate(rows, self._tokenizer.pad_token_id), rules


def _kind(piece: Piece) -> str:
    if isinstance(piece, TokenPiece):
        return ""
    return "image" if isinstance(piece, ImagePiece) else piece.branch


def sampled_log_probs(
    model: Any,
    batch: dict[str, Tensor],
    rules: Sequence[TokenRule | None],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N]`` of the labels of a batch by the training forward, under rules.

    Returns:
        The log-probabilities, and the entropies ``[N]`` of their distributions, without gradients.
    """
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    rows, places = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    at = logits[rows, places - 1].float().masked_fill(_banned(rules, logits), -torch.inf)
    every = (at / temperature).log_softmax(-1)
    found = every.gather(-1, labels[rows, places][:, None])[:, 0]
    with torch.no_grad():
        entropy = torch.special.entr(every.exp()).sum(-1)
    return found, entropy


def _banned(rules: Sequence[TokenRule | None], logits: Tensor) -> Tensor:
    """Tokens ``[N, V]`` that each rule forbids."""
    distinct = {rule: index for index, rule in enumerate(dict.fromkeys(rules))}
    table = torch.zeros(len(distinct), logits.shape[-1], device=logits.device)
    for rule, index in distinct.items():
        if rule is not None:
            apply_rule_(rule, table[index])
    return table.isinf()[[distinct[rule] for rule in rules]]
