"""What a GroundingDINO is asked, a caption, and what it answers, scores and boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vpt.branches.base import BranchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Detections:
    """What a GroundingDINO says of one image and one caption, for each of Q queries."""

    hidden_states: Tensor  # [Q, C], of the last decoder layer
    token_scores: Tensor  # [Q, T] 0 to 1, T >= tokens of the caption; 0 behind them
    boxes_cxcywh: Tensor  # [Q, 4], 0 to 1 of the image


@dataclass(frozen=True)
class Caption:
    """What is looked for, as the text encoder takes it."""

    text: str
    tokens: Mapping[str, Tensor]  # "input_ids", "token_type_ids", "attention_mask": [1, L]


# (encoder, pixel_values [1, 3, h, w] without padding, caption) -> Detections
Detect = Callable[[Any, Tensor, Caption], Detections]


def make_caption(tokenizer: PreTrainedTokenizerBase, phrase: str, max_text_len: int) -> Caption:
    """Write a phrase as ``preprocess_caption`` of groundingdino/util/inference.py, and tokenize.

    Raises:
        BranchError: if there is no word in it, or more than ``max_text_len`` tokens.
    """
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
    """Spell the chosen tokens of a caption, delimiters left out.

    Args:
        tokenizer: that made the caption.
        caption: of L tokens.
        chosen: ``[T]`` bool, T >= L.

    Returns:
        The words, or ``""`` if none is chosen.
    """
    delimiters = delimiter_ids(tokenizer)
    input_ids = caption.tokens["input_ids"][0].tolist()
    words = [
        token
        for token, is_chosen in zip(input_ids, chosen.tolist(), strict=False)
        if is_chosen and token not in delimiters
    ]
    return str(tokenizer.decode(words))


def delimiter_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens between which GroundingDINO reads phrases."""
    return list(tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"]))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `BranchError` if the tokenizer does not know the delimiters."""
    ids = delimiter_ids(tokenizer)
    if None in ids or tokenizer.unk_token_id in ids or len(set(ids)) < len(ids):
        raise BranchError(
            "expected a BERT tokenizer that knows the tokens [CLS] [SEP] . ?; got ids "
            f"{ids}; use that of bert-base-uncased"
        )
