"""Files of rows about boxes and numbers of objects, made of annotated pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vpt.data.aurora.counting_rows import counting_question, counting_rows
from vpt.data.aurora.lvis import AnnotatedPicture, Annotations
from vpt.data.aurora.parts import Part, join_parts, work_in_parts, write_index
from vpt.data.making import keep_recipe
from vpt.errors import DataError, ImageError
from vpt.images import load_image

BOX_ROWS, STEPS, DIRECT = "boxes", "count_steps", "count_direct"
QUESTIONS, ANSWERS = "questions", "answers"
"""Names of the files: rows of three kinds, and questions and answers in HardBLINK's layout."""

_NAMES = (BOX_ROWS, STEPS, DIRECT, QUESTIONS, ANSWERS)


@dataclass(frozen=True)
class CountingRecipe:
    """What rows to make of annotated pictures.

    Attributes:
        seed: of the choice of categories.
        num_categories: most to ask about in a picture.
        skip_bad: leave pictures out that are missing or of another size, instead of stopping.
    """

    seed: int = 0
    num_categories: int = 1
    skip_bad: bool = False


class CountingRowMaker:
    """Makes rows about boxes and numbers.

    Args:
        annotations: as read.
        pictures: folder of the pictures.
        recipe: what to make.
        folder: to write into.
    """

    def __init__(
        self, annotations: Annotations, pictures: Path, recipe: CountingRecipe, folder: Path
    ) -> None:
        self._annotated = [one for one in annotations.pictures if one.categories]
        self._pictures = pictures
        self._recipe = recipe
        self._folder = folder

    @property
    def num_pictures(self) -> int:
        """Pictures with a category that can be asked about."""
        return len(self._annotated)

    def make(self) -> Iterator[int]:
        """Make rows, as far as an earlier run has not made them.

        Yields:
            How many more pictures are done.

        Raises:
            DataError: if nothing can be asked about, or a picture has another size than annotated
                and is not to be skipped.
            ImageError: if a picture cannot be read, and is not to be skipped.
            OSError: if something cannot be written.
            PromptError: if the folder holds other data.
        """
        if not self._annotated:
            raise DataError("no picture has a category whose objects can be counted")
        content = hashlib.sha256(repr((self._annotated, str(self._pictures))).encode())
        recipe = {**vars(self._recipe), "annotations": content.hexdigest()[:16]}
        keep_recipe(self._folder, recipe)
        yield from work_in_parts(self._folder, self._annotated, self._add)

    def finish(self) -> Part:
        """Write the files of rows.

        Returns:
            All that was made, with counts.

        Raises:
            DataError: if no picture could be used.
            OSError: if something cannot be written.
        """
        whole = join_parts(self._folder, len(self._annotated), _NAMES)
        if not whole.lines[BOX_ROWS]:
            which, why = whole.problems[0]
            raise DataError(f"no picture could be used; the first: {which}: {why}")
        write_index(self._folder, (BOX_ROWS, STEPS, DIRECT))
        return whole

    def _add(self, number: int, annotated: AnnotatedPicture, part: Part) -> None:
        file = self._pictures / annotated.path
        try:
            size_wh = load_image(file).size_wh
            if size_wh != annotated.size_wh:
                raise DataError(
                    f"{file} has {size_wh[0]}x{size_wh[1]} px, annotated are "
                    f"{annotated.size_wh[0]}x{annotated.size_wh[1]}"
                )
        except (DataError, ImageError) as exc:
            if not self._recipe.skip_bad:
                raise type(exc)(f"{exc} (--skip-bad leaves such out)") from exc
            part.problems.append((annotated.path, str(exc)))
            return
        path = Path(os.path.relpath(file.resolve(), self._folder.resolve())).as_posix()
        rng = np.random.default_rng([self._recipe.seed, number])
        order = rng.permutation(len(annotated.categories))[: self._recipe.num_categories]
        for index in order:
            found = annotated.categories[index]
            entries = (*counting_rows(path, found), *counting_question(number, path, found))
            for name, entry in zip(_NAMES, entries, strict=True):
                part.lines.setdefault(name, []).append(entry)
            part.counts[str(len(found.boxes))] += 1
