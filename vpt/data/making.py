"""What generators of data share: a folder says what decides its content, pictures are whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vpt.errors import PromptError
from vpt.files import write_whole

RECIPE = "recipe.json"

_JPEG = {"quality": 92, "subsampling": 0}


def keep_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write down what decides the content of a folder, or find out that it differs.

    Args:
        folder: made if need be.
        recipe: can be written as JSON.

    Raises:
        PromptError: if the folder holds something else.
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RECIPE
    wanted = json.dumps(recipe, ensure_ascii=False) + "\n"
    if not file.exists():
        write_whole(wanted, file)
    elif (found := file.read_text(encoding="utf-8")) != wanted:
        raise PromptError(
            f"{folder} holds data made by {found.strip()}, not by {wanted.strip()}; "
            "choose another folder"
        )


def save_picture(picture: Image.Image, file: Path) -> None:
    """Write a picture as JPEG, wholly or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    draft = file.with_name(f".{file.name}.part")
    picture.save(draft, "JPEG", **_JPEG)
    draft.replace(file)
