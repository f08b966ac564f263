"""Token streams over one cache: append pieces, take steps, many streams at once.

This is the single-pass core. The hidden state that reads a call's start token *is* the control
state: it replaces the embedding of the action token that follows and conditions the projector, and
both are appended to the cache. Nothing is run twice (arXiv 2502.17425 runs the LLM twice).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vpt.branches import Features
from vpt.errors import BudgetError, PositionError
from vpt.images import LoadedImage
from vpt.inference.cache import Segment, SlotCache
from vpt.inference.decoder import Decoder
from vpt.inference.features import Encoders
from vpt.inference.prefixes import DEFAULT_PREFIX_BYTES, Atoms, PrefixStore, common_length
from vpt.inference.sampling import (
    DEFAULT_NUM_RULES,
    Choice,
    RuleTable,
    choose,
    log_probabilities,
    pack,
)
from vpt.inference.step import DecodingStep
from vpt.inference.stream import AppendedImage, Extension, Stream
from vpt.model.config import head_dim
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.positions import mrope_positions
from vpt.model.processing import FeaturePiece, ImagePiece, Piece, TokenPiece
from vpt.model.projectors import Projected
from vpt.protocol.tokens import BRANCH_TOKENS, PLAIN

Encoded = list[tuple[Features, bool]]
"""Features of an extension's images, in order, and whether they were cached."""

_TOKENS_PER_PASS = {"cpu": 512, "cuda": 2048}
_SHARE_OF_MEMORY = 0.5  # for the cache


@dataclass(frozen=True)
class _Item:
    """Neighbouring tokens, or the placeholders of an image.

    Attributes:
        ids: token ids, placeholders as such.
        number: of an image, negative; 0 for tokens.
        piece: the image's, with its features and whether they were cached.
    """

    ids: tuple[int, ...]
    number: int = 0
    piece: ImagePiece | FeaturePiece | None = None
    features: Features | None = None
    reused: bool = False

    @property
    def is_plain_image(self) -> bool:
        return isinstance(self.piece, ImagePiece)


class Prefill:
    """Pieces that are being appended to a stream, in one pass or several.

    A chunk ends in front of each control token, whose embedding is the state before it.

    Attributes:
        num_left: tokens that are not read yet.
        extension: the result, once nothing is left.
        begins: whether a kept prefix may still begin the stream; ``is_prompt``, whether one might.
    """

    def __init__(self, engine: Engine, stream: Stream, items: Sequence[_Item]) -> None:
        self.engine, self.stream = engine, stream
        self.items = list(items)
        self.token_ids = [token_id for item in items for token_id in item.ids]
        self.num_left = len(self.token_ids)
        self.images: list[AppendedImage] = []
        self.run_ms = 0.0
        self.num_reused = 0
        self.extension: Extension | None = None
        self.begins = self.is_prompt = stream.length == 0
        numbers = [[i.number] * len(i.ids) if i.number else i.ids for i in self.items]
        self.atom_ids = np.array([*stream.atoms.ids, *(a for n in numbers for a in n)], np.int64)
        self._chunk: tuple[Tensor, Tensor] | None = None  # embeds [n, D], positions [3, n]

    def next_rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """Embeddings ``[n, D]`` and positions ``[3, n]`` of at most ``limit`` next tokens."""
        if self._chunk is None:
            if self.begins:
                self._begin_with_a_prefix()
            self._chunk = self._make_chunk()
        embeds, positions = self._chunk
        return embeds[:limit], positions[:, :limit]

    def advance(self, num_read: int, state: Tensor, run_ms: float) -> None:
        """Count tokens in, once a pass has read them; ``state`` ``[D]`` is that of the last."""
        assert self._chunk is not None
        embeds, positions = self._chunk
        is_whole = num_read == len(embeds)
        self._chunk = None if is_whole else (embeds[num_read:], positions[:, num_read:])
        self.stream.hidden = state
        self.stream.length += num_read
        self.num_left -= num_read
        self.run_ms += run_ms

    def _begin_with_a_prefix(self) -> None:
        self.begins = False
        stream, engine = self.stream, self.engine
        starts = accumulate((len(item.ids) for item in self.items), initial=0)
        actions = {at for at, item in zip(starts, self.items, strict=False) if self._action(item)}
        if (found := engine.prefixes.find(self.atom_ids, actions)) is None:
            return
        kept, length = found
        if engine.intervene is not None and kept.atoms.conditions(length):
            return  # its control states are the model's own
        engine.cache.copy_in(stream.slot, kept.cache, length)
        stream.length = self.num_reused = length
        stream.position = kept.atoms.position(length)
        stream.conditions = kept.atoms.conditions(length)
        states = [one for one in kept.atoms.states if one[0] < length]
        self.num_left -= length
        self._skip(length)
        stream.atoms.states = states

    def _skip(self, length: int) -> None:
        """Take ``length`` atoms as read."""
        while length:
            item = self.items.pop(0)
            if len(item.ids) > length:
                self._note(_Item(item.ids[:length]))
                self.items.insert(0, _Item(item.ids[length:]))
                return
            self._note(item)
            if item.piece is not None:
                self.images.append(self._appended(item))
            length -= len(item.ids)

    def _appended(self, item: _Item, scores: Tensor | None = None) -> AppendedImage:
        assert item.features is not None and item.piece is not None
        branch, grid = branch_and_image(item.piece)[0], item.features.grid_hw
        if not item.is_plain_image:
            grid = self.engine.model.projector(branch).output_grid(grid)
        return AppendedImage(branch, grid, len(item.ids), item.reused, scores)

    def _note(self, item: _Item) -> None:
        """Note an item's atoms, and where a prefix may not end."""
        atoms, start = self.stream.atoms, len(self.stream.atoms.ids)
        end = start + len(item.ids)
        if not item.number:
            for index, token_id in enumerate(item.ids, start):
                if self.engine.is_action(token_id):
                    atoms.uncut.append((index, index + 1))
        else:
            low = start + 1
            if not item.is_plain_image and atoms.uncut:
                low = atoms.uncut[-1][0]  # a call and its features are one
            atoms.uncut.append((low, end))
        if item.is_plain_image:
            assert item.features is not None
            atoms.saved.append((end, len(item.ids) - max(item.features.grid_hw)))
        atoms.ids += [item.number] * len(item.ids) if item.number else item.ids

    def _make_chunk(self) -> tuple[Tensor, Tensor]:
        """Embeddings and positions up to the next control token; if it raises, nothing changes."""
        stream, engine = self.stream, self.engine
        size = 1
        while size < len(self.items) and self._action(self.items[size]) is None:
            size += 1
        items = self.items[:size]
        ids = [token_id for item in items for token_id in item.ids]
        embeds = engine.embed(ids)  # [n, (1 + L) * D]
        width = embeds.shape[1] // (1 + engine.num_deeper)
        if (branch := self._action(items[0])) is not None:
            hidden = stream.hidden
            if hidden is None:
                raise PositionError(f"{BRANCH_TOKENS[branch].action} begins the stream")
            if engine.intervene is not None:
                hidden = engine.intervene(hidden)
            embeds[0, :width] = stream.conditions[branch] = hidden
        start, grids, images = 0, [], []
        for item in items:
            end = start + len(item.ids)
            if item.piece is not None:
                assert item.features is not None
                values, scores = item.features.values, None
                if isinstance(item.piece, ImagePiece):
                    grids.append(item.features.grid_hw)
                else:
                    projected = engine.project(stream, item.piece.branch, item.features)
                    values, scores = projected.values, projected.scores
                embeds[start:end, : values.shape[1]] = values.to(embeds)
                images.append(self._appended(item, scores))
            start = end
        image_id = engine.model.config.image_token_id
        # A placeholder that the model wrote itself, unconstrained, is text.
        placed = [-1 if i == image_id and not one.piece else i for one in items for i in one.ids]
        positions, following = mrope_positions(placed, grids, image_id, stream.position)
        if branch is not None:
            state = embeds[0, :width].clone()
            stream.atoms.states.append((len(stream.atoms.ids), branch, state))
        for item in items:
            self._note(item)
        del self.items[:size]
        self.images += images
        stream.position = following
        return embeds, positions.to(embeds.device)

    def _action(self, item: _Item) -> str | None:
        """The branch whose control token an item begins with."""
        return self.engine.branch_of_action(item.ids[0]) if item.piece is None else None


class Engine:
    """Runs a model over up to ``num_slots`` streams of up to ``capacity`` tokens.

    Args:
        capacity: by default what the model's context allows, bounded by half of the memory (of
            that which is free on a GPU) for all slots together.
        tokens_per_pass: tokens of prompts and results that one pass reads at most, so that running
            streams continue to decode; by default 512 on a CPU, else 2,048.
        prefix_bytes: memory for prefixes of streams.

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
        capacity: int | None = None,
        tokens_per_pass: int | None = None,
        prefix_bytes: int = DEFAULT_PREFIX_BYTES,
    ) -> None:
        text = model.config.text_config
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise PositionError("sliding-window attention is not supported by the stream cache")
        if model.config.projector_scale != 1:
            raise PositionError(
                "projector_scale other than 1 needs several control states per call; "
                "generation makes one. Use the training forward"
            )
        self.model = model
        self.encoders = encoders
        deepstack = getattr(model.config.vision_config, "deepstack_visual_indexes", ())
        self.num_deeper = len(deepstack)
        self._embed_tokens = model.get_input_embeddings()
        weight = self._embed_tokens.weight
        self._device = weight.device
        factor = (text.rope_parameters or {}).get("factor") or 1
        self._max_position = int(text.max_position_embeddings * factor)
        shape = text.num_hidden_layers, text.num_key_value_heads, head_dim(text)
        if capacity is None:
            per_token = SlotCache.bytes_per_token(*shape, weight.dtype.itemsize)
            capacity = min(self._max_position, _affordable(self._device, per_token * num_slots))
        self.cache = SlotCache(*shape, num_slots, capacity, weight.device, weight.dtype)
        self.decoder = Decoder(model.model.language_model, self.cache)
        vocab_size = model.lm_head.weight.shape[0]
        self.rules = RuleTable(vocab_size, self._device, max(DEFAULT_NUM_RULES, num_slots + 1))
        self._step = DecodingStep(self.decoder, self._embed_tokens, model.lm_head, self.rules)
        self.tokens_per_pass = tokens_per_pass or _TOKENS_PER_PASS.get(self._device.type, 2048)
        self.prefixes = PrefixStore(prefix_bytes)
        self._free_slots = list(range(num_slots))
        self._branch_of_action = {model.config.action_id(b): b for b in model.config.branches}
        self.num_tokens_run = 0
        self.num_forwards = 0
        self.intervene: Callable[[Tensor], Tensor] | None = None

    @property
    def num_slots(self) -> int:
        """Streams that can be open at once."""
        return self.cache.num_slots

    @property
    def num_free_slots(self) -> int:
        """Streams that can be opened now."""
        return len(self._free_slots)

    def open(self) -> Stream:
        """Begin a stream in a free slot; raise ``BudgetError`` if all are taken."""
        if not self._free_slots:
            raise BudgetError("all slots are taken; close a stream, or make an engine with more")
        return Stream(
            self._free_slots.pop(0), max_position=self._max_position, capacity=self.cache.capacity
        )

    def close(self, stream: Stream) -> None:
        """End a stream; its slot is free at once."""
        self.cache.clear(stream.slot)
        self._free_slots.append(stream.slot)
        self._free_slots.sort()

    def is_action(self, token_id: int) -> bool:
        """Whether a token is a control token, whose embedding is replaced."""
        return token_id in self._branch_of_action

    def branch_of_action(self, token_id: int) -> str | None:
        """The branch whose control token this is."""
        return self._branch_of_action.get(token_id)

    def encode(self, groups: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Encode the images of several extensions in common batches; one result per extension."""
        images = [[branch_and_image(p) for p in g if not isinstance(p, TokenPiece)] for g in groups]
        encoded = iter(self.encoders.encode([one for group in images for one in group]))
        return [[next(encoded) for _ in group] for group in images]

    def begin(self, stream: Stream, pieces: Sequence[Piece], encoded: Encoded) -> Prefill:
        """Prepare to append pieces, whose images :meth:`encode` has encoded, to a stream.

        Raises:
            PositionError: if there is nothing to append.
            BudgetError: if the stream would be longer than the context of the model or its slot.
        """
        items = list(self._items(pieces, encoded))
        num_tokens = sum(len(item.ids) for item in items)
        if num_tokens == 0:
            raise PositionError("there is nothing to append to the stream")
        saved = sum(
            len(i.ids) - max(i.features.grid_hw) for i in items if i.is_plain_image and i.features
        )
        if (needed := stream.position + num_tokens - saved) > stream.max_position:
            raise BudgetError(
                f"question, images and calls need {needed} positions, the model's context has "
                f"{stream.max_position}; shorten the question, or give fewer or smaller images"
            )
        if (needed := stream.length + num_tokens) > stream.capacity:
            raise BudgetError(
                f"question, images and calls need {needed} tokens, a stream has room for "
                f"{stream.capacity}; shorten the question, give fewer or smaller images, or load "
                "the model with a larger max_model_len"
            )
        return Prefill(self, stream, items)

    @torch.inference_mode()
    def prefill(self, prefills: Sequence[Prefill]) -> None:
        """Read on in some of these, first come first served, in one pass of limited length.

        One that begins like another that is not done waits, to begin with its prefix.

        Raises:
            PositionError: if a re-encoded image has no call, or a call begins a stream.
        """
        started = time.perf_counter()
        room = self.tokens_per_pass
        taken: list[tuple[Prefill, int]] = []
        parts: list[tuple[Tensor, Tensor]] = []
        for one in prefills:
            if room <= 0:
                break
            if not one.num_left or self._waits(one, [other for other, _ in taken]):
                continue
            embeds, positions = one.next_rows(room)
            taken.append((one, len(embeds)))
            parts.append((embeds, positions))
            room -= len(embeds)
        if taken:
            self._read(taken, parts, started)
        for one in prefills:
            if not one.num_left and one.extension is None:
                self._finish(one)

    def _waits(self, one: Prefill, taken: Sequence[Prefill]) -> bool:
        """Whether a prompt waits for another, whose beginning it can take over."""
        if not one.begins or not self.prefixes.max_bytes:
            return False
        return any(other.is_prompt and _shares_a_beginning(one, other) for other in taken)

    def _read(
        self,
        taken: Sequence[tuple[Prefill, int]],
        parts: Sequence[tuple[Tensor, Tensor]],
        started: float,
    ) -> None:
        places: list[int] = []
        segments, row = [], 0
        for one, size in taken:
            past, slot = one.stream.length, one.stream.slot
            first = self.cache.place(slot, past)
            places += range(first, first + size)
            segments.append(Segment(slot, slice(row, row + size), past))
            self.cache.note_written(slot, past + size)
            row += size
        embeds, positions = (
            parts[0]
            if len(parts) == 1
            else (torch.cat([e for e, _ in parts]), torch.cat([p for _, p in parts], dim=1))
        )
        at = torch.tensor(places, device=self._device)
        states = self.decoder.prefill(embeds, positions, at, segments)
        self.num_tokens_run += row
        self.num_forwards += 1
        run_ms = (time.perf_counter() - started) * 1e3
        for (one, size), state in zip(taken, states, strict=True):
            one.advance(size, state, run_ms)

    def extend(
        self, stream: Stream, pieces: Sequence[Piece], encoded: Encoded | None = None
    ) -> Extension:
        """Append pieces to a stream; errors as for :meth:`begin` and :meth:`prefill`.

        ``encoded`` is what :meth:`encode` made of the pieces; without it they are encoded here.
        """
        if encoded is None:
            (encoded,) = self.encode([pieces])
        prefill = self.begin(stream, pieces, encoded)
        while prefill.extension is None:
            self.prefill([prefill])
        return prefill.extension

    @torch.inference_mode()
    def step(self, streams: Sequence[Stream], token_ids: Sequence[int]) -> Tensor:
        """Append one token to each of several streams; returns logits ``[len(streams), V]``.

        Control tokens go through :meth:`extend`. If it raises, the streams are as they were.
        """
        order = sorted(range(len(streams)), key=lambda i: streams[i].slot)
        logits, states = self._step.logits(
            [streams[i] for i in order], [token_ids[i] for i in order]
        )
        self._count_step([streams[i] for i in order], [token_ids[i] for i in order], states)
        back = sorted(range(len(order)), key=order.__getitem__)
        return logits[back]

    @torch.inference_mode()
    def decode(
        self, streams: Sequence[Stream], token_ids: Sequence[int], choices: Sequence[Choice]
    ) -> list[int]:
        """Append one token to each of several streams, and choose the next of each.

        Control tokens go through :meth:`extend`. If it raises, the streams are as they were.
        """
        order = sorted(range(len(streams)), key=lambda i: streams[i].slot)
        ordered = [streams[i] for i in order]
        ids = [token_ids[i] for i in order]
        chosen, states = self._step.ids(ordered, ids, [choices[i] for i in order])
        self._count_step(ordered, ids, states)
        result = dict(zip(order, chosen, strict=True))
        return [result[i] for i in range(len(order))]

    @torch.inference_mode()
    def choose(self, logits: Sequence[Tensor], choices: Sequence[Choice]) -> list[int]:
        """Choose an id from each of several logits ``[V]``; ``NOT_FINITE`` where none can be."""
        packed = pack(choices, self.rules)
        return choose(torch.stack(list(logits)), packed, self.rules).tolist()

    @torch.inference_mode()
    def log_probs(
        self, streams: Sequence[Stream], ids: Sequence[int], choices: Sequence[Choice]
    ) -> list[float]:
        """Log-probabilities of ids that were chosen after the last token of each stream.

        See :func:`log_probabilities`; a token that its rule forced has 0. The head is run once more
        for it, so that steps of which nobody asks it are as fast as without.
        """
        states = torch.stack([one.hidden for one in streams if one.hidden is not None])
        packed = pack(choices, self.rules)
        every = log_probabilities(self.model.lm_head(states), packed, self.rules)
        at = torch.tensor(ids, device=self._device).clamp(min=0)  # of NOT_FINITE as well
        found = every.gather(-1, at[:, None])[:, 0]
        return found.masked_fill(packed.forced >= 0, 0).tolist()

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings ``[N, (1 + L) * D]``, a new tensor; see :meth:`Decoder.prefill`."""
        embeds = self._embed_tokens(torch.tensor(ids, device=self._device))
        width = self.num_deeper * embeds.shape[1]
        return F.pad(embeds, (0, width)) if width else embeds

    def project(self, stream: Stream, branch: str, features: Features) -> Projected:
        """Features of a re-encoded image, conditioned by the latest call of their branch."""
        condition = stream.conditions.get(branch)
        if condition is None and not self.model.config.alignment:
            raise PositionError(
                f"a {BRANCH_TOKENS[branch].encoder} re-encoding is to be appended, "
                f"but the stream holds no {BRANCH_TOKENS[branch].action} token to condition it"
            )
        if self.model.config.alignment:
            condition = None
        return self.model.projector(branch)(features, condition)

    def _count_step(self, streams: Sequence[Stream], ids: Sequence[int], states: Tensor) -> None:
        self.num_tokens_run += len(streams)
        self.num_forwards += 1
        for stream, token_id, state in zip(streams, ids, states, strict=True):
            stream.length += 1
            stream.position += 1
            stream.hidden = state
            stream.atoms.ids.append(token_id)

    def _finish(self, prefill: Prefill) -> None:
        stream = prefill.stream
        assert stream.hidden is not None
        prefill.extension = Extension(
            prefill.token_ids,
            self.model.lm_head(stream.hidden),
            prefill.images,
            prefill.run_ms,
            prefill.num_reused,
        )

    def keep(self, stream: Stream) -> None:
        """Keep what a stream holds for others that begin the same way.

        Its last state must be finite: then all that it has read is.
        """
        atoms = stream.atoms
        ids = np.array(atoms.ids, dtype=np.int64)
        num_bytes = stream.length * sum(
            buffer[0].nbytes for buffer in (*self.cache.keys, *self.cache.values)
        )
        if self.intervene is None and not self.prefixes.covers(ids, num_bytes):
            copied = Atoms(
                list(atoms.ids), list(atoms.uncut), list(atoms.saved), list(atoms.states)
            )
            self.prefixes.put(copied, self.cache.copy_out(stream.slot, stream.length))

    def _items(self, pieces: Iterable[Piece], encoded: Encoded) -> Iterator[_Item]:
        features = iter(encoded)
        for piece in pieces:
            if isinstance(piece, TokenPiece):
                yield from self._split(piece.ids)
                continue
            seen, reused = next(features)
            branch, image = branch_and_image(piece)
            grid, config = seen.grid_hw, self.model.config
            is_plain = isinstance(piece, ImagePiece)
            if not is_plain:
                grid = self.model.projector(branch).output_grid(grid)
            pad = config.image_token_id if is_plain else config.pad_id(branch)
            number = self.prefixes.number((is_plain, self.encoders.key(branch, image)))
            yield _Item((pad,) * (grid[0] * grid[1]), number, piece, seen, reused)

    def _split(self, ids: Sequence[int]) -> Iterator[_Item]:
        """Items of token ids: one begins at each control token."""
        num_actions = 0

        def part(token_id: int) -> int:
            nonlocal num_actions
            num_actions += self.is_action(token_id)
            return num_actions

        for _, group in groupby(ids, part):
            yield _Item(tuple(group))


def branch_and_image(piece: Piece) -> tuple[str, LoadedImage]:
    """Branch and image of a piece that is not tokens."""
    assert not isinstance(piece, TokenPiece)
    return (PLAIN if isinstance(piece, ImagePiece) else piece.branch), piece.image


def _shares_a_beginning(one: Prefill, other: Prefill) -> bool:
    ids: NDArray[np.int64] = one.atom_ids
    return common_length(ids, other.atom_ids) > len(ids) // 2


def _affordable(device: torch.device, bytes_per_token: int) -> int:
    """Tokens for half of the memory that a GPU has free, or that the host has in all."""
    if device.type == "cuda":
        num_bytes, _ = torch.cuda.mem_get_info(device)
    elif hasattr(os, "sysconf"):  # provided only once it is used
        num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        num_bytes = 8 * 2**30
    return int(num_bytes * _SHARE_OF_MEMORY) // bytes_per_token
