"""The model: a backbone with vision branches, projectors, and the conditioned training forward.

Inference over a cache is in :mod:`vpt.inference.engine`; this file is what a trainer calls.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from vpt.branches import Features
from vpt.branches.base import Backbone, ModelBranch, branch_class
from vpt.errors import CheckpointError, FeatureCountError, PositionError, PromptError
from vpt.files import replace_atomically
from vpt.model.config import (
    VPTConfig,
    VPTQwen3Config,
    VPTQwen25Config,
    VPTSettings,
    VRTConfig,
    add_side_files,
    check_generation_config,
    load_config,
)
from vpt.model.generation import CACHE, CallingGenerationMixin
from vpt.model.hub import (
    UNUSED_RELEASED_KEYS,
    ShimSavingMixin,
    as_checkpoint_error,
    check_account,
    check_weights,
    copy_part,
    key_mapping,
    other_weights,
    stored_weights,
)
from vpt.model.intended import IntendedInputs
from vpt.model.lockstep import (
    Work,
    agree,
    has_partitioned_weights,
    is_in_lockstep,
    project_blank,
    read_blank,
)
from vpt.model.matching import ControlCall, draw_paragraph_mask, find_calls, in_rounds
from vpt.model.positions import batch_mrope_positions
from vpt.model.projectors import Projector
from vpt.model.segments import SegmentReader
from vpt.protocol.tokens import BRANCH_TOKENS, PLAIN, TOWER

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Types that weights can be computed in."""

Deeper = Sequence[Tensor]
"""``[B, S, D]`` of the LLM's first layers each, to be added to their outputs (deepstack)."""

_NOT_NEEDED = {"cache_position", "num_items_in_batch"}
"""Inputs of the forward that change nothing, or are read elsewhere."""


class _ListingPixels:
    """A ``forward`` with the pixels of all branches in its signature, read by ``generate``."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.signature = inspect.signature(forward)
        self.listed: list[str] | None = None

    def __get__(self, model: Any, owner: Any = None) -> Any:
        """Bind to a model, which each step does; list the pixels again if the table has changed."""
        names = [name for row in BRANCH_TOKENS.values() for name in row.arguments]
        if names != self.listed:
            *named, rest = self.signature.parameters.values()
            kind = inspect.Parameter.KEYWORD_ONLY
            pixels = [inspect.Parameter(name, kind, default=None) for name in names]
            self.forward.__signature__ = self.signature.replace(parameters=[*named, *pixels, rest])
            self.listed = names
        return self.forward.__get__(model, owner)


class PatchProjection(nn.Conv3d):
    """The tower's convolution over patches, which do not overlap: one product of two matrices.

    cuDNN is up to thousands of times slower at it in bfloat16 on some GPUs, and a CPU takes three
    times as long.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """Project ``[N, C, t, p, p]`` to ``[N, D]``."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class CallingModel(ShimSavingMixin, CallingGenerationMixin):
    """A backbone that can call for perception; goes in front of transformers' model class."""

    config: Any

    if TYPE_CHECKING:  # what transformers' class brings

        def __getattr__(self, name: str) -> Any: ...

    trains_in_lockstep = False  # set by a trainer whose processes reduce sharded gradients
    get_rope_index = None  # tells LLaMA-Factory that forward computes positions by itself
    _keys_to_ignore_on_load_unexpected = UNUSED_RELEASED_KEYS

    def __init__(self: Any, config: VPTSettings) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model.visual.patch_embed.proj.__class__ = PatchProjection
        self.branches = nn.ModuleDict()
        self.projectors = nn.ModuleDict()
        hidden_size = config.text_config.hidden_size
        for name in config.branches:
            branch = build_branch(name, config, backbone_of(config))
            if isinstance(branch, nn.Module):
                self.branches[name] = branch
            self.projectors[name] = Projector(
                BRANCH_TOKENS[name].stem,
                branch.feature_dim,
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
            _check_family(cls, config, path_or_id)
            add_side_files(config, path_or_id, **kwargs)
            check_generation_config(path_or_id, **kwargs)
            with_account = kwargs.pop("output_loading_info", False)
            # Weights of another shape are named and refused by check_account.
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            kwargs.setdefault("key_mapping", key_mapping(config.branches))
            if not {"gguf_file", "state_dict", "subfolder", "variant"} & set(kwargs):
                make: Any = partial(cls, copy.deepcopy(config))
                check_weights(path_or_id, make, kwargs["key_mapping"])
            load = super().from_pretrained  # type: ignore[misc]
            model, account = load(path_or_id, *args, config=config, **kwargs)
        check_account(path_or_id, account)
        return cast(Any, (model, account)) if with_account else model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does, under names that do not depend on its release.

        The depth tokenizer in the folder that the model was loaded from is saved with it.
        """
        if self.intended_inputs is None:
            self.config.intended_inputs = None
        kwargs.setdefault("save_original_format", False)
        weights = kwargs.get("state_dict") or self.state_dict()
        if (stored := stored_weights(weights)).keys() != weights.keys():
            kwargs["state_dict"] = stored
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replace_atomically(Path(save_directory)) as draft:
            super().save_pretrained(draft, *args, **kwargs)  # type: ignore[misc]
            stale = [] if kwargs.get("variant") else other_weights(Path(save_directory), draft)
        for file in stale:
            file.unlink()
        if "depth" in self.config.content_tokens.kinds:
            copy_part(self.name_or_path, self.config.depth_tokenizer, save_directory)

    @property
    def intended_inputs(self) -> IntendedInputs | None:
        """Images that the model is meant for; ``None`` for any, and once it has adapters."""
        setting = self.config.intended_inputs
        is_adapted = bool(getattr(self, "peft_config", None))  # PEFT leaves it after a merge
        return None if setting is None or is_adapted else IntendedInputs.read(setting)

    def tower(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Features ``[sum(t*h*w) / merge**2, D]`` of the vision tower, all images end to end.

        A tower with deepstack has ``L`` further features of each token for the LLM's first layers,
        end to end after those: ``[..., (1 + L) * D]``.
        """
        weight = self.model.visual.patch_embed.proj.weight
        pixels = pixel_values.to(weight.device, weight.dtype)
        seen = self.model.visual(pixels, grid_thw=image_grid_thw.to(weight.device))
        deeper = getattr(seen, "deepstack_features", None)
        return torch.cat([seen.pooler_output, *deeper], -1) if deeper else seen.pooler_output

    @_ListingPixels
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if labels are given, of whole token streams.

        The k-th control token of a branch, in reading order, conditions the k-th run of images of
        that branch; a call with no image, because it comes last or because a row was cut before
        it, only has its control token's embedding replaced.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 0 at padding.
            position_ids: ``[3, B, S]``; M-RoPE positions are computed if missing.
            labels: ``[B, S]``, -100 where ignored; control tokens are always ignored.
            pixel_values: ``[sum(t*h*w), P]`` of the images, ``P`` the values of a patch.
            image_grid_thw: ``[num_images, 3]`` in patches.
            mm_token_type_ids: accepted and not needed.
            past_key_values: filled with the stream, or, if it holds one already, continued by
                ``input_ids`` ``[B, 1]``.
            cache: the same by the name that transformers uses from 5.24 on.
            inputs_embeds: refused: calls and placeholders are found by their ids.
            logits_to_keep: compute only the last so many logits; 0 for all.
            **kwargs: pixels of re-encoded images, as each branch preprocesses them, under the
                ``arguments`` of its row in ``BRANCH_TOKENS``: ``clip_pixel_values`` and
                ``clip_images_grid_thw`` (like those of plain images), ``detection_images`` and
                ``seg_images`` (``[num, 3, H, W]``); ``num_items_in_batch`` for the loss; and
                settings that change no value.

        Raises:
            FeatureCountError: if placeholders and features differ in number.
            PositionError: if calls and re-encoded images do not fit each other, positions have
                another shape, or there are inputs that this model does not read.
        """
        if input_ids is None or inputs_embeds is not None:
            raise PositionError("input_ids are missing; pass the token ids, not inputs_embeds")
        pixels = self._take_pixels(kwargs)
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
        common = self._agree(input_ids, image_grid_thw, pixels) if is_in_lockstep(self) else None
        embeds, deeper = self._embed(input_ids, pixel_values, image_grid_thw, common)
        embeds, features = self._encode_all(embeds, pixels, common)
        calls = find_calls(self.config, input_ids, features)
        if self.config.is_conditioned:
            hidden = self._run_conditioned(
                input_ids,
                embeds,
                deeper,
                attention_mask,
                position_ids,
                calls,
                past_key_values,
                common,
            )
        else:
            embeds = self._write_images(embeds, [(call, None) for call in calls], common)
            hidden = self._run(embeds, attention_mask, position_ids, past_key_values, deeper)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, input_ids, kwargs.get("num_items_in_batch"))
        if past_key_values is not None:  # the embedding of a control token that comes next
            past_key_values.control_states = hidden[:, -1:].detach()
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: past_key_values})

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        common: Work | None,
    ) -> tuple[Tensor, Deeper]:
        """Embeddings ``[B, S, D]``, images in place, and what deepstack adds after layers."""
        embeds = self.get_input_embeddings()(input_ids)
        places, width = input_ids == self.config.image_token_id, embeds.shape[-1]
        image_embeds = embeds.new_empty(0, width)
        if pixel_values is not None:
            if image_grid_thw is None:
                raise PositionError("pixel_values came without image_grid_thw")
            image_embeds = self.tower(pixel_values, image_grid_thw)
        elif common and common.num_images[PLAIN]:
            image_embeds = self.tower(*self._blank_patches())[:0]
        first, *deeper = image_embeds.split(width, dim=-1)
        return scatter_features(embeds, places, first), [
            scatter_features(torch.zeros_like(embeds), places, one) for one in deeper
        ]

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
        for name in self.config.branches if self.config.is_conditioned else ():
            is_action = (input_ids == self.config.action_id(name)).unsqueeze(-1)
            embeds = torch.where(is_action, past_key_values.control_states.to(embeds), embeds)
        hidden = self._run(embeds, attention_mask, position_ids, past_key_values)
        past_key_values.control_states = hidden[:, -1:].detach()
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), **{CACHE: past_key_values})

    def projector(self, branch: str) -> Projector:
        """The projector of a branch."""
        return cast(Projector, self.projectors[branch])

    def branch(self, name: str, image_processor: Any = None) -> ModelBranch:
        """A branch of the model, or ``PLAIN``; the tower preprocesses by ``image_processor``."""
        if name in self.branches:
            return cast(ModelBranch, self.branches[name])
        backbone = backbone_of(self.config, tower=self.tower, image_processor=image_processor)
        return build_branch(name, self.config, backbone)

    def encode(self, branch: str, *pixels: Tensor) -> list[Features]:
        """Features of images under one branch; ``pixels`` as its ``preprocess`` returns them."""
        return self.branch(branch).encode(*pixels)

    def _take_pixels(self, arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
        """Take the pixels of branches out of the arguments of ``forward``."""
        pixels = {}
        for name, row in BRANCH_TOKENS.items():
            first, *others = [arguments.pop(argument, None) for argument in row.arguments]
            if first is None:
                continue
            if any(value is None for value in others):
                raise PositionError(f"pixels of {name!r} came without their grid")
            if name not in self.projectors:
                have = ", ".join(BRANCH_TOKENS[b].encoder for b in self.projectors) or "none"
                raise PositionError(
                    f"pixels came for the branch {row.encoder!r}, which this model does not have; "
                    f"it has: {have}"
                )
            pixels[name] = [first, *others]
        return pixels

    def _agree(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None,
        pixels: Mapping[str, Sequence[Tensor]],
    ) -> Work:
        """What the batches of all processes need."""
        num_images = {PLAIN: 0 if image_grid_thw is None else len(image_grid_thw)}
        is_action = torch.zeros_like(input_ids, dtype=torch.bool)
        for name in self.config.branches:
            num_images[name] = len(pixels[name][-1]) if name in pixels else 0
            is_action |= input_ids == self.config.action_id(name)
        num_rounds = int(is_action.sum(-1).max()) if self.config.is_conditioned else 0
        common = agree(Work(num_rounds, num_images), input_ids.device)
        needs_all = torch.is_grad_enabled() and has_partitioned_weights(self)
        return self._with_all_trained(common) if needs_all else common

    def _with_all_trained(self, work: Work) -> Work:
        """The work, with a run of every projector and of every encoder that is trained."""
        encoders = {PLAIN: self.model.visual, **dict(self.branches.items())}
        num_images = {
            kind: num or int(any(p.requires_grad for p in encoders[kind].parameters()))
            for kind, num in work.num_images.items()
            if kind in encoders
        }
        num_rounds = work.num_rounds or int(self.config.is_conditioned)
        return Work(num_rounds, {**work.num_images, **num_images}, min_projections=1)

    def _encode_all(
        self, embeds: Tensor, pixels: Mapping[str, Sequence[Tensor]], common: Work | None
    ) -> tuple[Tensor, dict[str, list[Features]]]:
        """Features by branch, and the embeddings, which blank features of other branches enter."""
        features = {}
        for name in self.config.branches:
            if name in pixels:
                features[name] = self.encode(name, *pixels[name])
            elif common and common.num_images[name]:
                blank = self.encode(name, *self._blank_pixels(name))
                embeds = embeds + blank[0].values[:0].sum()
        if common and torch.is_grad_enabled() and not embeds.requires_grad:
            embeds.requires_grad_()  # as where they hold what was projected
        return embeds, features

    def _blank_pixels(self, branch: str) -> Sequence[Tensor]:
        if branch not in self.branches:
            return self._blank_patches()
        blank = Image.new("RGB", (self.branch(branch).min_side,) * 2)
        return tuple(self.branch(branch).preprocess([blank]).values())

    def _blank_patches(self) -> tuple[Tensor, Tensor]:
        """Pixels and grid of an image of one token."""
        vision = self.config.vision_config
        side = vision.spatial_merge_size
        num_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return torch.zeros(side**2, num_values), torch.tensor([[1, side, side]])

    def _write_images(
        self,
        embeds: Tensor,
        calls: Sequence[tuple[ControlCall, Tensor | None]],
        common: Work | None,
    ) -> Tensor:
        """Project the images of calls under their conditions, branch by branch."""
        for name in self.config.branches:
            project, num_done = self.projector(name), 0
            for call, condition in calls:
                for features, pads in call.images if call.branch == name else ():
                    projected = project(features, condition).values.to(embeds)
                    embeds = embeds.index_put((torch.full_like(pads, call.row), pads), projected)
                    num_done += 1
            for _ in range(num_done, common.num_projections(name) if common else 0):
                embeds = embeds + project_blank(
                    project, embeds, is_conditioned=self.config.is_conditioned
                )
        return embeds

    def _run(
        self,
        embeds: Tensor,
        attention_mask: Any,
        position_ids: Tensor,
        past_key_values: Cache | None = None,
        deeper: Deeper = (),
    ) -> Tensor:
        added: dict[str, Any] = {}
        if deeper:  # everywhere, with zeros where no image is
            everywhere = torch.ones_like(embeds[..., 0], dtype=torch.bool)
            flat = [one.flatten(0, 1) for one in deeper]
            added = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": flat}
        return self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None,
            **{CACHE: past_key_values},
            **added,
        ).last_hidden_state

    def _run_conditioned(
        self,
        input_ids: Tensor,
        embeds: Tensor,
        deeper: Deeper,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        calls: list[ControlCall],
        past_key_values: Cache | None,
        common: Work | None,
    ) -> Tensor:
        """Final hidden states ``[B, S, D]`` with every control state found and used on the way.

        Attention is causal, so the states before a call never change. Rows are read up to each
        control state in turn, which is one pass in all. Rows with hidden paragraphs differ from
        their start and are read again with the known control states; so are all rows if a cache
        is filled. Processes in lockstep run equally many passes.
        """
        num_rounds = common.num_rounds if common else 0
        if not calls and not num_rounds:
            return self._run(embeds, attention_mask, position_ids, past_key_values, deeper)
        hidden_paragraphs = None
        if self.training:
            hidden_paragraphs = draw_paragraph_mask(self.config, input_ids, calls)
        reader = SegmentReader(self.model.language_model, attention_mask, position_ids, deeper)
        conditions: list[tuple[ControlCall, Tensor]] = []
        control_states: dict[tuple[str, int], list[Tensor]] = {}
        rounds = in_rounds(calls)
        for round_ in [*rounds, *([] for _ in range(len(rounds), num_rounds))]:
            reader.read(embeds, {call.row: call.position for call in round_})
            if not round_:
                embeds = embeds + read_blank(self.model.language_model, embeds, position_ids)
            answered = []
            for call in round_:
                condition = reader.last_state(call.row)
                conditions.append((call, condition))
                seen = control_states.setdefault((call.branch, call.row), [])
                seen.append(condition)
                embeds = _replace_embedding(embeds, call, condition)
                answered.append((call, torch.cat(seen[-self.config.projector_scale :])))
            embeds = self._write_images(embeds, answered, common)
        if hidden_paragraphs is not None:
            embeds = embeds.masked_fill(hidden_paragraphs.unsqueeze(-1), 0)
            for call, condition in conditions:
                embeds = _replace_embedding(embeds, call, condition)
            reader.restart(hidden_paragraphs.any(-1).nonzero().flatten().tolist())
        if past_key_values is not None:
            return self._run(embeds, attention_mask, position_ids, past_key_values, deeper)
        ends = dict.fromkeys(range(len(input_ids)), input_ids.shape[1])
        reader.read(embeds, ends, is_last=True)
        return reader.hidden_states()


class VPTForConditionalGeneration(CallingModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL that can call for perception."""

    config_class = VPTConfig


class VRTForConditionalGeneration(VPTForConditionalGeneration):
    """The same under the model type of the oldest released checkpoints."""

    config_class = VRTConfig


class VPTQwen25ForConditionalGeneration(CallingModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that can call for perception."""

    config_class = VPTQwen25Config


class VPTQwen3ForConditionalGeneration(CallingModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL that can call for perception."""

    config_class = VPTQwen3Config


def _by_type(*classes: Any) -> dict[str, Any]:
    return {one.config_class.model_type: one for one in classes}


MODELS = _by_type(
    VPTForConditionalGeneration,
    VRTForConditionalGeneration,
    VPTQwen25ForConditionalGeneration,
    VPTQwen3ForConditionalGeneration,
)
"""Model class by ``model_type``, of VPT models."""

BASE_MODELS = _by_type(
    Qwen2VLForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
"""The same of their backbones."""


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    **hub_kwargs: Any,
) -> VPTForConditionalGeneration:
    """Load a VPT model for inference, as :func:`read_model` does.

    Args:
        device: by default a CUDA device if there is one.
        dtype: of the weights; ``"auto"`` is the stored one on a GPU and float32 on a CPU.
        device_map: where transformers puts the weights, in place of ``device``: one device.
        quantization_config: for transformers, such as ``TorchAoConfig(...)``.

    Raises:
        PromptError: if ``device`` and ``device_map`` are given.
        CheckpointError: if ``device_map`` distributes the model over several devices.
    """
    options = {"device_map": device_map, "quantization_config": quantization_config}
    options = {name: value for name, value in options.items() if value is not None}
    if device_map is not None and device is not None:
        raise PromptError("pass device or device_map, not both")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and device_map in (None, "cpu") and target.type == "cpu":
        dtype = torch.float32
    if quantization_config is not None and device_map is None:
        options["device_map"] = {"": target}  # quantised where it will be
    model = read_model(path_or_id, dtype=dtype, **options, **hub_kwargs).eval()
    devices = sorted({str(one) for one in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1 or "disk" in devices:
        raise CheckpointError(
            f"device_map distributes {path_or_id} over {', '.join(devices)}; the runtime runs on "
            "one device: name it, such as device_map='cuda:0', or quantise the model"
        )
    return model if options else model.to(target)


def merge_adapter(
    model: VPTForConditionalGeneration, path_or_id: str, **hub_kwargs: Any
) -> VPTForConditionalGeneration:
    """Merge LoRA weights, and modules trained in full, into the model that they belong to.

    Raises:
        CheckpointError: if peft is not installed, or the weights are not exactly those that the
            adapter's configuration describes for this model.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError as exc:
        raise CheckpointError(
            f"{path_or_id} holds a LoRA adapter, which needs peft: `pip install peft`; or merge it "
            "with `llamafactory-cli export`"
        ) from exc
    hub = {name: value for name, value in hub_kwargs.items() if value}
    with as_checkpoint_error(f"cannot apply the adapter {path_or_id}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing and of tied weights, which are compared here
        stored = load_peft_weights(path_or_id, device="cpu", **hub)
        adapted = PeftModel.from_pretrained(model, path_or_id, **hub)
        known = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if wrong := sorted(stored.keys() ^ known.keys()):
            where = "the adapter's configuration" if wrong[0] in stored else "its weights"
            raise CheckpointError(
                f"{wrong[0]} is not in {where}; check that this is its base model"
            )
        merged = adapted.merge_and_unload()
    return cast(VPTForConditionalGeneration, merged).requires_grad_(False).eval()


def read_model(
    path_or_id: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", **kwargs: Any
) -> VPTForConditionalGeneration:
    """Read a VPT model from a folder or hub id, in the released format or our own.

    ``kwargs`` are those of the hub, and others of ``from_pretrained``.

    Raises:
        CheckpointError: if the folder or a weight is missing, or a weight is unknown.
        PromptError: for an unknown ``dtype``.
    """
    if dtype != "auto" and str(dtype).removeprefix("torch.") not in DTYPES:
        raise PromptError(f"unknown dtype {str(dtype)!r}; available: auto, {', '.join(DTYPES)}")
    path_or_id = str(path_or_id)
    config = load_config(path_or_id, **kwargs)
    # The oldest checkpoints keep their type in the configuration only.
    family = MODELS["qwen2_vl_vpt" if isinstance(config, VRTConfig) else config.model_type]
    model = family.from_pretrained(path_or_id, config=config, dtype=dtype, **kwargs)
    return cast(VPTForConditionalGeneration, model)


def scatter_features(inputs_embeds: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """Write features over their placeholder embeddings.

    Args:
        inputs_embeds: ``[B, S, D]``; a new tensor is returned.
        places: ``[B, S]`` bool, True at the placeholders.
        features: ``[N, D]``, every image of the batch end to end, in reading order.

    Raises:
        FeatureCountError: if ``places`` marks a number of positions other than ``N``.
    """
    if (num_places := int(places.sum())) != len(features):
        raise FeatureCountError(f"{num_places} placeholder tokens but {len(features)} features")
    return inputs_embeds.masked_scatter(places.unsqueeze(-1), features.to(inputs_embeds))


def _check_family(model_class: Any, config: VPTSettings, path_or_id: str) -> None:
    own = model_class.config_class
    if not isinstance(config, own) and not issubclass(own, type(config)):
        raise CheckpointError(
            f"{path_or_id} holds a model of type {config.model_type!r}, {model_class.__name__} is "
            f"{own.model_type!r}; load it with vpt.load, AutoModelForImageTextToText or "
            f"{MODELS[config.model_type].__name__}"
        )


def _refuse_unread(kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs that would be ignored, such as a cache under a new name."""
    for name, value in kwargs.items():
        if isinstance(value, Tensor | Cache) and name not in _NOT_NEEDED:
            raise PositionError(
                f"this model does not read the input {name!r}; remove it, or, if transformers "
                f"{transformers.__version__} added it, use a release that vpt-runtime supports"
            )


def _replace_embedding(embeds: Tensor, call: ControlCall, condition: Tensor) -> Tensor:
    place = torch.tensor([[call.row], [call.position]], device=embeds.device)
    return embeds.index_put(tuple(place), condition.to(embeds)[None])


def build_branch(name: str, config: VPTSettings, backbone: Backbone) -> ModelBranch:
    """Build a branch of a model, or ``PLAIN``, with fresh weights if it has any of its own."""
    settings = config.branch_configs.get(name, {})
    home = BRANCH_TOKENS[TOWER if name == PLAIN else name].home
    return branch_class(home).build(settings, backbone)


def backbone_of(config: VPTSettings, **parts: Any) -> Backbone:
    """What a branch may use of a model; ``parts`` are the tower and its image processor."""
    merge_size = config.vision_config.spatial_merge_size
    return Backbone(merge_size=merge_size, hidden_size=config.text_config.hidden_size, **parts)
