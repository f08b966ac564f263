"""Rows of the released format, as they are, in LLaMA-Factory (``"formatting": "vpt"``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamafactory.data.converter import DatasetConverter

from vpt.rows import ROLES, list_images, read_turns, split_crop_suffix


class VPTDatasetConverter(DatasetConverter):
    """Hands the turns of a row on, with its images as a list of ``{"kind", "path"}``.

    Relative paths are looked for in ``media_dir``; a crop stays at the end of its path.
    """

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Convert one row.

        Raises:
            PromptError: if the turns are not user and assistant by turns.
        """
        system, turns = read_turns(example)
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(ROLES, turn, strict=True)
        ]
        images = [{"kind": kind, "path": self._find(path)} for kind, path in list_images(example)]
        return {
            "_prompt": messages[:-1],
            "_response": messages[-1:],
            "_system": system,
            "_tools": "",
            "_images": images or None,
            "_videos": None,
            "_audios": None,
        }

    def _find(self, path: str) -> str:
        in_media_dir = str(Path(self.data_args.media_dir or "") / path)
        return in_media_dir if Path(split_crop_suffix(in_media_dir)[0]).is_file() else path
