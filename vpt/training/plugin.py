"""The multimodal plugin: placeholders and pixels of a row, as LLaMA-Factory asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from llamafactory.data.mm_plugin import BasePlugin
from torch import Tensor

from vpt.errors import PromptError, TrainingError
from vpt.images import LoadedImage, load_image
from vpt.model.config import load_config
from vpt.model.encoding import drop_cut_images
from vpt.model.pixels import Pixels, join_pixels, open_row_image
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import ROLES, write_placeholders

Item = tuple[str, Any]
"""Kind and source of an image."""


class VPTPlugin(BasePlugin):
    """Does with images what :class:`vpt.protocol.rows.RowEncoder` does, by the same functions."""

    def process_messages(
        self,
        messages: list[dict[str, str]],
        images: Sequence[Any],
        videos: Sequence[Any],
        audios: Sequence[Any],
        processor: Any,
    ) -> list[dict[str, str]]:
        """Write placeholders in what the user says as tokens, one per feature.

        Raises:
            FeatureCountError: if placeholders and images of a kind differ in number.
            ImageError: if an image cannot be read.
            PromptError: if there are videos or sounds, or the model lacks a branch.
        """
        _refuse(videos, audios)
        sizes = pixels_of(processor).count([_as_item(image) for image in images])
        asked = iter(write_placeholders([m["content"] for m in messages if _is_asked(m)], sizes))
        return [
            {**message, "content": next(asked)} if _is_asked(message) else message
            for message in messages
        ]

    def process_token_ids(
        self,
        input_ids: list[int],
        labels: list[int] | None,
        images: Sequence[Any],
        videos: Sequence[Any],
        audios: Sequence[Any],
        tokenizer: Any,
        processor: Any,
    ) -> tuple[list[int], list[int] | None]:
        """Leave the ids as they are."""
        return input_ids, labels

    def get_mm_inputs(
        self,
        images: Sequence[Any],
        videos: Sequence[Any],
        audios: Sequence[Any],
        imglens: Sequence[int],
        vidlens: Sequence[int],
        audlens: Sequence[int],
        batch_ids: Sequence[list[int]],
        processor: Any,
    ) -> dict[str, Tensor]:
        """Pixels of a batch.

        Args:
            images: of all rows, end to end.
            videos: none.
            audios: none.
            imglens: number of images in each row.
            vidlens: not needed.
            audlens: not needed.
            batch_ids: ids of each row. Placeholders of an image that ``cutoff_len`` has cut are
                replaced in place: these lists are what LLaMA-Factory pads next.
            processor: a :class:`VPTProcessor`.

        Returns:
            Arguments of the model's forward.
        """
        _refuse(videos, audios)
        waiting = [_as_item(image) for image in images]
        read = pixels_of(processor)
        rows = []
        for ids, num_images in zip(batch_ids, imglens, strict=True):
            items, waiting = waiting[:num_images], waiting[num_images:]
            pixels, sizes = read(items)
            num_kept = drop_cut_images(ids, sizes, processor.tokenizer)
            if num_kept != {kind: len(of_kind) for kind, of_kind in sizes.items()}:
                pixels, _ = read(_first(items, num_kept))
            rows.append(pixels)
        return join_pixels(rows)


@lru_cache(maxsize=1)
def pixels_of(processor: Any) -> Pixels:
    """What reads images for the model a processor was loaded with.

    Raises:
        TrainingError: if the processor is not that of a VPT model.
    """
    if not isinstance(processor, VPTProcessor) or not processor.source:
        raise TrainingError(
            f"expected the processor of a VPT model folder, got {type(processor).__name__}; set "
            "`trust_remote_code: true`, and make the folder with `vpt init`; "
            "if the log has 'Failed to load processor', the reason is there"
        )
    return Pixels(load_config(**processor.source), processor, _open)


def _open(source: Any) -> LoadedImage:
    return source if isinstance(source, LoadedImage) else open_row_image(source)


def _as_item(image: Any) -> Item:
    """What our converter made of an image, or what stock code knows as one.

    It adds a white PIL image to a batch that has none.
    """
    if isinstance(image, str):
        return "image", image
    if not isinstance(image, dict):
        return "image", load_image(image)
    if set(image) != {"kind", "path"}:
        raise PromptError(f"expected an image with kind and path, got {sorted(image)}")
    return image["kind"], image["path"]


def _first(items: Sequence[Item], num_kept: dict[str, int]) -> list[Item]:
    """So many of each kind."""
    left = dict(num_kept)
    kept = []
    for kind, source in items:
        if left[kind] > 0:
            kept.append((kind, source))
            left[kind] -= 1
    return kept


def _is_asked(message: dict[str, str]) -> bool:
    return message["role"] == ROLES[0]


def _refuse(videos: Sequence[Any], audios: Sequence[Any]) -> None:
    if videos or audios:
        raise PromptError("expected images only; this model takes no video and no sound")
