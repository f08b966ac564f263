"""Messages of a chat, as transformers and clients of OpenAI write them, and what they contain.

Images of a user turn come before its text, each on a line of its own, wherever its parts are, as in
the rows that the released models were trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vpt.errors import PromptError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SOURCES = ("image", "image_url", "url", "path", "base64")


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        text: its text parts, end to end.
        images: what each image is read from: a path, URL, data URI, PIL image, ...; ``None`` for
            a placeholder without one.
    """

    role: str
    text: str
    images: tuple[Any, ...] = ()

    def message(self, images: Iterable[Any]) -> dict[str, Any]:
        """The message for a chat template, which writes images and texts in order."""
        if not self.images:  # transformers 5.6 cannot tokenise a message without parts
            return {"role": self.role, "content": [{"type": "text", "text": self.text}]}
        parts: list[dict[str, Any]] = []
        for image in images:
            parts += [{"type": "image", "image": image}, {"type": "text", "text": "\n"}]
        text = self.text.removeprefix("\n")  # of those who wrote the line break themselves
        parts[-1:] = [{"type": "text", "text": f"\n{text}"}] if text else []
        return {"role": self.role, "content": parts}


def read_messages(messages: Any) -> list[Turn]:
    """Read a list of messages.

    Args:
        messages: dicts of ``role`` and ``content``: a text, or parts ``{"type": "text", "text":
            ...}``, ``{"type": "image", KEY: ...}`` with ``image``, ``url``, ``path`` or ``base64``
            as key, and ``{"type": "image_url", "image_url": {"url": ...}}``.

    Raises:
        PromptError: naming the message that is anything else.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError(f"messages must be a list of dicts, not {_shown(messages)}")
    return [_read_message(f"messages[{index}]", one) for index, one in enumerate(messages)]


def read_conversation(messages: Any) -> tuple[str | None, list[Turn]]:
    """Return the system text, if any, and the turns of user and assistant; the last is a user's."""
    turns = read_messages(messages)
    system = turns.pop(0).text if turns[0].role == "system" else None
    roles = [turn.role for turn in turns]
    if "system" in roles or roles[-1:] != ["user"]:
        shown = ", ".join(turn.role for turn in read_messages(messages))
        raise PromptError(
            "messages must be turns of user and assistant that end with the user's, with a system "
            f"turn at most at their beginning, not {shown}"
        )
    return system, [
        Turn(turn.role, turn.text.removeprefix("\n") if turn.images else turn.text, turn.images)
        for turn in turns
    ]


def _read_message(where: str, message: Any) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise PromptError(f"{where} must be a dict of role and content, not {_shown(message)}")
    if (role := _ROLES.get(str(message["role"]))) is None:
        raise PromptError(
            f"{where} has the role {_shown(message['role'])}; expected one of {', '.join(_ROLES)}"
        )
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise PromptError(f"content of {where} must be a text or a list, not {_shown(content)}")
    text, images = "", []
    for index, part in enumerate(parts):
        place = f"part {index} of {where}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url") and role == "user":
            images.append(_image_source(place, part))
        else:
            allowed = "text or image" if role == "user" else "text"
            raise PromptError(f"{place} must be {allowed} of a type of its own, not {_shown(part)}")
    return Turn(role, text, tuple(images))


def _image_source(place: str, part: Mapping[str, Any]) -> Any:
    for key in _SOURCES:
        if (value := part.get(key)) is None:
            continue
        if key == "image_url" and isinstance(value, Mapping):
            value = value.get("url")
        if key in ("image_url", "url", "base64") and not isinstance(value, str):
            raise PromptError(f"{key} of {place} must be a text, not {_shown(value)}")
        return f"data:;base64,{value}" if key == "base64" else value
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}..."
