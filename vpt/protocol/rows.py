"""Rows of the released dataset format: turns, placeholders, images, and how they are written.

A row has ``messages`` (role, content) and, per kind, a list of image paths in the order of their
placeholders in the text: ``images`` for ``<image>``, ``clip_images`` for ``<clip_image>``, and so
on. A path that ends in ``.png_x0,y0,x1,y1`` means that box of the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpt.errors import FeatureCountError, PromptError
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    DEFAULT_SYSTEM,
    IMAGE_PAD,
    PLAIN,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
)

ROLES = ("user", "assistant")

_CROP_SUFFIX = re.compile(r"(.+\.[^./_]+)_(-?\d+),(-?\d+),(-?\d+),(-?\d+)")


@dataclass(frozen=True)
class Kind:
    """One kind of image in a row.

    Attributes:
        branch: ``PLAIN``, or the branch that re-encodes it.
        column: of the row, with the paths.
        placeholder: of one image in the text.
        pad: token that is repeated per feature in the ids.
    """

    branch: str
    column: str
    placeholder: str
    pad: str


class _Kinds(Mapping[str, Kind]):
    """A view of the branch table, in which plain images come first."""

    def __getitem__(self, branch: str) -> Kind:
        if branch == PLAIN:
            return Kind(PLAIN, "images", "<image>", IMAGE_PAD)
        row = BRANCH_TOKENS[branch]
        return Kind(branch, row.column, row.placeholder, row.pad)

    def __iter__(self) -> Iterator[str]:
        yield from (PLAIN, *BRANCH_TOKENS)

    def __len__(self) -> int:
        return 1 + len(BRANCH_TOKENS)


KINDS: Mapping[str, Kind] = _Kinds()
"""Kinds of images a row may have, by ``branch``."""


def split_crop_suffix(path: str) -> tuple[str, tuple[int, int, int, int] | None]:
    """Split ``"a.png_1,2,3,4"`` into path and box: XYXY in pixels of the image, or ``None``."""
    if (match := _CROP_SUFFIX.fullmatch(path)) is None:
        return path, None
    x0, y0, x1, y1 = (int(value) for value in match.groups()[1:])
    return match[1], (x0, y0, x1, y1)


def read_turns(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """System message of a row, and pairs of question and answer.

    Raises:
        PromptError: if user and assistant do not alternate.
    """
    messages = list(row.get("messages") or [])
    system = ""
    if messages and messages[0].get("role") == "system":
        system = messages.pop(0)["content"]
    roles = [message.get("role") for message in messages]
    expected = [ROLES[number % 2] for number in range(len(messages))]
    if not messages or len(messages) % 2 or roles != expected:
        raise PromptError(
            "expected user and assistant by turns, the assistant last; "
            f"got {', '.join(map(str, roles))}"
        )
    contents = [message["content"] for message in messages]
    return system, list(zip(contents[::2], contents[1::2], strict=True))


def list_images(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kind and path of every image of a row; those of one kind in the order of the text.

    Raises:
        PromptError: if a column is not a list of paths.
    """
    images = []
    for kind in KINDS.values():
        paths = row.get(kind.column)
        if paths is None:
            continue
        if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
            raise PromptError(f"expected {kind.column} to be a list of paths, got {shorten(paths)}")
        images += [(kind.branch, path) for path in paths]
    return images


def shorten(value: object) -> str:
    """Quote a value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


def write_turns(
    system: str, asked: Sequence[str], answered: Sequence[str]
) -> list[tuple[str, str]]:
    """Write turns as the released models read them: per turn, prompt and answer.

    Args:
        system: message; empty for the usual one.
        asked: placeholders written out.
    """
    before = f"{TURN_START}system\n{system or DEFAULT_SYSTEM}{TURN_END}\n"
    written = []
    for question, answer in zip(asked, answered, strict=True):
        prompt = f"{before}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
        written.append((prompt, answer + TURN_END))
        before = "\n"
    return written


def write_placeholders(texts: Sequence[str], sizes: Mapping[str, Sequence[int]]) -> list[str]:
    """Write each placeholder of a row's texts as tokens.

    Args:
        sizes: kind of image -> number of tokens of each, in the order of the texts.

    Raises:
        FeatureCountError: if placeholders and images of a kind differ in number.
    """
    texts = list(texts)
    for kind in KINDS.values():
        waiting = list(sizes.get(kind.branch, ()))
        for number, text in enumerate(texts):
            first, *rest = text.split(kind.placeholder)
            if len(rest) > len(waiting):
                raise FeatureCountError(
                    f"the text has more {kind.placeholder} than the row has images"
                )
            runs = [VISION_START + kind.pad * size + VISION_END for size in waiting[: len(rest)]]
            texts[number] = first + "".join(
                run + part for run, part in zip(runs, rest, strict=True)
            )
            del waiting[: len(rest)]
        if waiting:
            raise FeatureCountError(
                f"the row has {len(waiting)} image(s) more than its text has {kind.placeholder}"
            )
    return texts
