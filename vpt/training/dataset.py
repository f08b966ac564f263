"""Rows and their images in LLaMA-Factory: the dataset format ``vpt``, and the multimodal plugin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from llamafactory.data.converter import DatasetConverter
from llamafactory.data.mm_plugin import BasePlugin
from torch import Tensor

from vpt.data.checks import Finding, check_placeholders, view_row
from vpt.data.rows import read_entries
from vpt.errors import PromptError, TrainingError, VPTError
from vpt.images import LoadedImage, load_image
from vpt.model.config import load_config
from vpt.model.encoding import Pixels, drop_cut_images, join_pixels, open_row_image
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import ROLES, list_images, read_turns, split_crop_suffix, write_placeholders
from vpt.protocol.tokens import RELEASED_GRID_SIZE

TEMPLATES = ("vpt_qwen2_vl", "vpt_qwen3_vl")
"""Names of our template, after those for the backbones; Qwen2.5-VL has that of Qwen2-VL."""

Item = tuple[str, Any]
"""Kind and source of an image."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IMAGES = pa.list_(pa.struct([("kind", pa.string()), ("path", pa.string())]))
_SCHEMA = pa.schema(
    {
        "_prompt": _MESSAGES,
        "_response": _MESSAGES,
        "_system": pa.string(),
        "_tools": pa.string(),
        "_images": _IMAGES,
        "_videos": pa.null(),
        "_audios": pa.null(),
        # Always empty. The step after ours writes a column of this name, and datasets takes its
        # type from here.
        "images": _IMAGES,
    }
)


class VPTDatasetConverter(DatasetConverter):
    """Converts rows of the released format; images become a list of ``{"kind", "path"}``.

    Relative paths are looked for in ``media_dir``; a crop stays at the end of its path.
    """

    def __call__(self, example: dict[str, Any]) -> dict[str, Any] | pa.Table:
        """Convert one row to a table of one row, or in streaming to a dict.

        A table states its types. Those of dicts datasets infers from the first thousand rows, so
        that a file which begins with a thousand rows without images could not be converted.

        Raises:
            PromptError: if the row is malformed, naming its number.
            TrainingError: if the training config names another template.
        """
        if (template := getattr(self.data_args, "template", None)) not in TEMPLATES:
            raise TrainingError(
                f"`template: {template}` cannot read rows of this format; "
                f"set `template: {TEMPLATES[0]}`, or {TEMPLATES[1]} for Qwen3-VL"
            )
        if problem := _problem(example):
            raise PromptError(
                f"{self._locate(problem)}: {problem}; mend it (`vpt data check` finds all)"
            )
        system, turns = read_turns(example)
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(ROLES, turn, strict=True)
        ]
        images = [{"kind": kind, "path": self._find(path)} for kind, path in list_images(example)]
        converted = {
            "_prompt": messages[:-1],
            "_response": messages[-1:],
            "_system": system,
            "_tools": "",
            "_images": images or None,
            "_videos": None,
            "_audios": None,
        }
        if self.data_args.streaming:
            return converted
        return pa.Table.from_pylist([{**converted, "images": []}], schema=_SCHEMA)

    def _find(self, path: str) -> str:
        in_media_dir = str(Path(self.data_args.media_dir or "") / path)
        return in_media_dir if Path(split_crop_suffix(in_media_dir)[0]).is_file() else path

    def _locate(self, problem: str) -> str:
        """Name the first row of the file with a problem; datasets does not report its number."""
        file = Path(self.data_args.dataset_dir or "") / self.dataset_attr.dataset_name
        try:
            rows = enumerate(read_entries(file))
        except VPTError:  # a folder, or data from a hub
            return f"a row of {self.dataset_attr.dataset_name}"
        number = next((n for n, row in rows if _problem(row) == problem), None)
        return f"a row of {file}" if number is None else f"{file}, row {number}"


def _problem(row: object) -> str:
    """Reason why a row cannot be trained on, found without opening images; else empty."""
    view = view_row(row, RELEASED_GRID_SIZE)
    if isinstance(view, Finding):
        return view.detail
    return next((finding.detail for finding in check_placeholders(view)), "")


class VPTPlugin(BasePlugin):
    """Handles images as :mod:`vpt.model.encoding` does, by the same functions."""

    def process_messages(
        self,
        messages: list[dict[str, str]],
        images: Sequence[Any],
        videos: Sequence[Any],
        audios: Sequence[Any],
        processor: Any,
    ) -> list[dict[str, str]]:
        """Replace placeholders in user messages by pad tokens, one per feature.

        Raises:
            FeatureCountError: if placeholders and images of a kind differ in number.
            PromptError: if there are videos or sounds, or the model lacks a branch.
        """
        _refuse(videos, audios)
        sizes = pixels_of(processor).count([_as_item(image) for image in images])
        questions = [m["content"] for m in messages if m["role"] == ROLES[0]]
        asked = iter(write_placeholders(questions, sizes))
        return [{**m, "content": next(asked)} if m["role"] == ROLES[0] else m for m in messages]

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
        """Read the pixels of a batch: arguments of the model's forward.

        ``images`` are those of all rows, end to end, and ``imglens`` their numbers in each row. In
        ``batch_ids`` placeholders of an image that ``cutoff_len`` has cut are replaced in place:
        these lists are what LLaMA-Factory pads next.
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
    """Build the reader of images for the VPT model that a processor was loaded with."""
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
    """Read an image as our converter wrote it, or as stock code does: a path or PIL image.

    Stock code adds a white PIL image to a batch that has none.
    """
    if isinstance(image, str):
        return "image", image
    if not isinstance(image, dict):
        return "image", load_image(image)
    if set(image) != {"kind", "path"}:
        raise PromptError(f"expected an image with kind and path, got {sorted(image)}")
    return image["kind"], image["path"]


def _first(items: Sequence[Item], num_kept: dict[str, int]) -> list[Item]:
    """The first ``num_kept`` images of each kind."""
    numbers = {kind: count() for kind in num_kept}
    return [item for item in items if next(numbers[item[0]]) < num_kept[item[0]]]


def _refuse(videos: Sequence[Any], audios: Sequence[Any]) -> None:
    if videos or audios:
        raise PromptError("expected images only; this model takes no video and no sound")
