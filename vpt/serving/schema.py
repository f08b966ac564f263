"""Requests and errors of OpenAI's API as data: what is read, what is refused, and in what words."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpt.boxes import GridBox
from vpt.errors import BudgetError, ImageError, PromptError, RegionError, VPTError
from vpt.inference.request import OPTIONS
from vpt.view.wording import printable, public_text

logger = logging.getLogger(__name__)

MAX_STOPS = 16
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "background": (False,),
    "conversation": (),
    "prompt": (),
}
"""Fields that would change the answer and are not supported, with the values that do not."""

_PLAIN_OPTIONS = (*OPTIONS, "replace_looks", "replace_content", "look_for", "point")
"""Options whose values the runtime takes as they are."""


class APIError(VPTError):
    """A refusal or failure as a client sees it: a status and OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {...}}``; without paths and control characters."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else None)
        return {
            "error": {
                "message": printable(public_text(str(self))),
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }


def as_api_error(exc: Exception, names: Mapping[str, str] | None = None) -> APIError:
    """The error as a client may see it; ``names`` of options as the client wrote them."""
    if isinstance(exc, APIError):
        return exc
    if isinstance(exc, BudgetError):
        return APIError(400, str(exc), "messages", "context_length_exceeded")
    if isinstance(exc, ImageError | PromptError | RegionError):
        message = str(exc)
        for ours, theirs in (names or {}).items():
            message = message.replace(ours, theirs)
        known = {*_PLAIN_OPTIONS, "region", "messages", *(names or {}).values()}
        first = re.match(r"\w*", message)
        named = first[0] if first and first[0] in known else "messages"
        named = "region" if isinstance(exc, RegionError) else named
        code = "invalid_image" if isinstance(exc, ImageError) else None
        return APIError(400, message, named, code)
    return APIError(500, "the model failed to answer this request; the server's log says why")


class _Body(BaseModel):
    """Fields of both kinds of requests; options of the model are among the extra ones."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    model: str | None = None
    stream: bool | None = None
    region: list[int] | None = Field(default=None, min_length=4, max_length=4)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Options by the names of :meth:`vpt.runtime.Runtime.request`, which checks them.

        Raises:
            APIError: for a field that would change the answer and is not supported.
        """
        given = {
            name: value for name, value in (self.model_extra or {}).items() if value is not None
        }
        for name, neutral in _NEUTRAL.items():
            if name in given and given.pop(name) not in neutral:
                raise APIError(400, f"{name} is not supported", name, "unsupported_parameter")
        options = {name: given.pop(name) for name in _PLAIN_OPTIONS if name in given}
        if given:
            logger.debug("ignored fields: %s", ascii(sorted(given))[:500])
        if self.region is not None:
            options["region"] = GridBox(*self.region)
        if (limit := self.token_limit[1]) is not None:
            options["max_new_tokens"] = limit
        if options.get("top_k") == -1:  # vLLM's name for all
            options["top_k"] = 0
        if isinstance(seed := options.get("seed"), int):
            options["seed"] = seed % 2**64
        elif options.get("temperature"):
            options["seed"] = secrets.randbits(63)
        return options


class StreamOptions(BaseModel):
    """Options of a stream of chunks."""

    include_usage: bool | None = None


class ChatRequest(_Body):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1000)
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The newer field, or the older one if the newer is not there."""
        if self.max_completion_tokens is None and self.max_tokens is not None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def stops(self) -> Sequence[str]:
        """Texts that end the answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stops = [one for one in stops if one]
        if len(stops) > MAX_STOPS:
            raise APIError(400, f"stop must be at most {MAX_STOPS} texts, not {len(stops)}", "stop")
        return stops


class ResponsesRequest(_Body):
    """Body of ``POST /v1/responses``."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    text: dict[str, Any] | None = None

    def options(self) -> dict[str, Any]:
        """Options by name; text is the only format of an answer."""
        form = (self.text or {}).get("format")
        if form not in (None, {"type": "text"}):
            raise APIError(400, "text.format is not supported", "text", "unsupported_parameter")
        return super().options()

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """Its one limit."""
        return "max_output_tokens", self.max_output_tokens


B = TypeVar("B", bound=_Body)


def read_body(kind: type[B], data: bytes) -> B:
    """Read a body of JSON; raise ``APIError`` naming the field that cannot be read."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(one) for one in first["loc"])
        message = (
            f"{where}: {first['msg']}" if where else f"the body is not readable: {first['msg']}"
        )
        raise APIError(400, message[:500], str(first["loc"][0]) if where else None) from exc


def image_url(part: Mapping[str, Any]) -> str | None:
    """URL of a part that is an image, ``None`` for another; files of the server are no URLs."""
    if part.get("type") not in ("image", "image_url", "input_image"):
        return None
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not re.match("(data:|https?://)", url, re.IGNORECASE):
        raise APIError(
            400,
            'an image must be {"type": "image_url", "image_url": {"url": "data:image/png;base64,'
            '..."}}, or have an http(s) URL where the server permits its host',
            "messages",
            "invalid_image",
        )
    return url


def plain_part(part: Any) -> Any:
    """A part of a message of the Responses API as the chat API has it; others as they are."""
    if isinstance(part, Mapping) and part.get("type") in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    return part


def num_details(messages: Iterable[Mapping[str, Any]]) -> int:
    """Number of images with the field ``detail``, which has no effect."""
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    urls = [p.get("image_url") for p in parts if isinstance(p, Mapping)]
    return sum(isinstance(url, Mapping) and "detail" in url for url in urls)
