"""GroundingDINO in its two implementations: groundingdino-py, and the port in transformers."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vpt.branches.base import BranchError

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedTokenizerBase

# sha256 of the source of the two classes in groundingdino-py 0.4.0 that the adapter needs.
# https://pypi.org/project/groundingdino-py/0.4.0/, groundingdino/models/GroundingDINO/
_KNOWN_SOURCES = {
    "GroundingDINO": "1eaef5b2da2e31837317f89f6d058858ad4281d17a9b11ada8e11e74969a15bd",
    "BertModelWarper": "54d61d3439b96e918136bd572eaa015751c2c84589c7a73a1f65ba93cebfbda4",
}
# Entries of released checkpoints without a place in the model: of training, and a constant.
_WITHOUT_PLACE = {"label_enc.weight", "bert.embeddings.position_ids"}
# Building substitutes names in a module, detecting hooks into one: one thread at a time.
_LOCK = threading.Lock()

# A caption of two phrases in ids of bert-base-uncased: [CLS] a cat . a dog . [SEP]
_INPUT_IDS = [101, 1037, 4937, 1012, 1037, 3899, 1012, 102]
# Positions start again in each phrase and continue through its full stop, as in
# groundingdino/models/GroundingDINO/bertwarper.py, with which the released weights were trained.
_POSITION_IDS = [0, 0, 1, 2, 0, 1, 2, 0]
# A token attends to the tokens of its own phrase, full stop included.
_PHRASE_OF_TOKEN = [0, 1, 1, 1, 2, 2, 2, 3]


@dataclass(frozen=True)
class Detections:
    """Output of a GroundingDINO for one image and one caption, for each of Q queries."""

    hidden_states: Tensor  # [Q, C], of the last decoder layer
    token_scores: Tensor  # [Q, T] 0 to 1, T >= tokens of the caption; 0 after them
    boxes_cxcywh: Tensor  # [Q, 4], 0 to 1 of the image


@dataclass(frozen=True)
class Caption:
    """A caption as the text encoder takes it."""

    text: str
    tokens: Mapping[str, Tensor]  # "input_ids", "token_type_ids", "attention_mask": [1, L]


# (encoder, pixel_values [1, 3, h, w] without padding, caption) -> Detections
Detect = Callable[[Any, Tensor, Caption], Detections]


def make_caption(tokenizer: PreTrainedTokenizerBase, phrase: str, max_text_len: int) -> Caption:
    """Write a phrase as ``preprocess_caption`` of groundingdino/util/inference.py, and tokenize."""
    text = phrase.lower().strip()
    if not text.strip(". ?"):
        raise BranchError(f"expected a phrase to look for; got {phrase!r}")
    text = text if text.endswith(".") else text + "."
    tokens = tokenizer([text], return_tensors="pt")
    if (num_tokens := tokens["input_ids"].shape[1]) > max_text_len:
        raise BranchError(
            f"a phrase may have {max_text_len} tokens; got {num_tokens}: {text[:40]}..."
        )
    return Caption(text, dict(tokens))


def decode_phrase(tokenizer: PreTrainedTokenizerBase, caption: Caption, chosen: Tensor) -> str:
    """Decode the tokens chosen by ``[T]`` bool, T >= L, without delimiters."""
    delimiters = delimiter_ids(tokenizer)
    input_ids = caption.tokens["input_ids"][0].tolist()
    kept = [
        token for token, is_chosen in zip(input_ids, chosen.tolist(), strict=False) if is_chosen
    ]
    return str(tokenizer.decode([token for token in kept if token not in delimiters]))


def delimiter_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens between which GroundingDINO reads phrases."""
    return list(tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"]))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `BranchError` if the tokenizer lacks the delimiters."""
    ids = delimiter_ids(tokenizer)
    if None in ids or tokenizer.unk_token_id in ids or len(set(ids)) < len(ids):
        raise BranchError(
            "expected a BERT tokenizer that knows the tokens [CLS] [SEP] . ?; got ids "
            f"{ids}; use that of bert-base-uncased"
        )


class TextEncoder(nn.Module):
    """Replace the package's ``BertModelWarper``, which needs methods that transformers 5 lacks.

    It has the same children, so the same checkpoint keys, and calls them directly, because the
    masks that ``BertModel`` itself takes differ between versions of transformers.
    """

    def __init__(self, bert_model: Any) -> None:
        super().__init__()
        self.config, self.embeddings = bert_model.config, bert_model.embeddings
        self.encoder, self.pooler = bert_model.encoder, bert_model.pooler

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
    ) -> dict[str, Tensor]:
        """Encode captions, each phrase by itself.

        Args:
            input_ids: ``[B, L]``, like ``token_type_ids``.
            attention_mask: ``[B, L, L]`` bool, True where a token attends to another.
            position_ids: ``[B, L]``, which start again in each phrase.

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


def build_package_encoder(
    config: str | Path | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    text_config: BertConfig | None = None,
) -> Any:
    """Build the package's ``GroundingDINO`` with random weights; nothing is downloaded."""
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


def load_package_weights(encoder: nn.Module, weights_path: str | Path) -> None:
    """Load a released checkpoint into the package's model."""
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


def detect_by_package(encoder: Any, pixel_values: Tensor, caption: Caption) -> Detections:
    """Run the package's model; a `Detect`."""
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
    """Import the package's model, late: it takes seconds."""
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


@functools.cache
def transformers_port_is_right() -> bool:
    """Whether the installed transformers feeds GroundingDINO's text encoder correctly.

    Its function is run on a caption of two phrases and compared with masks and positions worked
    out by hand. A full stop has position 0 in 5.0 to 5.17.
    """
    from transformers.models.grounding_dino import modeling_grounding_dino as port

    build_masks = port.generate_masks_with_special_tokens_and_transfer_map
    kwargs = {}
    if "special_tokens" in inspect.signature(build_masks).parameters:  # since 5.23 or before
        kwargs["special_tokens"] = torch.tensor(port.SPECIAL_TOKENS)
    attention_mask, position_ids = build_masks(torch.tensor([_INPUT_IDS]), **kwargs)
    phrases = torch.tensor(_PHRASE_OF_TOKEN)
    return bool(
        torch.equal(position_ids[0], torch.tensor(_POSITION_IDS))
        and torch.equal(attention_mask[0], phrases[:, None] == phrases[None])
    )


def load_port(path_or_id: str | Path, **kwargs: Any) -> Any:
    """Load a ``GroundingDinoForObjectDetection``; see `GroundingBranch.from_transformers`."""
    import transformers

    if not transformers_port_is_right():
        raise BranchError(
            "expected a transformers whose GroundingDINO gives each word of a phrase its position; "
            f"{transformers.__version__} does not; use groundingdino-py instead "
            '(pip install "vpt-runtime[grounding]", GroundingBranch.from_checkpoint) '
            "or another transformers (5.23 is right)"
        )
    encoder = transformers.GroundingDinoForObjectDetection.from_pretrained(path_or_id, **kwargs)
    attention = encoder.model.text_backbone.config._attn_implementation
    if attention != "sdpa":
        raise BranchError(
            f"expected the text encoder to run in sdpa attention; got {attention}, which reads its "
            "mask wrongly; leave attn_implementation out"
        )
    return encoder


def load_tokenizer(path_or_id: str | Path, **kwargs: Any) -> Any:
    """Load the tokenizer beside the weights, of the same revision."""
    from transformers import AutoTokenizer

    named = {"revision", "cache_dir", "token", "local_files_only", "subfolder"} & set(kwargs)
    return AutoTokenizer.from_pretrained(path_or_id, **{name: kwargs[name] for name in named})


def detect_by_port(encoder: Any, pixel_values: Tensor, caption: Caption) -> Detections:
    """Run the port; a `Detect`."""
    outputs = encoder(pixel_values=pixel_values, **caption.tokens)
    token_scores = outputs.logits.sigmoid()
    return Detections(outputs.last_hidden_state[0], token_scores[0], outputs.pred_boxes[0])
