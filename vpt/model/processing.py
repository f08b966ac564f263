"""From a question and images to the pieces of a token stream.

Pieces are token ids, images, and images re-encoded by a branch. The first ones are the prompt;
results of perception calls are appended as further ones.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from vpt.branches.encoder import HUB_ARGUMENTS, check_values
from vpt.errors import CheckpointError, PromptError
from vpt.files import replace_atomically
from vpt.images import DEFAULT_LIMITS, ImageLimits, LoadedImage, fit_for_tower, load_image
from vpt.model.config import (
    BASE_CONFIGS,
    CONFIGS,
    check_generation_config,
    check_settings,
    check_tokenizer,
    register_configs,
)
from vpt.model.folder import check_file, read_json
from vpt.model.hub import (
    ShimSavingMixin,
    as_checkpoint_error,
    find_file,
    write_processor_entry,
    write_shim,
)
from vpt.protocol.calls import split_symbols
from vpt.protocol.messages import Turn, read_messages
from vpt.protocol.tokens import (
    DEFAULT_SYSTEM,
    IMAGE_PAD,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    find_content,
)

_IMAGE_OPTIONS = ("max_pixels", "min_pixels", "size")
_TOKENIZER_OPTIONS = ("model_max_length", "padding_side", "truncation_side")
_WITHOUT_EFFECT = (
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "attn_implementation",
    "code_revision",
    "device_map",
    "dtype",
    "quantization_config",
    "trust_remote_code",
    "use_fast",
)
"""Options that Auto classes and pipelines of transformers pass to every processor, those of the
model among them; ours needs none of them."""

_CALL_OPTIONS = (
    *_IMAGE_OPTIONS,
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_mm_token_type_ids",
    "return_offsets_mapping",
    "return_tensors",
    "truncation",
)
"""Options of a call of the processor."""

_NUM_CACHED_TEXTS = 1024


class Message(Protocol):
    """A turn of a conversation: ``vpt.inference.request.Message``."""

    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def images(self) -> Sequence[LoadedImage]: ...  # noqa: D102


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


class VPTProcessor(ShimSavingMixin, ProcessorMixin):
    """Tokenizer and image processor of a VPT model.

    The image processor is transformers' PIL one: it gives the released pixels exactly, which
    the tensor-library one does not.

    Args:
        image_processor: a ``Qwen2VLImageProcessorPil``.
        chat_template: Jinja template; only for users of ``apply_chat_template``.

    Attributes:
        image_resolution: longer side to which images are shrunk, ``None`` for no limit; that of
            the model in the folder it was loaded from.
        image_limits: of images in messages; they permit no remote ones by default.
        source: arguments by which it was loaded, the positional one under ``"path_or_id"``;
            empty if it was not.
    """

    source: Mapping[str, Any] = MappingProxyType({})
    image_resolution: int | None = None
    image_limits: ImageLimits = DEFAULT_LIMITS

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> VPTProcessor:
        """Load from a model folder or hub id, in the released layout or our own.

        Args:
            **kwargs: where the files are (``revision``, ``cache_dir``, ``token``, ``subfolder``,
                ...); settings of the image processor (``min_pixels``, ``max_pixels``, ``size``)
                and the tokenizer (``padding_side``, by default ``"left"``, as ``generate`` needs
                it; ``truncation_side``, ``model_max_length``) in place of those in the folder.

        Raises:
            CheckpointError: if the tokenizer or the image processor settings are missing, or are
                not those of the model in the folder.
            PromptError: for an unknown option.
        """
        path_or_id = str(pretrained_model_name_or_path)
        hub, image_options, options = _sort_options(kwargs)
        register_configs()  # transformers reads the type of the model to find its tokenizer
        _check_tokenizer_files(path_or_id, hub)
        with as_checkpoint_error(f"cannot load the tokenizer of {path_or_id}"):
            # Ours needs no code of the folder, and transformers shall not ask about it.
            tokenizer = AutoTokenizer.from_pretrained(
                path_or_id, trust_remote_code=False, **{"padding_side": "left", **options}, **hub
            )
            if not tokenizer("a", add_special_tokens=False)["input_ids"]:
                raise CheckpointError(f"the tokenizer of {path_or_id} knows no letters")
        settings = _settings(path_or_id, "preprocessor_config.json", hub)
        if not settings:
            whole = _settings(path_or_id, "processor_config.json", hub)
            settings = whole.get("image_processor", {})
        if not settings:
            raise CheckpointError(
                f"{path_or_id} has no preprocessor_config.json; copy it from the base model"
            )
        if "size" in image_options:
            settings = {k: v for k, v in settings.items() if k not in _IMAGE_OPTIONS}
        template = _settings(path_or_id, "chat_template.json", hub).get("chat_template")
        if not isinstance(template, str | None):
            raise CheckpointError(f"chat_template.json of {path_or_id} holds no text")
        processor = cls(
            build_image_processor({**settings, **image_options}),
            tokenizer,
            chat_template=template or tokenizer.chat_template,
        )
        processor.source = {"path_or_id": path_or_id, **hub}
        if config := _config_beside(path_or_id, hub):
            processor.image_resolution = getattr(config, "image_resolution", None)
            generation = check_generation_config(path_or_id, **hub)
            processor.check_fits(config, path_or_id, generation and generation.eos_token_id)
        return processor

    def check_fits(
        self, config: Any, name: str, end_ids: int | Sequence[int] | None = None
    ) -> None:
        """Refuse a model that this is not the processor of, with a ``CheckpointError``.

        Args:
            end_ids: ``eos_token_id`` of its generation configuration.
        """
        check_tokenizer(self.tokenizer, config, name, end_ids)
        vision, pixels = config.vision_config, self.image_processor
        pairs = {
            "patch_size": (vision.patch_size, pixels.patch_size),
            "spatial_merge_size": (vision.spatial_merge_size, pixels.merge_size),
            "temporal_patch_size": (vision.temporal_patch_size, pixels.temporal_patch_size),
        }
        for size, (expected, came) in pairs.items():
            if expected != came:
                raise CheckpointError(
                    f"the model {name} has {size} {expected} in config.json, but its image "
                    f"processor has {came}; copy preprocessor_config.json from where it was saved"
                )

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save tokenizer and image processor settings, in files that every version reads."""
        if push_to_hub or kwargs:
            option = next(iter(kwargs), "push_to_hub")
            raise PromptError(f"save_pretrained of the processor takes no option {option!r}")
        folder = Path(save_directory)
        if self.chat_template is not None:
            self.tokenizer.chat_template = self.chat_template
        with replace_atomically(folder) as draft:
            self.image_processor.save_pretrained(draft)
            saved = [Path(file) for file in self.tokenizer.save_pretrained(draft)]
            write_shim(draft)
        write_processor_entry(folder)
        return [str(folder / file.relative_to(draft)) for file in saved]

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As transformers', with the ids of :meth:`prompt` for one turn of a user.

        Images of a turn come before its text, each on a line of its own. They are read by
        :func:`vpt.images.load_image` within ``image_limits``.

        Raises:
            PromptError: if the messages cannot be read, or hold control tokens where only plain
                text may be.
            ImageError: if an image cannot be used.
        """
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        given = conversation if is_batch else [conversation]
        is_tokenized = kwargs.get("tokenize", False)
        prepared = [
            [self._message(turn, is_tokenized) for turn in read_messages(one)] for one in given
        ]
        return super().apply_chat_template(
            prepared if is_batch else prepared[0], chat_template, **kwargs
        )

    def _message(self, turn: Turn, is_tokenized: bool) -> dict[str, Any]:
        if not is_tokenized:
            return turn.message(turn.images)
        if turn.role != "assistant":
            self.check_plain(f"{turn.role} turn", turn.text)
        if None in turn.images:
            raise PromptError("an image part has no image; add image, url, path or base64 to it")
        return turn.message([self._load(image).pixels for image in turn.images])

    def _load(self, image: Any) -> LoadedImage:
        is_loaded = isinstance(image, LoadedImage)
        return image if is_loaded else load_image(image, limits=self.image_limits)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: None = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model for texts in which each image has one placeholder, expanded here.

        Args:
            images: one image, a list, or one list per text; of what ``load_image`` reads.
            text: one text or a list, as ``apply_chat_template`` writes them.
            videos: refused.
            audio: refused.
            **kwargs: ``return_tensors``; of the image processor ``min_pixels``, ``max_pixels`` and
                ``size``; and those of the tokenizer, of which ``padding`` is on by default if
                there are several texts.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, S]``; of images ``pixel_values``
            ``[sum(t*h*w), P]``, P values a patch, and ``image_grid_thw`` ``[num_images, 3]``.

        Raises:
            PromptError: if placeholders and images differ in number, or an option is unknown.
        """
        if videos is not None or audio is not None:
            raise PromptError("videos and audio are not supported; pass single frames as images")
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts or not all(isinstance(one, str) for one in texts):
            raise PromptError("text must be a text or a list of them; see apply_chat_template")
        nested = kwargs.pop("text_kwargs", {}) | kwargs.pop("images_kwargs", {})
        kwargs = {**kwargs.pop("common_kwargs", {}), **nested, **kwargs}
        if unknown := sorted(set(kwargs) - set(_CALL_OPTIONS)):
            known = ", ".join(sorted(_CALL_OPTIONS))
            raise PromptError(f"unknown option {unknown[0]!r}; available: {known}")
        tensors = kwargs.pop("return_tensors", None)
        of_images = {name: kwargs.pop(name) for name in _IMAGE_OPTIONS if name in kwargs}
        loaded = self._load_all(images)
        data: dict[str, Any] = {}
        if loaded:
            fitted = [self.fit(image, self.image_resolution) for image in loaded]
            data = dict(self.image_processor(fitted, return_tensors=tensors, **of_images))
        texts = self._expand(texts, data.get("image_grid_thw", ()), images)
        kwargs.pop("return_mm_token_type_ids", None)  # the model needs none
        encoded = self.tokenizer(texts, **{"padding": len(texts) > 1, **kwargs})
        wanted = sum(one.count(IMAGE_PAD) for one in texts)
        if sum(list(ids).count(self.image_token_id) for ids in encoded["input_ids"]) != wanted:
            raise PromptError("truncation cut an image off; raise max_length, or shrink the image")
        return BatchFeature({**encoded, **data}, tensor_type=tensors)

    def _load_all(self, images: Any) -> list[LoadedImage]:
        """Images of one list, or of lists of them, in order."""
        if images is None:
            return []
        if not isinstance(images, list | tuple):
            return [self._load(images)]
        return [image for one in images for image in self._load_all(one)]

    def _expand(self, texts: list[str], grids: Any, images: Any) -> list[str]:
        """Texts with as many placeholders for each image as it has features."""
        merged = self.image_processor.merge_size**2
        sizes = [int(t) * int(h) * int(w) // merged for t, h, w in grids]
        wanted = [one.count(IMAGE_PAD) for one in texts]
        is_nested = isinstance(images, list | tuple) and isinstance((*images, 0)[0], list | tuple)
        given = [len(one) for one in images] if is_nested else [len(sizes)]
        if (given != wanted) if is_nested else (given != [sum(wanted)]):
            raise PromptError(
                f"expected one image for each {IMAGE_PAD} in the text, got {given} images for "
                f"{wanted} placeholders; apply_chat_template writes them"
            )
        rest = iter(sizes)
        return [
            re.sub(re.escape(IMAGE_PAD), lambda _: IMAGE_PAD * next(rest), one) for one in texts
        ]

    @cached_property
    def _text_cache(self) -> dict[str, tuple[int, ...]]:
        return {}

    def encode_text(self, text: str) -> TokenPiece:
        """Tokens of a template text, control tokens understood."""
        if (ids := self._text_cache.get(text)) is None:
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(text) < 100:
                if len(self._text_cache) >= _NUM_CACHED_TEXTS:
                    self._text_cache.clear()
                self._text_cache[text] = ids
        return TokenPiece(ids)

    @cached_property
    def _token_texts(self) -> dict[int, str]:
        return {}

    def token_text(self, token_id: int) -> str:
        """Text of one token, of control tokens too."""
        if token_id not in self._token_texts:
            self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return self._token_texts[token_id]

    def decode(self, token_ids: Iterable[int], **kwargs: Any) -> str:
        """Text of token ids, perception tokens included, turn and padding tokens left out."""
        kwargs.setdefault("skip_special_tokens", True)
        return self.tokenizer.decode(list(token_ids), **kwargs)

    def prompt(
        self,
        question: str,
        images: Sequence[LoadedImage],
        system: str = DEFAULT_SYSTEM,
        history: Sequence[Message] = (),
    ) -> list[Piece]:
        """Pieces of a conversation: system prompt, earlier turns, question, the opened answer.

        Raises:
            PromptError: if the question is empty, or a text holds control tokens.
        """
        self.check_plain("system prompt", system)
        parts: list[str | Piece] = [f"{TURN_START}system\n{system}{TURN_END}\n"]
        for message in history:
            self.check_plain("history", message.text)
            if message.role == "user":
                parts += [*_user_turn(message.text, message.images), "\n"]
            else:
                parts.append(f"{TURN_START}assistant\n{message.text}{TURN_END}\n")
        return self._encode_parts([*parts, *self._question(question, images)])

    def follow_up(self, question: str, images: Sequence[LoadedImage]) -> list[Piece]:
        """Pieces of a further question after a closed assistant turn; errors as for prompt."""
        return self._encode_parts(["\n", *self._question(question, images)])

    def _question(self, question: str, images: Sequence[LoadedImage]) -> list[str | Piece]:
        if not question.strip():
            raise PromptError("the question is empty; ask something about the image")
        self.check_plain("question", question)
        return [*_user_turn(question, images), f"\n{TURN_START}assistant\n"]

    def reply(self, looks: Sequence[ImagePiece | FeaturePiece], note: str = "") -> list[Piece]:
        """Pieces that answer the perception calls of a closed assistant turn.

        One look stands alone; of several, each has its own line, as in the released driver. A note
        comes after them.
        """
        parts: list[str | Piece] = [f"\n{TURN_START}user\n"]
        for number, look in enumerate(looks):
            several = len(looks) > 1
            parts += [f"Region {number}: " if several else "", VISION_START, look]
            parts.append(f"{VISION_END}\n" if several else VISION_END)
        parts.append(f"{note}{TURN_END}\n{TURN_START}assistant\n")
        return self._encode_parts(parts)

    def _encode_parts(self, parts: Iterable[str | Piece]) -> list[Piece]:
        """Tokenise texts, adjacent ones together, so that the tokens are those of the whole."""
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
        """Refuse text that would be read as control tokens, with a ``PromptError``."""
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
        """Pixels of images for the backbone's tower, shrunk to ``max_side`` first.

        Returns:
            ``pixel_values`` ``[sum(t*h*w), P]``, P values a patch, and ``image_grid_thw``
            ``[num_images, 3]``.
        """
        fitted = [self.fit(image, max_side) for image in images]
        out = self.image_processor(images=fitted, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def fit(self, image: LoadedImage, max_side: int | None = None) -> Image.Image:
        """An image in a shape that the image processor takes, shrunk to ``max_side`` first."""
        factor = self.image_processor.patch_size * self.image_processor.merge_size
        return fit_for_tower(image.pixels, min_side=factor, max_side=max_side)

    @property
    def image_token_id(self) -> int:
        """Id of the image placeholder."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)


def _config_beside(path_or_id: str, hub: dict[str, Any]) -> Any:
    """Configuration of the VPT model or backbone in the same folder; ``None`` without one."""
    settings = _settings(path_or_id, "config.json", hub)
    classes = CONFIGS | BASE_CONFIGS
    if (config_class := classes.get(str(settings.get("model_type")))) is None:
        return None
    with as_checkpoint_error(f"cannot use config.json of {path_or_id}"):
        check_settings(settings)
        return config_class.from_dict(settings)


def _sort_options(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Options of ``from_pretrained`` by whom they are for: files, image processor, tokenizer."""
    groups = (HUB_ARGUMENTS, _IMAGE_OPTIONS, _TOKENIZER_OPTIONS)
    known = {name for group in groups for name in group}
    if unknown := sorted(set(given) - known - set(_WITHOUT_EFFECT)):
        raise PromptError(
            f"unknown option {unknown[0]!r} of the processor; available: {', '.join(sorted(known))}"
        )
    return [{name: given[name] for name in group if name in given} for group in groups]


def _check_tokenizer_files(path_or_id: str, hub: dict[str, Any]) -> None:
    """Refuse a folder without a tokenizer; transformers would make one without words."""
    missing = []
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if file := find_file(path_or_id, name, **hub):
            check_file(file)
        else:
            missing.append(name)
    if "tokenizer.json" in missing and len(missing) > 1:
        raise CheckpointError(
            f"{path_or_id} has no tokenizer: expected tokenizer.json, or vocab.json and "
            f"merges.txt, but {', '.join(missing)} are missing; copy them from where the model "
            "was saved"
        )


def build_image_processor(settings: dict[str, Any]) -> Qwen2VLImageProcessorPil:
    """Make the image processor from the ``preprocessor_config.json`` of any transformers version.

    Versions up to 4.45 named the pixel limits in a way that newer image processors refuse.
    """
    with as_checkpoint_error(
        "cannot use the settings of the image processor (preprocessor_config.json)"
    ):
        settings = copy.deepcopy(settings)
        for key in ("image_processor_type", "processor_class", "auto_map"):
            settings.pop(key, None)
        size = settings.pop("size", None) or {}
        if not isinstance(size, Mapping):
            raise CheckpointError(
                f"size in preprocessor_config.json must be an object, not {size!r}"
            )
        limits = {}
        for edge, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
            given = settings.pop(old, None)
            limits[edge] = size.get(edge, size.get(old)) if given is None else given
        if None not in limits.values():
            settings["size"] = limits
        check_values(settings)
        return Qwen2VLImageProcessorPil(**settings)


def _settings(path_or_id: str, name: str, hub: dict[str, Any]) -> dict[str, Any]:
    file = find_file(path_or_id, name, **hub)
    return {} if file is None else read_json(file)


def _user_turn(text: str, images: Sequence[LoadedImage]) -> list[str | Piece]:
    parts: list[str | Piece] = [f"{TURN_START}user\n"]
    for image in images:
        parts += [VISION_START, ImagePiece(image), f"{VISION_END}\n"]
    return [*parts, f"{text}{TURN_END}"]
