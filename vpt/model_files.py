"""Files of a model, in a folder or on the hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from vpt.errors import CheckpointError

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def find_file(path_or_id: str | os.PathLike[str], name: str, **hub_kwargs: Any) -> Path | None:
    """Where a file of a model lies; ``None`` if the model has no such file.

    Args:
        path_or_id: folder, or id of a repository.
        name: of the file.
        **hub_kwargs: ``revision``, ``cache_dir``, ``token``, ...; others are left aside.

    Raises:
        CheckpointError: if the model itself cannot be found.
    """
    path_or_id = str(path_or_id)
    folder = Path(path_or_id)
    if not folder.is_dir() and (folder.is_absolute() or path_or_id.startswith((".", "~"))):
        raise CheckpointError(
            f"there is no model folder {path_or_id}; pass a folder that holds config.json, "
            "or the id of a model on the Hugging Face hub"
        )
    wanted = {key: value for key, value in hub_kwargs.items() if key in _HUB_ARGUMENTS}
    try:
        file = cached_file(path_or_id, name, _raise_exceptions_for_missing_entries=False, **wanted)
    except OSError as exc:
        raise CheckpointError(
            f"cannot find {name} of the model {path_or_id!r}: not a folder here, and the hub "
            f"did not give it ({str(exc).splitlines()[0]})"
        ) from exc
    return None if file is None else Path(file)


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        CheckpointError: if it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"cannot read {file}: {exc}") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a JSON object in {file}, found {type(content).__name__}")
    return content


def copy_part(folder: str | os.PathLike[str], name: str, target: str | os.PathLike[str]) -> None:
    """Copy a file or folder of a model to where the model is saved, if it has one and that has not.

    Args:
        folder: of the model, or an id: nothing is copied of that.
        name: of the part, relative to ``folder``; one outside of it stays where it is.
        target: folder to copy into.
    """
    source, copy = Path(folder, name), Path(target, name)
    if not folder or not source.exists() or copy.exists() or ".." in Path(name).parts:
        return
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy2(source, copy)
