"""Rows of the released format, as they are, in LLaMA-Factory (``"formatting": "vpt"``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from llamafactory.data.converter import DatasetConverter

from vpt.data.checks import Finding, check_placeholders, view_row
from vpt.data.rows import read_entries
from vpt.errors import PromptError, TrainingError, VPTError
from vpt.protocol.rows import ROLES, list_images, read_turns, split_crop_suffix
from vpt.protocol.tokens import RELEASED_GRID_SIZE
from vpt.training.template import TEMPLATE_NAME

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
    """Converts a row, its images to a list of ``{"kind", "path"}``.

    Relative paths are looked for in ``media_dir``; a crop stays at the end of its path.
    """

    def __call__(self, example: dict[str, Any]) -> dict[str, Any] | pa.Table:
        """Convert one row.

        Returns:
            A table of one row; a dict in streaming, which takes no tables. A table states its
            types. Those of dicts datasets infers from the first thousand rows, so that a file
            which begins with a thousand rows without images could not be converted.

        Raises:
            PromptError: if the row is malformed, naming its number.
            TrainingError: if the training config names another template.
        """
        if (template := getattr(self.data_args, "template", None)) != TEMPLATE_NAME:
            raise TrainingError(
                f"`template: {template}` cannot read rows of this format; "
                f"set `template: {TEMPLATE_NAME}`"
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
        """Name the first row of the file with a problem; datasets does not tell its number."""
        file = Path(self.data_args.dataset_dir or "") / self.dataset_attr.dataset_name
        try:
            rows = enumerate(read_entries(file))
        except VPTError:  # a folder, or data from a hub
            return f"a row of {self.dataset_attr.dataset_name}"
        number = next((n for n, row in rows if _problem(row) == problem), None)
        return f"a row of {file}" if number is None else f"{file}, row {number}"


def _problem(row: object) -> str:
    """Why a row cannot be trained on, as far as it shows without opening images."""
    view = view_row(row, RELEASED_GRID_SIZE)
    if isinstance(view, Finding):
        return view.detail
    return next((finding.detail for finding in check_placeholders(view)), "")
