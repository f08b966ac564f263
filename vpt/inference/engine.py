"""Token streams over one cache: append pieces, take steps, many streams at once.

This is the single-pass core. The hidden state that reads a call's start token *is* the control
state: it replaces the embedding of the action token that follows and conditions the projector, and
both are appended to the cache. Nothing is run twice (arXiv 2502.17425 runs the LLM twice).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vpt.branches import Features
from vpt.errors import BudgetError, PositionError
from vpt.images import LoadedImage
from vpt.inference.cache import ATTENTION_NAME, SlotCache, SlotPlan
from vpt.inference.features import Encoders
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.positions import mrope_positions
from vpt.model.processing import FeaturePiece, ImagePiece, Piece, TokenPiece
from vpt.model.projectors import Projected
from vpt.protocol.tokens import BRANCH_TOKENS, TOWER

_GROWTH = 1024  # tokens of room that a stream gets beyond what it needs, once it needs more

Encoded = list[tuple[Features, bool]]
"""Features of an extension's images, in order, and whether they were cached."""


@dataclass
class Stream:
    """One growing token stream.

    Attributes:
        position: M-RoPE position of the next token.
        hidden: ``[D]`` final hidden state of the last token: the next control state.
        conditions: branch -> control state of its latest call.
        max_position: of the model; no token has this position or a later one.
    """

    slot: int
    length: int = 0
    position: int = 0
    hidden: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)
    max_position: int = sys.maxsize

    @property
    def is_full(self) -> bool:
        """Whether no further token can be read."""
        return self.position >= self.max_position


@dataclass(frozen=True)
class AppendedImage:
    """An image, plain or re-encoded, that was appended to a stream.

    Attributes:
        branch: the backbone's tower also for plain images.
        reused: whether its features were cached.
        scores: ``[h * w]`` answers to the control state, ``None`` for a plain image.
    """

    branch: str
    grid_hw: tuple[int, int]
    num_tokens: int
    reused: bool
    scores: Tensor | None


@dataclass(frozen=True)
class Extension:
    """The result of appending pieces to a stream.

    Attributes:
        token_ids: all appended ids, placeholders included.
        logits: ``[V]`` after the last of them.
        run_ms: wall time of the LLM.
    """

    token_ids: list[int]
    logits: Tensor
    images: list[AppendedImage]
    run_ms: float


class Engine:
    """Runs a model over up to ``num_slots`` streams, with room for ``capacity`` tokens at first.

    Attributes:
        num_tokens_run: tokens the LLM has read, all streams together.
        num_forwards: LLM passes made.
        intervene: control state ``[D]`` -> the one to use in its place, to find out what it does.
    """

    def __init__(
        self,
        model: VPTForConditionalGeneration,
        encoders: Encoders,
        num_slots: int = 1,
        capacity: int = 1024,
    ) -> None:
        text = model.config.text_config
        if "sliding_attention" in text.layer_types:
            raise PositionError("sliding-window attention is not supported by the stream cache")
        if model.config.projector_scale != 1:
            raise PositionError(
                "projector_scale other than 1 needs several control states per call; "
                "generation makes one. Use the training forward"
            )
        self.model = model
        self.encoders = encoders
        self._language_model = model.model.language_model
        self._language_model.config._attn_implementation = ATTENTION_NAME
        self._embed_tokens = model.get_input_embeddings()
        weight = self._embed_tokens.weight
        self._device = weight.device
        factor = (text.rope_parameters or {}).get("factor") or 1
        self._max_position = int(text.max_position_embeddings * factor)
        head_dim = text.hidden_size // text.num_attention_heads
        sizes = text.num_hidden_layers, text.num_key_value_heads, head_dim, num_slots, capacity
        self.cache = SlotCache(*sizes, weight.device, weight.dtype)
        self._free_slots = list(range(num_slots))
        self._branch_of_action = {model.config.action_id(b): b for b in model.config.branches}
        self.num_tokens_run = 0
        self.num_forwards = 0
        self.intervene: Callable[[Tensor], Tensor] | None = None

    @property
    def num_free_slots(self) -> int:
        """Streams that can be opened now."""
        return len(self._free_slots)

    def open(self) -> Stream:
        """Begin a stream in a free slot; raise ``BudgetError`` if all are taken."""
        if not self._free_slots:
            raise BudgetError("all slots are taken; close a stream, or make an engine with more")
        slot = self._free_slots.pop(0)
        self.cache.clear(slot)
        return Stream(slot, max_position=self._max_position)

    def close(self, stream: Stream) -> None:
        """End a stream; its slot is free at once."""
        self.cache.clear(stream.slot)
        self._free_slots.append(stream.slot)
        self._free_slots.sort()

    def is_action(self, token_id: int) -> bool:
        """Whether a token is a control token, whose embedding is replaced."""
        return token_id in self._branch_of_action

    def encode(self, groups: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Encode the images of several extensions in common batches; one result per extension."""
        images = [[branch_and_image(p) for p in g if not isinstance(p, TokenPiece)] for g in groups]
        encoded = iter(self.encoders.encode([one for group in images for one in group]))
        return [[next(encoded) for _ in group] for group in images]

    @torch.inference_mode()
    def extend(
        self,
        stream: Stream,
        pieces: Sequence[Piece],
        reserve: int = 0,
        encoded: Encoded | None = None,
    ) -> Extension:
        """Append pieces to a stream, and make room for ``reserve`` further tokens.

        ``encoded`` is what :meth:`encode` made of the pieces; without it they are encoded here.

        Raises:
            PositionError: if there is nothing to append, or a re-encoded image has no call.
            BudgetError: if the stream would be longer than the model's context.
        """
        if encoded is None:
            (encoded,) = self.encode([pieces])
        started = time.perf_counter()
        # Placeholders are counted first, so that the buffers grow once at most.
        num_tokens, num_positions = self._count(pieces, [f.grid_hw for f, _ in encoded])
        if num_tokens == 0:
            raise PositionError("there is nothing to append to the stream")
        if (needed := stream.position + num_positions) > stream.max_position:
            raise BudgetError(
                f"question, images and calls need {needed} positions, the model's context has "
                f"{stream.max_position}; shorten the question, or give fewer or smaller images"
            )
        self.cache.reserve(stream.length + num_tokens + reserve)
        builder, features = _ChunkBuilder(self, stream), iter(encoded)
        images: list[AppendedImage] = []
        for piece in pieces:
            if isinstance(piece, TokenPiece):
                builder.add_tokens(piece.ids)
                continue
            seen, reused = next(features)
            new, branch = Projected(seen.values, None, seen.grid_hw), TOWER
            if isinstance(piece, ImagePiece):
                builder.add_embeds(self.model.config.image_token_id, seen.values, seen.grid_hw)
            else:
                branch = piece.branch
                new = self._project(stream, branch, seen)
                builder.add_embeds(self.model.config.pad_id(branch), new.values)
            images.append(AppendedImage(branch, new.grid_hw, len(new.values), reused, new.scores))
        builder.flush()
        assert stream.hidden is not None
        logits = self.model.lm_head(stream.hidden)
        run_ms = (time.perf_counter() - started) * 1e3
        return Extension(builder.all_ids, logits, images, run_ms)

    @torch.inference_mode()
    def step(self, streams: Sequence[Stream], token_ids: Sequence[int]) -> Tensor:
        """Append one token to each of several streams; returns logits ``[len(streams), V]``.

        Control tokens go through :meth:`extend`. If it raises, the streams are as they were.
        """
        order = sorted(range(len(streams)), key=lambda i: streams[i].slot)
        sorted_streams = [streams[i] for i in order]
        ids = torch.tensor([[token_ids[i]] for i in order], device=self._device)
        positions = torch.tensor([[s.position] for s in sorted_streams], device=self._device)
        if (needed := max(s.length for s in streams) + 1) > self.cache.capacity:
            self.cache.reserve(needed + _GROWTH)
        plan = SlotPlan(self.cache, [s.slot for s in sorted_streams], 1)
        hidden = self._run(self._embed_tokens(ids), positions.expand(3, -1, -1), plan)
        logits = self.model.lm_head(hidden)
        # Counted in at the very end: a step that fails can be taken again.
        plan.commit()
        for row, stream in enumerate(sorted_streams):
            stream.length += 1
            stream.position += 1
            stream.hidden = hidden[row]
        if order == list(range(len(order))):
            return logits
        back = sorted(range(len(order)), key=order.__getitem__)
        return logits[back]

    def _run(self, embeds: Tensor, position_ids: Tensor, plan: SlotPlan) -> Tensor:
        """Run the LLM's own layers; returns ``[B, D]``, the final state of the last token."""
        self.num_tokens_run += embeds.shape[0] * embeds.shape[1]
        self.num_forwards += 1
        language_model = self._language_model
        shared = {
            "position_embeddings": language_model.rotary_emb(embeds, position_ids),
            "attention_mask": None,
            "slot_plan": plan,
        }
        hidden = embeds
        for layer in language_model.layers[:-1]:
            hidden = layer(hidden, **shared)
        # Of the last layer all keys and values are wanted, but one position's output only.
        layer = language_model.layers[-1]
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **shared)
        last = hidden[:, -1:] + attended[:, -1:]
        last = last + layer.mlp(layer.post_attention_layernorm(last))
        return language_model.norm(last)[:, 0]

    def _project(self, stream: Stream, branch: str, features: Features) -> Projected:
        condition = stream.conditions.get(branch)
        if condition is None and not self.model.config.alignment:
            raise PositionError(
                f"a {BRANCH_TOKENS[branch].encoder} re-encoding is to be appended, "
                f"but the stream holds no {BRANCH_TOKENS[branch].action} token to condition it"
            )
        if self.model.config.alignment:
            condition = None
        return self.model.projector(branch)(features, condition)

    def _count(
        self, pieces: Sequence[Piece], grids_hw: Sequence[tuple[int, int]]
    ) -> tuple[int, int]:
        """Tokens and positions that pieces take; see ``mrope_positions``."""
        grids = iter(grids_hw)
        num_tokens = num_positions = 0
        for piece in pieces:
            if isinstance(piece, TokenPiece):
                num_tokens += len(piece.ids)
                num_positions += len(piece.ids)
                continue
            h, w = next(grids)
            if isinstance(piece, FeaturePiece):
                h, w = self.model.projector(piece.branch).output_grid((h, w))
            num_tokens += h * w
            num_positions += max(h, w) if isinstance(piece, ImagePiece) else h * w
        return num_tokens, num_positions


class _ChunkBuilder:
    """Collects appended tokens and runs them in chunks that begin at control tokens."""

    def __init__(self, engine: Engine, stream: Stream) -> None:
        self.engine = engine
        self.stream = stream
        self.all_ids: list[int] = []
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._ids: list[int] = []
        self._grids: list[tuple[int, int]] = []
        self._overwrites: list[tuple[int, Tensor]] = []  # place in the chunk, [N, D]

    def add_tokens(self, ids: Sequence[int]) -> None:
        """Append tokens; a control token takes the state in front of it as its embedding."""
        for token_id in ids:
            if (branch := self.engine._branch_of_action.get(token_id)) is not None:
                self.flush()
                hidden = self.stream.hidden
                if hidden is None:
                    raise PositionError(f"{BRANCH_TOKENS[branch].action} begins the stream")
                if self.engine.intervene is not None:
                    hidden = self.engine.intervene(hidden)
                self.stream.conditions[branch] = hidden
                self._overwrites.append((0, hidden[None]))
            self._ids.append(token_id)

    def add_embeds(
        self, pad_id: int, embeds: Tensor, grid_hw: tuple[int, int] | None = None
    ) -> None:
        """Append ``[N, D]`` in place of pads; an image with 3-D positions has a grid."""
        self._overwrites.append((len(self._ids), embeds))
        self._ids += [pad_id] * len(embeds)
        if grid_hw is not None:
            self._grids.append(grid_hw)

    def flush(self) -> None:
        """Run what has been collected."""
        if not self._ids:
            return
        engine, stream = self.engine, self.stream
        ids = torch.tensor([self._ids], device=engine._device)
        embeds = engine._embed_tokens(ids)
        for start, values in self._overwrites:
            embeds[0, start : start + len(values)] = values.to(embeds)
        positions, following = mrope_positions(
            self._ids, self._grids, engine.model.config.image_token_id, stream.position
        )
        plan = SlotPlan(engine.cache, [stream.slot], len(self._ids))
        hidden = engine._run(embeds, positions[:, None].to(engine._device), plan)
        plan.commit()
        stream.hidden = hidden[0]
        stream.length += len(self._ids)
        stream.position = following
        self.all_ids += self._ids
        self._start_chunk()


def branch_and_image(piece: Piece) -> tuple[str, LoadedImage]:
    """Branch and image of a piece that is not tokens."""
    assert not isinstance(piece, TokenPiece)
    return (TOWER if isinstance(piece, ImagePiece) else piece.branch), piece.image
