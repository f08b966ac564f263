"""Messages between a conversation and its driver, and the events that it yields on the way."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vpt.errors import VPTError
from vpt.trace.records import CallRecord, ContentRecord, TokenRecord, Trace

if TYPE_CHECKING:
    from vpt.inference.stream import AppendedImage
    from vpt.model.processing import Piece
    from vpt.protocol.grammar import TokenRule


@dataclass(frozen=True)
class Append:
    """Ask the driver to append pieces to the stream, then to choose a token by a rule, if any.

    ``scored`` asks for the log-probability of that token as well.
    """

    pieces: Sequence[Piece]
    rule: TokenRule | None
    scored: bool = False


@dataclass(frozen=True)
class Step:
    """The driver's answer to :class:`Append`.

    Attributes:
        num_tokens: appended, placeholders included.
        num_reused: of them, those that a kept prefix brought.
        encode_ms: wall time of encoders.
        run_ms: wall time of the LLM.
        is_last: whether the stream has no room for the chosen token, nor for any other.
        log_prob: of the chosen token, if it was asked for; see ``Engine.log_probs``.
    """

    token_id: int
    num_tokens: int = 1
    num_reused: int = 0
    images: Sequence[AppendedImage] = ()
    encode_ms: float = 0.0
    run_ms: float = 0.0
    is_last: bool = False
    log_prob: float | None = None


@dataclass(frozen=True)
class TokenEvent:
    """A token was chosen; ``text`` is what it adds to the turn's readable text."""

    token: TokenRecord
    text: str


@dataclass(frozen=True)
class CallEvent:
    """The model calls for perception; nothing has been appended yet."""

    call: CallRecord


@dataclass(frozen=True)
class ResultEvent:
    """The result of the call has been appended."""

    call: CallRecord


@dataclass(frozen=True)
class ContentEvent:
    """The turn that has ended contains this depth map or these boxes, written by the model."""

    content: ContentRecord


@dataclass(frozen=True)
class StopEvent:
    """The run has ended; ``trace`` is its whole record."""

    trace: Trace


@dataclass(frozen=True)
class ErrorEvent:
    """The run has failed; no further event of it follows, other runs continue."""

    error: VPTError


Event = TokenEvent | ContentEvent | CallEvent | ResultEvent | StopEvent | ErrorEvent

Exchange = Generator[Append | Event, Step | None, None]
"""A conversation under way: a :class:`Step` is sent after each :class:`Append`, else nothing."""
