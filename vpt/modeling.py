"""The model: Qwen2-VL with vision branches, projectors, and the conditioned training forward.

Inference over a cache is in :mod:`vpt.engine`; this file is what a trainer calls.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from branches import Branch, Features
from branches.reencode import split_tower_tokens
from vpt.cache import ATTENTION_NAME
from vpt.config import VPTConfig, VRTConfig, add_side_files, load_config
from vpt.errors import FeatureCountError, PositionError
from vpt.positions import batch_mrope_positions
from vpt.projectors import PROJECTOR_STEMS, Projector
from vpt.tokens import BRANCH_TOKENS

KEY_MAPPING = {
    r"^model\.(layers|embed_tokens|norm)\b": r"model.language_model.\1",
    r"^visual\.": r"model.visual.",
    r"^detection_model\.": r"branches.dino.encoder.",
    r"^seg_model\.": r"branches.sam.encoder.",
    r"^clip_projector\.": r"projectors.reencode.",
    r"^detection_projector\.": r"projectors.dino.",
    r"^seg_projector\.": r"projectors.sam.",
}
"""Released parameter names -> ours; names that are already ours are left alone."""

UNUSED_RELEASED_KEYS = [
    r"^projectors\.reencode\.(linear|layernorm)_feature\.",
    r"^projectors\.sam\.linear_feature\.",
]
"""Weights the released projectors carry but never use."""


@dataclass(frozen=True)
class _Call:
    """A control token in a batch, and the images that are re-encoded for it."""

    branch: str
    row: int
    position: int
    looks: list[tuple[Features, Tensor]]  # features of an image, [N] positions of its pads


class VPTForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Qwen2-VL that can call for perception.

    Args:
        config: see :class:`vpt.config.VPTConfig`.
    """

    config_class = VPTConfig
    config: VPTConfig
    _keys_to_ignore_on_load_unexpected = UNUSED_RELEASED_KEYS

    def __init__(self, config: VPTConfig) -> None:
        super().__init__(config)
        self.branches = nn.ModuleDict()
        self.projectors = nn.ModuleDict()
        hidden_size = config.text_config.hidden_size
        for name in config.branches:
            feature_dim = hidden_size
            if (branch := build_branch(name, config)) is not None:
                self.branches[name] = branch
                feature_dim = branch.feature_dim
            self.projectors[name] = Projector(
                PROJECTOR_STEMS[name], feature_dim, hidden_size, config.projector_scale
            )
        self.post_init()
        for name in self.projectors:
            self.projector(name).reset_parameters()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> VPTForConditionalGeneration:
        """Load as transformers does; released parameter names and side files are understood."""
        path_or_id = str(pretrained_model_name_or_path)
        config = kwargs.pop("config", None) or load_config(path_or_id, **kwargs)
        add_side_files(config, path_or_id, **kwargs)
        kwargs.setdefault("key_mapping", KEY_MAPPING)
        return super().from_pretrained(path_or_id, *args, config=config, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, under this class's own parameter names."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(*args, **kwargs)

    def tower(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Run the backbone's vision tower.

        Args:
            pixel_values: ``[sum(t*h*w), 1176]``.
            image_grid_thw: ``[num_images, 3]`` in patches.

        Returns:
            ``[sum(t*h*w) / merge**2, D]``, all images end to end.
        """
        weight = self.model.visual.patch_embed.proj.weight
        pixels = pixel_values.to(weight.device, weight.dtype)
        return self.model.visual(pixels, grid_thw=image_grid_thw.to(weight.device)).pooler_output

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        clip_pixel_values: Tensor | None = None,
        clip_images_grid_thw: Tensor | None = None,
        detection_images: Tensor | None = None,
        seg_images: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if labels are given, of whole token streams.

        The k-th control token of a branch, in reading order, steers the k-th run of images of
        that branch; a call with no image only has its control token's embedding replaced.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 0 at padding.
            position_ids: ``[3, B, S]``; M-RoPE positions are computed if missing.
            labels: ``[B, S]``, -100 where ignored; control tokens are always ignored.
            pixel_values: ``[sum(t*h*w), 1176]`` of the images.
            image_grid_thw: ``[num_images, 3]`` in patches.
            clip_pixel_values: like ``pixel_values``, of the images the own tower re-encodes.
            clip_images_grid_thw: like ``image_grid_thw``, of those.
            detection_images: ``[num, 3, H, W]`` for DINOv2.
            seg_images: ``[num, 3, H, W]`` for SAM.
            mm_token_type_ids: accepted and not needed: types follow from ``input_ids``.
            logits_to_keep: compute only the last so many logits; 0 for all.
            **kwargs: with ``past_key_values`` or ``inputs_embeds`` all goes to Qwen2-VL as is.

        Raises:
            FeatureCountError: if placeholders and features differ in number.
            PositionError: if calls and re-encoded images do not fit each other.
        """
        if kwargs.get("past_key_values") is not None or kwargs.get("inputs_embeds") is not None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                labels=labels,
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw,
                mm_token_type_ids=mm_token_type_ids,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if input_ids is None:
            raise PositionError("input_ids are missing; pass the token ids of the batch")
        if position_ids is None:
            position_ids = batch_mrope_positions(
                input_ids,
                attention_mask,
                image_grid_thw,
                self.config.image_token_id,
                self.config.vision_config.spatial_merge_size,
            )
        embeds = self.get_input_embeddings()(input_ids)  # [B, S, D]
        if pixel_values is not None:
            if image_grid_thw is None:
                raise PositionError("pixel_values came without image_grid_thw")
            image_embeds = self.tower(pixel_values, image_grid_thw)
            embeds = scatter_features(embeds, input_ids == self.config.image_token_id, image_embeds)
        features = self._encode_branches(
            reencode=(clip_pixel_values, clip_images_grid_thw),
            dino=(detection_images,),
            sam=(seg_images,),
        )
        calls = self._find_calls(input_ids, features)
        if self.config.alignment or self.config.num_inner_forward_run == 1:
            for call in calls:
                embeds = self._write_looks(embeds, call, condition=None)
            hidden = self._run(embeds, attention_mask, position_ids)
        else:
            calls = [call for call in calls if call.position >= 0]
            hidden = self._run_conditioned(input_ids, embeds, attention_mask, position_ids, calls)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            actions = torch.zeros_like(input_ids, dtype=torch.bool)
            for name in self.config.branches:
                actions |= input_ids == self.config.action_id(name)
            loss = self.loss_function(
                logits=logits,
                labels=labels.masked_fill(actions, -100),
                vocab_size=self.config.text_config.vocab_size,
                **{k: v for k, v in kwargs.items() if k == "num_items_in_batch"},
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def projector(self, branch: str) -> Projector:
        """The projector of a branch."""
        return cast(Projector, self.projectors[branch])

    def encode(self, branch: str, *pixels: Tensor) -> list[Features]:
        """Features of images under one branch; ``pixels`` as its ``preprocess`` returns them."""
        if branch != "reencode":
            return cast(Branch, self.branches[branch]).encode(*pixels)
        pixel_values, grid_thw = pixels
        merge_size = self.config.vision_config.spatial_merge_size
        return split_tower_tokens(self.tower(pixel_values, grid_thw), grid_thw, merge_size)

    def _encode_branches(self, **pixels: tuple[Tensor | None, ...]) -> dict[str, list[Features]]:
        given = {name: values for name, values in pixels.items() if values[0] is not None}
        for name in given:
            if name not in self.projectors:
                have = ", ".join(BRANCH_TOKENS[b].encoder for b in self.projectors) or "none"
                raise PositionError(
                    f"pixels came for the branch {BRANCH_TOKENS[name].encoder!r}, "
                    f"which this model does not have; it has: {have}"
                )
        for name, values in given.items():
            if any(value is None for value in values):
                raise PositionError(f"pixels of {name!r} came without their grid")
        return {name: self.encode(name, *cast(Any, values)) for name, values in given.items()}

    def _find_calls(
        self, input_ids: Tensor, features: Mapping[str, Sequence[Features]]
    ) -> list[_Call]:
        """Match control tokens, placeholders and features, per branch and row.

        In alignment data there are images without calls; they get ``position`` -1.
        """
        calls: list[_Call] = []
        unconditioned = self.config.alignment or self.config.num_inner_forward_run == 1
        for name in self.config.branches:
            looks = self._match_pads(name, input_ids, features.get(name, ()))
            action_id = self.config.action_id(name)
            for row, row_looks in enumerate(looks):
                actions = (input_ids[row] == action_id).nonzero().flatten().tolist()
                if unconditioned:
                    calls.append(_Call(name, row, -1, row_looks))
                    continue
                calls += self._match_actions(name, row, actions, row_looks)
        return calls

    def _match_pads(
        self, name: str, input_ids: Tensor, features: Sequence[Features]
    ) -> list[list[tuple[Features, Tensor]]]:
        """Images of one branch, per row, each with the positions of its placeholders."""
        places = input_ids == self.config.pad_id(name)
        grids = [self.projector(name).output_grid(f.grid_hw) for f in features]
        num_features = sum(h * w for h, w in grids)
        if (num_places := int(places.sum())) != num_features and (features or num_places):
            raise FeatureCountError(
                f"{num_places} {BRANCH_TOKENS[name].pad} tokens but {num_features} features "
                f"of {len(features)} image(s)"
            )
        looks: list[list[tuple[Features, Tensor]]] = []
        used = 0
        for row in places:
            positions = row.nonzero().flatten()
            row_looks = []
            while len(positions):
                if used == len(grids) or (size := grids[used][0] * grids[used][1]) > len(positions):
                    raise FeatureCountError(
                        f"the {BRANCH_TOKENS[name].pad} tokens of one row do not hold whole images"
                    )
                row_looks.append((features[used], positions[:size]))
                positions = positions[size:]
                used += 1
            looks.append(row_looks)
        return looks

    def _match_actions(
        self, name: str, row: int, actions: list[int], looks: list[tuple[Features, Tensor]]
    ) -> list[_Call]:
        scale = self.config.projector_scale
        word = BRANCH_TOKENS[name].action
        if actions and actions[0] == 0:
            raise PositionError(f"{word} stands at the start of row {row}; nothing precedes it")
        if not looks:
            return [_Call(name, row, position, []) for position in actions]
        if len(actions) == scale:  # one condition for all images of the row, as released
            groups = [looks]
        elif len(actions) == scale * len(looks):
            groups = [[look] for look in looks]
        else:
            raise PositionError(
                f"row {row} has {len(actions)} {word} token(s) but {len(looks)} re-encoded "
                f"image(s); expected {scale} token(s) per image, or {scale} for all"
            )
        calls = [_Call(name, row, position, []) for position in actions]
        for index, group in enumerate(groups):
            last = (index + 1) * scale - 1
            if any(int(pads[0]) <= actions[last] for _, pads in group):
                raise PositionError(f"a re-encoded image of row {row} precedes its {word} token")
            calls[last] = _Call(name, row, actions[last], group)
        return calls

    def _write_looks(self, embeds: Tensor, call: _Call, condition: Tensor | None) -> Tensor:
        for features, pads in call.looks:
            projected = self.projector(call.branch)(features, condition).values.to(embeds)
            rows = torch.full_like(pads, call.row)
            embeds = embeds.index_put((rows, pads), projected)
        return embeds

    def _run(self, embeds: Tensor, attention_mask: Any, position_ids: Tensor) -> Tensor:
        return self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

    def _run_conditioned(
        self,
        input_ids: Tensor,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        calls: list[_Call],
    ) -> Tensor:
        """Final hidden states ``[B, S, D]`` with every control state found and used on the way.

        Attention is causal, so the states in front of a call never change: the stream is run in
        segments that end where a control state is needed, each over the keys and values of the
        ones before. All in all that is one pass. With hidden paragraphs the final pass differs
        from the start on; it is run whole once the control states are known.
        """
        if not calls:
            return self._run(embeds, attention_mask, position_ids)
        hidden_paragraphs = self._draw_paragraph_mask(input_ids, calls)
        segments = _Segments(calls, input_ids)
        attend = _SegmentRunner(self, attention_mask, position_ids)
        conditions: list[tuple[_Call, Tensor]] = []
        control_states: dict[tuple[str, int], list[Tensor]] = {}
        hidden = embeds.new_zeros(embeds.shape)
        num_runs = len(segments) - (1 if hidden_paragraphs is not None else 0)
        for number in range(num_runs):
            index, valid = segments[number]
            states = attend(embeds, index, valid)
            rows, columns = valid.nonzero(as_tuple=True)
            hidden = hidden.index_put((rows, index[rows, columns]), states[rows, columns])
            for call in segments.calls_after(number):
                condition = hidden[call.row, call.position - 1]
                conditions.append((call, condition))
                seen = control_states.setdefault((call.branch, call.row), [])
                seen.append(condition)
                embeds = _replace_embedding(embeds, call, condition)
                scale = self.config.projector_scale
                embeds = self._write_looks(embeds, call, torch.cat(seen[-scale:]))
        if hidden_paragraphs is None:
            return hidden
        embeds = embeds.masked_fill(hidden_paragraphs.unsqueeze(-1), 0)
        for call, condition in conditions:
            embeds = _replace_embedding(embeds, call, condition)
        return self._run(embeds, attention_mask, position_ids)

    def _draw_paragraph_mask(self, input_ids: Tensor, calls: list[_Call]) -> Tensor | None:
        """``[B, S]`` bool, True where the final pass sees nothing; ``None`` if it sees all."""
        if not self.training or self.config.para_mask_id == 0:
            return None
        paragraphs = (1,) if self.config.para_mask_id == 1 else (1, 3)
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row in sorted({call.row for call in calls if call.looks}):
            starts = input_ids[row].eq(cast(int, self.config.para_start_id)).nonzero().flatten()
            ends = input_ids[row].eq(cast(int, self.config.para_end_id)).nonzero().flatten()
            for paragraph in paragraphs:
                if float(torch.rand(())) < self.config.para_mask_ratio and len(ends) > paragraph:
                    mask[row, int(starts[paragraph]) + 1 : int(ends[paragraph])] = True
        return mask if mask.any() else None


class VRTForConditionalGeneration(VPTForConditionalGeneration):
    """The same under the model type of the oldest released checkpoints."""

    config_class = VRTConfig


def scatter_features(inputs_embeds: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """Write features over their placeholder embeddings.

    Args:
        inputs_embeds: ``[B, S, D]`` token embeddings.
        places: ``[B, S]`` bool, True at the placeholders.
        features: ``[N, D]``, every image of the batch end to end, in reading order.

    Returns:
        ``[B, S, D]``, a new tensor.

    Raises:
        FeatureCountError: if ``places`` marks a number of positions other than ``N``.
    """
    if (num_places := int(places.sum())) != len(features):
        raise FeatureCountError(f"{num_places} placeholder tokens but {len(features)} features")
    return inputs_embeds.masked_scatter(places.unsqueeze(-1), features.to(inputs_embeds))


def _replace_embedding(embeds: Tensor, call: _Call, condition: Tensor) -> Tensor:
    place = (
        torch.tensor([call.row], device=embeds.device),
        torch.tensor([call.position], device=embeds.device),
    )
    return embeds.index_put(place, condition.to(embeds)[None])


class _Segments:
    """How a batch is cut so that each segment ends where a control state is needed.

    Rows with fewer calls than others are cut where the longest of the others is, so that the
    segments stay equally long and little is padded.
    """

    def __init__(self, calls: list[_Call], input_ids: Tensor) -> None:
        num_rows, length = input_ids.shape
        self.device = input_ids.device
        by_row = [
            sorted((c for c in calls if c.row == row), key=lambda c: c.position)
            for row in range(num_rows)
        ]
        num_cuts = max(len(row) for row in by_row)
        self._calls = [[row[cut] for row in by_row if len(row) > cut] for cut in range(num_cuts)]
        self._bounds = [[0] * num_rows]
        for at_cut in self._calls:
            own = {call.row: call.position for call in at_cut}
            furthest = max(own.values())
            previous = self._bounds[-1]
            self._bounds.append(
                [own.get(row, max(furthest, previous[row])) for row in range(num_rows)]
            )
        self._bounds.append([length] * num_rows)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """``[B, L]`` indices into the stream, and ``[B, L]`` bool: which of them are meant."""
        first = torch.tensor(self._bounds[number], device=self.device)[:, None]
        last = torch.tensor(self._bounds[number + 1], device=self.device)[:, None]
        width = max(int((last - first).max()), 1)
        index = first + torch.arange(width, device=self.device)
        valid = index < last
        return torch.where(valid, index, 0), valid

    def calls_after(self, number: int) -> list[_Call]:
        """Calls whose control state the segment has just produced."""
        return self._calls[number] if number < len(self._calls) else []


class _SegmentRunner:
    """Runs segments one after the other over a growing cache, with gradients through it."""

    def __init__(
        self,
        model: VPTForConditionalGeneration,
        attention_mask: Tensor | None,
        position_ids: Tensor,
    ) -> None:
        self.model = model
        self.language_model = model.model.language_model
        self.attention_mask = attention_mask
        self.position_ids = position_ids
        self.can_cache = self._can_cache()
        self.cache = DynamicCache(config=self.language_model.config)
        self.key_index: Tensor | None = None  # [B, K]; -1 where a key must not be seen

    def _can_cache(self) -> bool:
        checkpointed = self.language_model.gradient_checkpointing and self.model.training
        attention = self.language_model.config._attn_implementation
        return attention in ("eager", "sdpa", ATTENTION_NAME) and not checkpointed

    def __call__(self, embeds: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        if not self.can_cache:
            return self._run_from_start(embeds, index)
        rows = torch.arange(len(index), device=index.device)[:, None]
        seen = valid
        if self.attention_mask is not None:
            seen = valid & self.attention_mask[rows, index].bool()
        new_keys = torch.where(seen, index, -1)
        keys = new_keys if self.key_index is None else torch.cat([self.key_index, new_keys], 1)
        self.key_index = keys
        # A padded query sees everything that is there: any finite answer will do.
        limit = torch.where(valid, index, embeds.shape[1])[:, :, None]
        mask = (keys[:, None] <= limit) & (keys[:, None] >= 0)  # [B, L, K]
        mask |= ~mask.any(-1, keepdim=True)
        return self.language_model(
            inputs_embeds=embeds[rows, index],
            position_ids=self.position_ids[:, rows, index],
            attention_mask={"full_attention": self._as_bias(mask[:, None], embeds.dtype)},
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _as_bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if self.language_model.config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        )

    def _run_from_start(self, embeds: Tensor, index: Tensor) -> Tensor:
        """Without a cache (gradient checkpointing, flash attention): prefix and all."""
        length = int(index.max()) + 1
        mask = None if self.attention_mask is None else self.attention_mask[:, :length]
        hidden = self.model._run(embeds[:, :length], mask, self.position_ids[:, :, :length])
        rows = torch.arange(len(index), device=index.device)[:, None]
        return hidden[rows, index]


def build_branch(name: str, config: VPTConfig) -> Any:
    """The branch ``name`` with fresh weights; ``None`` for one without weights of its own."""
    if name not in _ENCODER_BUILDERS:
        return None
    return _ENCODER_BUILDERS[name](config.branch_configs.get(name, {}))


def _build_dino(settings: Mapping[str, Any]) -> nn.Module:
    from transformers import Dinov2Config

    from branches.dino import RELEASED_CONFIG, DinoBranch

    config = Dinov2Config(**(settings.get("encoder") or RELEASED_CONFIG))
    return DinoBranch(config, settings.get("preprocess"))


def _build_sam(settings: Mapping[str, Any]) -> nn.Module:
    from transformers.models.sam.configuration_sam import SamVisionConfig

    from branches.sam import RELEASED_CONFIG, SamBranch

    config = SamVisionConfig(**(settings.get("encoder") or RELEASED_CONFIG))
    return SamBranch(config, settings.get("preprocess"))


_ENCODER_BUILDERS = {"dino": _build_dino, "sam": _build_sam}
