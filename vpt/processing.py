"""From a question and images to the pieces of a token stream.

A stream is made of pieces: token ids, images, and images re-encoded by a branch. The first
pieces are the prompt; what a perception call brings back is appended as further ones. How many
placeholder tokens a piece takes is known only when its pixels are (see :mod:`vpt.engine`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from vpt.calls import split_symbols
from vpt.config import register_configs
from vpt.errors import CheckpointError, PromptError
from vpt.images import LoadedImage, fit_for_tower
from vpt.model_files import find_file, read_json
from vpt.shim import KeepsOwnShim, write_processor_entry, write_shim
from vpt.tokens import (
    DEFAULT_SYSTEM,
    IMAGE_PAD,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    find_content,
)


@dataclass(frozen=True)
class TokenPiece:
    """Token ids as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImagePiece:
    """An image, in place of its placeholders."""

    image: LoadedImage


@dataclass(frozen=True)
class FeaturePiece:
    """An image re-encoded by a branch, in place of its placeholders."""

    branch: str
    image: LoadedImage


Piece = TokenPiece | ImagePiece | FeaturePiece


class VPTProcessor(KeepsOwnShim, ProcessorMixin):
    """Tokenizer and image processor of a VPT model.

    The image processor is transformers' PIL one: it gives the released pixels exactly, which
    the tensor-library one does not.

    Args:
        image_processor: a ``Qwen2VLImageProcessorPil``.
        tokenizer: with the perception tokens in it.
        chat_template: Jinja template; only for users of ``apply_chat_template``.

    Attributes:
        source: arguments by which it was loaded, the positional one under ``"path_or_id"``;
            empty if it was not.
    """

    source: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> VPTProcessor:
        """Load from a model folder or hub id, in the released layout or our own.

        Raises:
            CheckpointError: if the tokenizer or the image processor settings are missing.
        """
        path_or_id = str(pretrained_model_name_or_path)
        register_configs()  # transformers reads the type of the model to find its tokenizer
        hub = {k: v for k, v in kwargs.items() if k in ("revision", "cache_dir", "token")}
        try:
            # Ours needs no code of the folder, and transformers shall not ask about it.
            tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False, **hub)
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"cannot load the tokenizer of {path_or_id}: {exc}") from exc
        settings = _settings(path_or_id, "preprocessor_config.json", hub)
        if not settings:
            whole = _settings(path_or_id, "processor_config.json", hub)
            settings = whole.get("image_processor", {})
        if not settings:
            raise CheckpointError(
                f"{path_or_id} has no preprocessor_config.json; copy it from the base model"
            )
        template = _settings(path_or_id, "chat_template.json", hub)
        processor = cls(
            build_image_processor(settings),
            tokenizer,
            chat_template=template.get("chat_template") or tokenizer.chat_template,
        )
        processor.source = {"path_or_id": path_or_id, **hub}
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> list[str]:
        """Save tokenizer and image processor settings, in files that every version reads."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.image_processor.save_pretrained(folder)
        if self.chat_template is not None:
            self.tokenizer.chat_template = self.chat_template
        write_processor_entry(folder)
        write_shim(folder)
        return [str(file) for file in self.tokenizer.save_pretrained(folder)]

    @cached_property
    def _text_cache(self) -> dict[str, tuple[int, ...]]:
        return {}

    def encode_text(self, text: str) -> TokenPiece:
        """Tokens of a template text, control tokens understood."""
        if (ids := self._text_cache.get(text)) is None:
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(text) < 100:
                self._text_cache[text] = ids
        return TokenPiece(ids)

    def decode(self, token_ids: Iterable[int], **kwargs: Any) -> str:
        """Text of token ids, perception tokens included, turn and padding tokens left out."""
        kwargs.setdefault("skip_special_tokens", True)
        return self.tokenizer.decode(list(token_ids), **kwargs)

    def prompt(
        self, question: str, images: Sequence[LoadedImage], system: str = DEFAULT_SYSTEM
    ) -> list[Piece]:
        """Pieces of a first turn: system words, images, question, and the opened answer.

        Args:
            question: plain text, invitation included.
            images: in front of the question, each on a line of its own.
            system: the system turn.

        Raises:
            PromptError: if the question is empty, or it or ``system`` holds control tokens.
        """
        if not question.strip():
            raise PromptError("the question is empty; ask something about the image")
        for name, text in (("question", question), ("system prompt", system)):
            self.check_plain(name, text)
        parts: list[str | Piece] = [f"{TURN_START}system\n{system}{TURN_END}\n{TURN_START}user\n"]
        for image in images:
            parts += [VISION_START, ImagePiece(image), f"{VISION_END}\n"]
        parts.append(f"{question}{TURN_END}\n{TURN_START}assistant\n")
        return self._encode_parts(parts)

    def reply(self, looks: Sequence[ImagePiece | FeaturePiece]) -> list[Piece]:
        """Pieces that answer the perception calls of a closed assistant turn.

        One look stands alone; of several, each has its own line, as in the released driver.
        """
        parts: list[str | Piece] = [f"\n{TURN_START}user\n"]
        for number, look in enumerate(looks):
            several = len(looks) > 1
            parts += [f"Region {number}: " if several else "", VISION_START, look]
            parts.append(f"{VISION_END}\n" if several else VISION_END)
        parts.append(f"{TURN_END}\n{TURN_START}assistant\n")
        return self._encode_parts(parts)

    def _encode_parts(self, parts: Iterable[str | Piece]) -> list[Piece]:
        """Tokenise texts, neighbours together, so that the tokens are those of the whole."""
        pieces: list[Piece] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            pieces += [self.encode_text(text), part]
            text = ""
        return [*pieces, self.encode_text(text)]

    def check_plain(self, name: str, text: str) -> None:
        """Refuse text that would be read as control tokens.

        Raises:
            PromptError: naming the token.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise PromptError(f"the {name} is not valid text: it holds half of a surrogate pair")
        known = self.tokenizer.get_added_vocab()
        symbols = [*split_symbols(text), *find_content(text)]
        if found := [symbol for symbol in symbols if symbol in known]:
            raise PromptError(
                f"the {name} holds the control token {found[0]}; remove it, or write it otherwise"
            )

    def preprocess_images(
        self, images: Sequence[LoadedImage], max_side: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels of images for the backbone's tower.

        Args:
            images: of any size and shape.
            max_side: longer side to which they are shrunk first.

        Returns:
            ``pixel_values`` ``[sum(t*h*w), 1176]`` and ``image_grid_thw`` ``[num_images, 3]``.
        """
        fitted = [self.fit(image, max_side) for image in images]
        out = self.image_processor(images=fitted, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def fit(self, image: LoadedImage, max_side: int | None = None) -> Image.Image:
        """An image in the shape the image processor takes, ``max_side`` as above."""
        factor = self.image_processor.patch_size * self.image_processor.merge_size
        return fit_for_tower(image.pixels, min_side=factor, max_side=max_side)

    @property
    def image_token_id(self) -> int:
        """Id of the image placeholder."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)


def build_image_processor(settings: dict[str, Any]) -> Qwen2VLImageProcessorPil:
    """Make the image processor from the settings of any transformers version.

    Args:
        settings: content of a ``preprocessor_config.json``. Versions up to 4.45 kept the pixel
            limits under ``size`` by names that newer image processors refuse.
    """
    settings = copy.deepcopy(settings)
    for key in ("image_processor_type", "processor_class", "auto_map"):
        settings.pop(key, None)
    size = settings.pop("size", None) or {}
    limits = {
        "shortest_edge": size.get("shortest_edge", size.get("min_pixels")),
        "longest_edge": size.get("longest_edge", size.get("max_pixels")),
    }
    for edge, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        given = settings.pop(old, None)
        limits[edge] = given if given is not None else limits[edge]
    if None not in limits.values():
        if not all(isinstance(value, int) and value > 0 for value in limits.values()):
            raise CheckpointError(f"the pixel limits of an image must be whole numbers: {limits}")
        settings["size"] = limits
    return Qwen2VLImageProcessorPil(**settings)


def _settings(path_or_id: str, name: str, hub: dict[str, Any]) -> dict[str, Any]:
    file = find_file(path_or_id, name, **hub)
    return {} if file is None else read_json(file)
