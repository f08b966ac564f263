"""An adapter that lets the unchanged groundingdino-py run on transformers 5."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vpt.branches.base import BranchError
from vpt.branches.grounding_detector import Caption, Detections

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedTokenizerBase

# sha256 of the source of the two classes in groundingdino-py 0.4.0 that the adapter leans on.
# https://pypi.org/project/groundingdino-py/0.4.0/, groundingdino/models/GroundingDINO/
_KNOWN_SOURCES = {
    "GroundingDINO": "1eaef5b2da2e31837317f89f6d058858ad4281d17a9b11ada8e11e74969a15bd",
    "BertModelWarper": "54d61d3439b96e918136bd572eaa015751c2c84589c7a73a1f65ba93cebfbda4",
}
# Entries of released checkpoints without a place in the model: of training, and a constant.
_WITHOUT_PLACE = {"label_enc.weight", "bert.embeddings.position_ids"}
# Building substitutes names in a module, detecting hooks into one: one thread at a time.
_LOCK = threading.Lock()


class TextEncoder(nn.Module):
    """Stand in for the package's ``BertModelWarper``, which needs methods gone in transformers 5.

    It has the same children, so the same checkpoint keys, and calls them directly, because which
    masks ``BertModel`` itself takes differs between versions of transformers.

    Args:
        bert_model: a ``BertModel`` with pooler.
    """

    def __init__(self, bert_model: Any) -> None:
        super().__init__()
        self.config = bert_model.config
        self.embeddings = bert_model.embeddings
        self.encoder = bert_model.encoder
        self.pooler = bert_model.pooler

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
    ) -> dict[str, Tensor]:
        """Encode captions, each phrase by itself.

        Args:
            input_ids: ``[B, L]``.
            token_type_ids: ``[B, L]``.
            attention_mask: ``[B, L, L]`` bool, True where a token sees another.
            position_ids: ``[B, L]``, which start anew in each phrase.

        Returns:
            ``last_hidden_state``: ``[B, L, hidden_size]``.
        """
        hidden_states = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids
        )
        bias = torch.zeros_like(attention_mask, dtype=hidden_states.dtype)
        bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        hidden_states = self.encoder(hidden_states, attention_mask=bias[:, None])[0]
        return {"last_hidden_state": hidden_states}


def build_encoder(
    config: str | Path | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    text_config: BertConfig | None = None,
) -> Any:
    """Build the package's ``GroundingDINO`` with random weights; see `GroundingBranch.from_config`.

    Nothing is downloaded: the tokenizer is given, and the text encoder made from its config.

    Raises:
        BranchError: if the package is missing, of an unknown version, or the config asks for a
            text encoder that sees all phrases at once.
    """
    from transformers import BertConfig, BertModel

    module = _import_package()
    settings = importlib.import_module("groundingdino.util.slconfig").SLConfig
    args = (
        settings(cfg_dict=dict(config))
        if isinstance(config, Mapping)
        else settings.fromfile(str(config))
    )
    if not args.sub_sentence_present:
        raise BranchError("expected a config with sub_sentence_present = True; got False")
    # Checkpointing saves memory in training only, and warns when nothing needs a gradient.
    args.use_checkpoint = args.use_transformer_ckpt = False
    substitutes = {
        "BertModelWarper": TextEncoder,
        "get_tokenlizer": SimpleNamespace(
            get_tokenlizer=lambda _: tokenizer,
            get_pretrained_language_model=lambda _: BertModel(text_config or BertConfig()),
        ),
    }
    with _LOCK, _substituted(module, substitutes):
        return module.build_groundingdino(args)


def load_weights(encoder: nn.Module, weights_path: str | Path) -> None:
    """Load a released checkpoint into the package's model.

    Raises:
        BranchError: if a parameter is missing, or there is one without a place.
    """
    checkpoint = torch.load(weights_path, map_location="cpu", weights_only=True)
    weights = checkpoint.get("model", checkpoint)
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    unexpected = sorted(set(unexpected) - _WITHOUT_PLACE)
    if missing or unexpected:
        raise BranchError(
            f"{weights_path} does not fit the config: missing {missing[:3]} ({len(missing)}), "
            f"unexpected {unexpected[:3]} ({len(unexpected)}); use the config of these weights"
        )


def detect(encoder: Any, pixel_values: Tensor, caption: Caption) -> Detections:
    """Run the package's model; a `vpt.branches.grounding_detector.Detect`.

    Raises:
        BranchError: if the encoder is in half precision, in which its forward fails.
    """
    if pixel_values.dtype not in (torch.float32, torch.float64):
        raise BranchError(
            f"groundingdino-py runs in float32 only; its weights are {pixel_values.dtype}; "
            "keep them in float32 and use torch.autocast"
        )
    nested = importlib.import_module("groundingdino.util.misc").NestedTensor
    is_padding = torch.zeros_like(pixel_values[:, 0], dtype=torch.bool)
    hidden_states: list[Tensor] = []  # the package computes them but does not return them
    with _LOCK:
        handle = encoder.transformer.register_forward_hook(
            lambda _module, _args, outputs: hidden_states.append(outputs[0][-1])
        )
        try:
            outputs = encoder(nested(pixel_values, is_padding), captions=[caption.text])
        finally:
            handle.remove()
    token_scores = outputs["pred_logits"].sigmoid()
    return Detections(hidden_states[0][0], token_scores[0], outputs["pred_boxes"][0])


def _import_package() -> ModuleType:
    """Import the package's model, late: it takes seconds.

    Raises:
        BranchError: if it, or what it needs, is missing, or its source is not the known one.
    """
    try:
        module = importlib.import_module("groundingdino.models.GroundingDINO.groundingdino")
    except ModuleNotFoundError as exc:
        raise BranchError(
            f"the grounding branch needs groundingdino-py, and {exc.name} is missing; "
            'pip install "vpt-runtime[grounding]"'
        ) from exc
    for name, expected in _KNOWN_SOURCES.items():
        source = inspect.getsource(getattr(module, name)) if hasattr(module, name) else ""
        if hashlib.sha256(source.encode()).hexdigest() != expected:
            raise BranchError(
                f"the adapter fits groundingdino-py 0.4.0; the installed package has another "
                f'{name}; pip install "vpt-runtime[grounding]"'
            )
    return module


@contextmanager
def _substituted(module: ModuleType, substitutes: Mapping[str, object]) -> Iterator[None]:
    originals = {name: getattr(module, name) for name in substitutes}
    try:
        for name, substitute in substitutes.items():
            setattr(module, name, substitute)
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
