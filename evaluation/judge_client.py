"""One question to a judge behind an OpenAI-compatible endpoint, with the ``openai`` package.

The package retries after 408, 409, 429, 5xx, time-outs and broken connections, with the delay of
``Retry-After`` (up to two minutes) or else with exponential backoff. Tests pin what we rely on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import openai

if TYPE_CHECKING:
    from vpt.evaluation.judge_protocol import JudgeSettings

_MAX_SAID = 300  # characters of a server's own words that go into a reason


@dataclass(frozen=True)
class Failure:
    """The reason of a missing reply; it never contains the key.

    Attributes:
        is_unreachable: no connection to the server could be made, or it broke.
        is_final: the next question would fail as well: wrong key or unknown model.
    """

    reason: str
    is_unreachable: bool = False
    is_final: bool = False


class JudgeClient:
    """A connection to a judge; use it in ``async with``.

    Failures are returned as values, not raised: an ``openai`` error can hold the key, in the
    server's words or the request's headers, and must not be the cause of an error that is shown.
    """

    def __init__(self, settings: JudgeSettings, key: str) -> None:
        self._settings = settings
        self._key = key
        # A proxy cannot reach our own machine's loopback.
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=settings.base_url,
            timeout=settings.timeout_s,
            max_retries=settings.max_retries,
            http_client=_DeadlineClient(settings.timeout_s, trust_env=not settings.is_loopback),
        )

    async def __aenter__(self) -> JudgeClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.close()

    async def ask(self, message: str) -> str | Failure:
        """Send the one user message; return the reply, not empty, or why there is none."""
        try:
            completion = await self._client.chat.completions.create(
                model=self._settings.model,
                messages=[{"role": "user", "content": message}],
                temperature=self._settings.temperature,
                max_tokens=self._settings.max_tokens,
            )
            return self._read(completion)
        except (openai.OpenAIError, ValueError, RecursionError) as exc:  # the last: nested JSON
            return self._explain(exc)

    def _explain(self, exc: Exception) -> Failure:
        settings = self._settings
        if isinstance(exc, openai.AuthenticationError):
            # Without the server's words: they may show a part of the key.
            return Failure(f"it refused the key in {settings.key_variable} (401)", is_final=True)
        said = self._quote(exc.__cause__ or exc)
        if isinstance(exc, openai.NotFoundError):
            return Failure(f"it has no model {settings.model!r} there ({said})", is_final=True)
        if isinstance(exc, openai.APITimeoutError):
            return Failure(f"no reply within {settings.timeout_s:g} s")
        if isinstance(exc, openai.APIConnectionError):
            return Failure(f"no connection ({said})", is_unreachable=True)
        if isinstance(exc, openai.APIStatusError):
            return Failure(f"the call failed ({said})")
        if isinstance(exc, UnicodeEncodeError):
            return Failure(f"the message cannot be sent as UTF-8 ({said})")
        return Failure(f"the response is not a chat completion ({said})")

    def _read(self, completion: Any) -> str | Failure:
        """Take the text out of what came, of which ``openai`` checks next to nothing."""
        try:
            choice = completion.choices[0]
            content, reason = choice.message.content, choice.finish_reason
        except (AttributeError, IndexError, TypeError):
            return Failure(f"the response is not a chat completion ({self._quote(completion)})")
        if (text := _text_of(content)).strip():
            return text
        hint = ": raise max_tokens" if reason == "length" else ""
        return Failure(f"the reply is empty (finish_reason {reason!r}{hint})")

    def _quote(self, said: object) -> str:
        return " ".join(str(said).replace(self._key, "[key]").split())[:_MAX_SAID]


class _DeadlineClient(openai.DefaultAsyncHttpxClient):
    """Bounds the time of a whole attempt; the time-outs of httpx bound each read of it alone."""

    def __init__(self, timeout_s: float, *, trust_env: bool) -> None:
        super().__init__(trust_env=trust_env)
        self._timeout_s = timeout_s

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send a request and read the reply."""
        try:
            return await asyncio.wait_for(super().send(request, **options), self._timeout_s)
        except asyncio.TimeoutError as exc:
            raise httpx.ReadTimeout("the reply took too long", request=request) from exc


def _text_of(content: object) -> str:
    """The text of a message's content: a string, or a list of parts."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content if isinstance(content, str) else ""
    texts = (
        part.get("text") if isinstance(part, Mapping) else getattr(part, "text", None)
        for part in content
    )
    return "".join(text for text in texts if isinstance(text, str))
