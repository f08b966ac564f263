"""The model: Qwen2-VL with vision branches, projectors, and the conditioned training forward.

Inference over a cache is in :mod:`vpt.inference.engine`; this file is what a trainer calls.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from vpt.branches import Branch, Features
from vpt.branches.dino import has_newer_names
from vpt.branches.reencode import split_tower_tokens
from vpt.errors import FeatureCountError, PositionError
from vpt.files import replacing_files
from vpt.model.config import (
    VPTConfig,
    VRTConfig,
    add_side_files,
    check_generation_config,
    check_numbers,
    load_config,
)
from vpt.model.generation import CACHE, CallingGenerationMixin
from vpt.model.hub import as_checkpoint_error, check_weights, copy_part, other_weights
from vpt.model.positions import batch_mrope_positions
from vpt.model.projectors import PROJECTOR_STEMS, Projector
from vpt.model.segments import Call, SegmentReader, in_rounds
from vpt.model.shim import ShimSavingMixin
from vpt.model.weights import UNUSED_RELEASED_KEYS, check_account, key_mapping, stored_weights
from vpt.protocol.tokens import BRANCH_TOKENS

_NOT_NEEDED = {"cache_position", "num_items_in_batch"}
"""Inputs of the forward that change nothing, or are read elsewhere."""


class VPTForConditionalGeneration(
    ShimSavingMixin, CallingGenerationMixin, Qwen2VLForConditionalGeneration
):
    """Qwen2-VL that can call for perception.

    Args:
        config: see :class:`vpt.model.config.VPTConfig`.
    """

    config_class = VPTConfig
    config: VPTConfig
    get_rope_index = None  # tells LLaMA-Factory that forward computes positions by itself
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
                PROJECTOR_STEMS[name],
                feature_dim,
                hidden_size,
                config.projector_scale,
                freeze_stem=config.freeze_stems,
            )
        self.post_init()
        for name in self.projectors:
            self.projector(name).reset_parameters()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> VPTForConditionalGeneration:
        """Load as transformers does; released parameter names and side files are understood.

        Raises:
            CheckpointError: if the folder cannot be loaded, an option is unknown, or the weights
                are not exactly those of the model.
        """
        path_or_id = str(pretrained_model_name_or_path)
        if kwargs.get("subfolder") and Path(path_or_id).is_dir():
            path_or_id = str(Path(path_or_id, kwargs.pop("subfolder")))
        with as_checkpoint_error(f"cannot make a model of {path_or_id}"):
            config = kwargs.pop("config", None) or load_config(path_or_id, **kwargs)
            add_side_files(config, path_or_id, **kwargs)
            check_generation_config(path_or_id, **kwargs)
            with_account = kwargs.pop("output_loading_info", False)
            # Weights of another shape are named and refused by check_account.
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            kwargs.setdefault("key_mapping", key_mapping())
            if not {"gguf_file", "state_dict", "subfolder", "variant"} & set(kwargs):
                make = partial(cls, copy.deepcopy(config))
                check_weights(path_or_id, make, kwargs["key_mapping"])
            model, account = super().from_pretrained(path_or_id, *args, config=config, **kwargs)
        check_account(path_or_id, account)
        return cast(Any, (model, account)) if with_account else model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does, under names that do not depend on its release.

        The depth tokenizer in the folder that the model was loaded from is saved with it.
        """
        kwargs.setdefault("save_original_format", False)
        if has_newer_names() and "dino" in self.branches:
            kwargs["state_dict"] = stored_weights(kwargs.get("state_dict") or self.state_dict())
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replacing_files(Path(save_directory)) as draft:
            super().save_pretrained(draft, *args, **kwargs)
            stale = [] if kwargs.get("variant") else other_weights(Path(save_directory), draft)
        for file in stale:
            file.unlink()
        if "depth" in self.config.content_tokens.kinds:
            copy_part(self.name_or_path, self.config.depth_tokenizer, save_directory)

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
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if labels are given, of whole token streams.

        The k-th control token of a branch, in reading order, steers the k-th run of images of
        that branch; a call with no image, because it comes last or because a row was cut before
        it, only has its control token's embedding replaced.

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
            past_key_values: filled with the stream, or, if it holds one already, continued by
                ``input_ids`` ``[B, 1]``.
            cache: the same by the name that transformers uses from 5.24 on.
            inputs_embeds: refused: calls and placeholders are found by their ids.
            logits_to_keep: compute only the last so many logits; 0 for all.
            **kwargs: ``num_items_in_batch`` for the loss, and settings that change no value.

        Raises:
            FeatureCountError: if placeholders and features differ in number.
            PositionError: if calls and re-encoded images do not fit each other, positions have
                another shape, or there are inputs that this model does not read.
        """
        if input_ids is None or inputs_embeds is not None:
            raise PositionError("input_ids are missing; pass the token ids, not inputs_embeds")
        _refuse_unread(kwargs)
        past_key_values = cache if past_key_values is None else past_key_values
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return self._continue(input_ids, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            position_ids = batch_mrope_positions(
                input_ids,
                attention_mask,
                image_grid_thw,
                self.config.image_token_id,
                self.config.vision_config.spatial_merge_size,
            )
        elif position_ids.shape != (3, *input_ids.shape):
            raise PositionError(
                f"position_ids must be [3, B, S], not {list(position_ids.shape)}; leave them out. "
                "Rows packed by LLaMA-Factory are not supported: set `packing: false`"
            )
        embeds = self._embed(input_ids, pixel_values, image_grid_thw)
        features = self._encode_branches(
            reencode=(clip_pixel_values, clip_images_grid_thw),
            dino=(detection_images,),
            sam=(seg_images,),
        )
        calls = self._find_calls(input_ids, features)
        if self.config.alignment or self.config.num_inner_forward_run == 1:
            for call in calls:
                embeds = self._write_looks(embeds, call, condition=None)
            hidden = self._run(embeds, attention_mask, position_ids, past_key_values)
        else:
            hidden = self._run_conditioned(
                input_ids, embeds, attention_mask, position_ids, calls, past_key_values
            )
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, input_ids, kwargs.get("num_items_in_batch"))
        if past_key_values is not None:
            _remember(past_key_values, hidden)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: past_key_values})

    def _embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_grid_thw: Tensor | None
    ) -> Tensor:
        """Embeddings ``[B, S, D]``, images in place."""
        embeds = self.get_input_embeddings()(input_ids)
        image_embeds = embeds.new_empty(0, embeds.shape[-1])
        if pixel_values is not None:
            if image_grid_thw is None:
                raise PositionError("pixel_values came without image_grid_thw")
            image_embeds = self.tower(pixel_values, image_grid_thw)
        return scatter_features(embeds, input_ids == self.config.image_token_id, image_embeds)

    def _loss(
        self, logits: Tensor, labels: Tensor, input_ids: Tensor, num_items_in_batch: Any
    ) -> Tensor:
        """Mean cross entropy of the next token, control tokens left out."""
        actions = torch.zeros_like(input_ids, dtype=torch.bool)
        for name in self.config.branches:
            actions |= input_ids == self.config.action_id(name)
        counted = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.loss_function(
            logits=logits,
            labels=labels.masked_fill(actions, -100),
            vocab_size=self.config.text_config.vocab_size,
            **counted,
        )

    def _continue(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache,
    ) -> CausalLMOutputWithPast:
        """One step of ``generate``: a control token takes the last hidden state for embedding."""
        if input_ids.shape[1] != 1 or position_ids is None:
            raise PositionError("a stream in a cache is continued by one token with its position")
        embeds = self.get_input_embeddings()(input_ids)
        steered = self.config.num_inner_forward_run == 2 and not self.config.alignment
        for name in self.config.branches if steered else ():
            is_action = (input_ids == self.config.action_id(name)).unsqueeze(-1)
            embeds = torch.where(is_action, past_key_values.control_states.to(embeds), embeds)
        hidden = self._run(embeds, attention_mask, position_ids, past_key_values)
        _remember(past_key_values, hidden)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), **{CACHE: past_key_values})

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
    ) -> list[Call]:
        """Match control tokens, placeholders and features, per branch and row.

        In alignment data there are images without calls; they get ``position`` -1.
        """
        calls: list[Call] = []
        unconditioned = self.config.alignment or self.config.num_inner_forward_run == 1
        for name in self.config.branches:
            looks = self._match_pads(name, input_ids, features.get(name, ()))
            action_id = self.config.action_id(name)
            for row, row_looks in enumerate(looks):
                actions = (input_ids[row] == action_id).nonzero().flatten().tolist()
                if unconditioned:
                    calls.append(Call(name, row, -1, row_looks))
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
    ) -> list[Call]:
        scale = self.config.projector_scale
        word = BRANCH_TOKENS[name].action
        if actions and actions[0] == 0:
            raise PositionError(f"{word} stands at the start of row {row}; nothing precedes it")
        if not looks:
            return [Call(name, row, position, []) for position in actions]
        if len(actions) == scale:  # one condition for all images of the row, as released
            groups = [looks]
        elif len(actions) == scale * len(looks) or _come_last(actions[scale * len(looks) :], looks):
            groups = [[look] for look in looks]
        else:
            raise PositionError(
                f"row {row} has {len(actions)} {word} token(s) but {len(looks)} re-encoded "
                f"image(s); expected {scale} token(s) per image, or {scale} for all"
            )
        calls = [Call(name, row, position, []) for position in actions]
        for index, group in enumerate(groups):
            last = (index + 1) * scale - 1
            if any(int(pads[0]) <= actions[last] for _, pads in group):
                raise PositionError(f"a re-encoded image of row {row} precedes its {word} token")
            calls[last] = Call(name, row, actions[last], group)
        return calls

    def _write_looks(self, embeds: Tensor, call: Call, condition: Tensor | None) -> Tensor:
        for features, pads in call.looks:
            projected = self.projector(call.branch)(features, condition).values.to(embeds)
            rows = torch.full_like(pads, call.row)
            embeds = embeds.index_put((rows, pads), projected)
        return embeds

    def _run(
        self,
        embeds: Tensor,
        attention_mask: Any,
        position_ids: Tensor,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        return self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None,
            **{CACHE: past_key_values},
        ).last_hidden_state

    def _run_conditioned(
        self,
        input_ids: Tensor,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        calls: list[Call],
        past_key_values: Cache | None,
    ) -> Tensor:
        """Final hidden states ``[B, S, D]`` with every control state found and used on the way.

        Attention is causal, so the states in front of a call never change: rows are read as far
        as a control state is needed, then on. All in all that is one pass. Rows with hidden
        paragraphs differ from the start on, and are read again once their control states are
        known; so are all if a cache is to be filled, in transformers' way.
        """
        if not calls:
            return self._run(embeds, attention_mask, position_ids, past_key_values)
        hidden_paragraphs = self._draw_paragraph_mask(input_ids, calls)
        reader = SegmentReader(self.model.language_model, attention_mask, position_ids)
        conditions: list[tuple[Call, Tensor]] = []
        control_states: dict[tuple[str, int], list[Tensor]] = {}
        for round_ in in_rounds(calls):
            reader.read(embeds, {call.row: call.position for call in round_})
            for call in round_:
                condition = reader.last_state(call.row)
                conditions.append((call, condition))
                seen = control_states.setdefault((call.branch, call.row), [])
                seen.append(condition)
                embeds = _replace_embedding(embeds, call, condition)
                scale = self.config.projector_scale
                embeds = self._write_looks(embeds, call, torch.cat(seen[-scale:]))
        if hidden_paragraphs is not None:
            embeds = embeds.masked_fill(hidden_paragraphs.unsqueeze(-1), 0)
            for call, condition in conditions:
                embeds = _replace_embedding(embeds, call, condition)
            reader.restart(hidden_paragraphs.any(-1).nonzero().flatten().tolist())
        if past_key_values is not None:
            return self._run(embeds, attention_mask, position_ids, past_key_values)
        num_rows, length = input_ids.shape
        reader.read(embeds, dict.fromkeys(range(num_rows), length), is_last=True)
        return reader.hidden_states()

    def _draw_paragraph_mask(self, input_ids: Tensor, calls: list[Call]) -> Tensor | None:
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


def _refuse_unread(kwargs: Mapping[str, Any]) -> None:
    """Make sure that no input is passed over in silence, such as a cache under a new name."""
    for name, value in kwargs.items():
        if isinstance(value, Tensor | Cache) and name not in _NOT_NEEDED:
            raise PositionError(
                f"this model does not read the input {name!r}; remove it, or, if transformers "
                f"{transformers.__version__} added it, use a release that vpt-runtime supports"
            )


def _remember(cache: Cache, hidden: Tensor) -> None:
    """Keep the states a next control token would take, with the cache they belong to."""
    cache.control_states = hidden[:, -1:].detach()


def _replace_embedding(embeds: Tensor, call: Call, condition: Tensor) -> Tensor:
    place = (
        torch.tensor([call.row], device=embeds.device),
        torch.tensor([call.position], device=embeds.device),
    )
    return embeds.index_put(place, condition.to(embeds)[None])


def _come_last(actions: list[int], looks: list[tuple[Features, Tensor]]) -> bool:
    """Whether there are calls behind all images: a row may end with one, or have been cut."""
    return bool(actions) and all(int(pads[-1]) < actions[0] for _, pads in looks)


def build_branch(name: str, config: VPTConfig) -> Any:
    """The branch ``name`` with fresh weights; ``None`` for one without weights of its own."""
    if name not in _ENCODER_BUILDERS:
        return None
    return _ENCODER_BUILDERS[name](config.branch_configs.get(name, {}))


def _build_dino(settings: Mapping[str, Any]) -> nn.Module:
    from transformers import Dinov2Config

    from vpt.branches.dino import RELEASED_CONFIG, DinoBranch

    config = Dinov2Config(**(settings.get("encoder") or RELEASED_CONFIG))
    check_numbers(config.to_dict())
    return DinoBranch(config, settings.get("preprocess"))


def _build_sam(settings: Mapping[str, Any]) -> nn.Module:
    from transformers.models.sam.configuration_sam import SamVisionConfig

    from vpt.branches.sam import RELEASED_CONFIG, SamBranch

    config = SamVisionConfig(**(settings.get("encoder") or RELEASED_CONFIG))
    check_numbers(config.to_dict())
    return SamBranch(config, settings.get("preprocess"))


_ENCODER_BUILDERS = {"dino": _build_dino, "sam": _build_sam}
