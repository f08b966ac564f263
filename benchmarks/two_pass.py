"""The released protocol, written plainly: rebuild everything, run the LLM twice, copy the cache.

It has the interface of :class:`vpt.inference.engine.Engine` and serves as test oracle and as
baseline of ``benchmarks/``. A turn is decoded to its end, forced tokens included. Each extension
rebuilds the prompt from its beginning, encodes every image again (the same one once per use) and
runs the LLM once to find the control state and once to use it, with logits at every position; each
further token, too, is run twice, each time over a deep copy of the cache. For several calls in one
stream, which the released code cannot do, each call has a finding pass of its own. What the
released driver does besides, starting a new process and loading the model again for each round, is
left out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vpt.branches import Features
from vpt.inference.engine import Encoded, branch_and_image
from vpt.inference.features import Encoders, FeatureCache
from vpt.inference.sampling import Choice, RuleTable, choose, pack
from vpt.inference.stream import AppendedImage, Extension, Stream
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.positions import mrope_positions
from vpt.model.processing import FeaturePiece, ImagePiece, Piece, TokenPiece, VPTProcessor
from vpt.protocol.tokens import PLAIN


@dataclass
class _History(Stream):
    pieces: list[Piece] = field(default_factory=list)
    past: DynamicCache | None = None


@dataclass
class Waiting:
    """Pieces that wait to be appended to a stream, and the result once they are."""

    stream: Stream
    pieces: Sequence[Piece]
    extension: Extension | None = None


class TwoPassEngine:
    """Drop-in engine that keeps to the released protocol.

    Args:
        model: in evaluation mode.
        processor: of the model.

    Attributes:
        num_tokens_run: tokens the LLM has read, all passes together.
        num_forwards: LLM passes made.
    """

    def __init__(self, model: VPTForConditionalGeneration, processor: VPTProcessor) -> None:
        self.model = model
        self.encoders = Encoders(model, processor, FeatureCache(max_bytes=0))
        self._language_model = model.model.language_model
        self._branch_of_action = {model.config.action_id(b): b for b in model.config.branches}
        self._rules = RuleTable(model.lm_head.weight.shape[0], self._device)
        self.num_tokens_run = 0
        self.num_forwards = 0

    def open(self) -> Stream:
        """Begin a stream."""
        return _History(slot=0)

    def close(self, stream: Stream) -> None:
        """End a stream."""

    def keep(self, stream: Stream) -> None:
        """Do nothing: the released protocol keeps nothing."""

    @property
    def num_free_slots(self) -> int:
        """There is always one."""
        return 1

    def is_action(self, token_id: int) -> bool:
        """Whether a token is a control token."""
        return token_id in self._branch_of_action

    def encode(self, groups: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Nothing: the released protocol encodes within each round."""
        return [[] for _ in groups]

    def begin(self, stream: Stream, pieces: Sequence[Piece], encoded: Encoded) -> Waiting:
        """Pieces that wait to be appended."""
        return Waiting(stream, pieces)

    def prefill(self, prefills: Sequence[Waiting]) -> None:
        """Append all that waits, one after the other."""
        for one in prefills:
            one.extension = self.extend(one.stream, one.pieces)

    def choose(self, logits: Sequence[Tensor], choices: Sequence[Choice]) -> list[int]:
        """As ``Engine.choose``: the choice is not what differs."""
        packed = pack(choices, self._rules)
        return choose(torch.stack(list(logits)), packed, self._rules).tolist()

    def decode(
        self, streams: Sequence[Stream], token_ids: Sequence[int], choices: Sequence[Choice]
    ) -> list[int]:
        """Append one token to each stream and choose the next ones."""
        return self.choose(list(self.step(streams, token_ids)), choices)

    @torch.inference_mode()
    def extend(
        self,
        stream: Stream,
        pieces: Sequence[Piece],
        encoded: Encoded | None = None,
    ) -> Extension:
        """Rebuild the stream with these pieces behind it; as ``Engine.extend``."""
        assert isinstance(stream, _History)
        num_before = stream.length
        num_images_before = sum(not isinstance(p, TokenPiece) for p in stream.pieces)
        started = time.perf_counter()
        if stream.length and isinstance(pieces[0], TokenPiece):
            for token_id in pieces[0].ids[:-1]:
                self._decode(stream, token_id)  # thrown away: the next round begins anew
        decode_ms = (time.perf_counter() - started) * 1e3
        stream.pieces += pieces
        features = self._encode_all(stream.pieces)
        started = time.perf_counter()
        ids, spans = self._lay_out(stream.pieces, features)
        logits, results = self._run_rounds(stream, ids, features, spans)
        run_ms = decode_ms + (time.perf_counter() - started) * 1e3
        images = results[num_images_before:]
        return Extension(ids[num_before:], logits, images, run_ms)

    @torch.inference_mode()
    def step(self, streams: Sequence[Stream], token_ids: Sequence[int]) -> Tensor:
        """Append one token to each stream, one stream after the other."""
        rows = [self._step(s, t) for s, t in zip(streams, token_ids, strict=True)]
        return torch.stack(rows)

    def _step(self, stream: Stream, token_id: int) -> Tensor:
        assert isinstance(stream, _History)
        stream.pieces.append(TokenPiece((token_id,)))
        return self._decode(stream, token_id)

    def _decode(self, stream: _History, token_id: int) -> Tensor:
        embeds = self.model.get_input_embeddings()(torch.tensor([[token_id]], device=self._device))
        positions = torch.full((3, 1, 1), stream.position, device=self._device)
        self._run(embeds, positions, copy.deepcopy(stream.past))
        stream.past = copy.deepcopy(stream.past)
        stream.hidden = self._run(embeds, positions, stream.past)[0, -1]
        stream.length += 1
        stream.position += 1
        return self.model.lm_head(stream.hidden)

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _encode_all(self, pieces: Sequence[Piece]) -> list[Features]:
        images = [branch_and_image(piece) for piece in pieces if not isinstance(piece, TokenPiece)]
        return [self.encoders.encode([image])[0][0] for image in images]

    def _lay_out(
        self, pieces: Sequence[Piece], features: Sequence[Features]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the whole stream, and where in them each image stands."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        waiting = iter(features)
        for piece in pieces:
            if isinstance(piece, TokenPiece):
                ids += piece.ids
                continue
            grid_hw, pad_id = next(waiting).grid_hw, self.model.config.image_token_id
            if isinstance(piece, FeaturePiece):
                grid_hw = self.model.projector(piece.branch).output_grid(grid_hw)
                pad_id = self.model.config.pad_id(piece.branch)
            spans.append((len(ids), len(ids) + grid_hw[0] * grid_hw[1]))
            ids += [pad_id] * (grid_hw[0] * grid_hw[1])
        return ids, spans

    def _run_rounds(
        self,
        stream: _History,
        ids: list[int],
        features: Sequence[Features],
        spans: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, list[AppendedImage]]:
        images = [p for p in stream.pieces if not isinstance(p, TokenPiece)]
        embeds = self.model.get_input_embeddings()(torch.tensor([ids], device=self._device))
        grids, deeper = [], list[Tensor]()
        for image, seen, (start, end) in zip(images, features, spans, strict=True):
            if isinstance(image, ImagePiece):
                first, *rest = seen.values.to(embeds).split(embeds.shape[-1], dim=-1)
                embeds[0, start:end] = first
                deeper = deeper or [torch.zeros_like(embeds) for _ in rest]
                for whole, values in zip(deeper, rest, strict=True):
                    whole[0, start:end] = values
                grids.append(seen.grid_hw)
        image_token_id = self.model.config.image_token_id
        positions, following = mrope_positions(ids, grids, image_token_id)
        positions = positions[:, None].to(self._device)
        conditions: dict[int, Tensor] = {}  # position of a control token -> its state
        for place, token_id in enumerate(ids):
            if token_id not in self._branch_of_action:
                continue
            conditions[place] = self._run(embeds, positions, None, deeper)[0, place - 1]
            embeds[0, place] = conditions[place]
            self._write_features(embeds, ids, images, features, spans, conditions)
        if not conditions:
            self._run(
                embeds, positions, None, deeper
            )  # the released forward runs twice all the same
        results = self._write_features(embeds, ids, images, features, spans, conditions)
        stream.past = DynamicCache(config=self._language_model.config)
        hidden = self._run(embeds, positions, stream.past, deeper)
        stream.hidden, stream.length, stream.position = hidden[0, -1], len(ids), following
        return self.model.lm_head(hidden).float()[0, -1], results

    def _write_features(
        self,
        embeds: Tensor,
        ids: list[int],
        images: Sequence[ImagePiece | FeaturePiece],
        features: Sequence[Features],
        spans: Sequence[tuple[int, int]],
        conditions: dict[int, Tensor],
    ) -> list[AppendedImage]:
        results = []
        for image, seen, (start, end) in zip(images, features, spans, strict=True):
            if isinstance(image, ImagePiece):
                results.append(AppendedImage(PLAIN, seen.grid_hw, end - start, False, None))
                continue
            own = [
                p
                for p in conditions
                if p < start and self._branch_of_action[ids[p]] == image.branch
            ]
            condition = conditions[max(own)] if own else None
            projected = self.model.projector(image.branch)(seen, condition)
            embeds[0, start:end] = projected.values.to(embeds)
            results.append(
                AppendedImage(image.branch, projected.grid_hw, end - start, False, projected.scores)
            )
        return results

    def _run(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        past: DynamicCache | None,
        deeper: Sequence[Tensor] = (),
    ) -> Tensor:
        self.num_tokens_run += embeds.shape[1]
        self.num_forwards += 1
        return self.model._run(embeds, None, position_ids, past, deeper)
