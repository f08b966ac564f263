"""Replies to requests: run, answered whole or as a stream, and given up when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vpt.errors import VPTError
from vpt.inference.conversation import Conversation
from vpt.serving.schema import APIError, ChatRequest, as_api_error, read_body
from vpt.serving.server import Server
from vpt.serving.worker import Delta, Run, Ticket, usage
from vpt.view.wording import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

EVENT_STREAM = "text/event-stream"
KEEP_ALIVE = ": keep-alive\n\n"
_SMALL_BODY = 2**18


class Reply:
    """How one kind of request is prepared and answered; see the subclasses."""

    key: str

    def __init__(self, server: Server, body: Any) -> None:
        self.server = server
        self.body = body
        self.stops: Sequence[str] = ()
        self.ours = {"max_new_tokens": body.token_limit[0]}
        server.check_model(body.model)

    def prepare(self, ticket: Ticket) -> Conversation:
        """Load images and make the prompt; runs in a thread."""
        raise NotImplementedError

    def whole(self, run: Run, deltas: Sequence[Delta], trace: str | None) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        raise NotImplementedError

    def start(self) -> Iterator[str]:
        """Beginning of a stream."""
        raise NotImplementedError

    def step(self, delta: Delta) -> Iterator[str]:
        """What a stream has for a delta."""
        raise NotImplementedError

    def end(self, run: Run, trace: str | None) -> Iterator[str]:
        """End of a stream."""
        raise NotImplementedError

    def fail(self, error: APIError) -> Iterator[str]:
        """End of a stream that failed."""
        raise NotImplementedError


async def answer(request: Request, server: Server, reply: Reply) -> Response:
    """Run a request and answer it, whole or as a stream; a client that leaves frees its slot."""
    ticket: Ticket = request.state.ticket
    if not reply.body.stream:
        return await unless_left(request, _whole(server, reply, ticket))
    stream = _stream(server, reply, ticket)
    first = await unless_left(request, anext(stream))
    return _Streaming(stream, first)


async def _whole(server: Server, reply: Reply, ticket: Ticket) -> Response:
    try:
        run = await _begin(server, reply, ticket)
        deltas = [delta async for delta in run.deltas()]
        trace = await _keep_trace(server, reply.key, run)
    except VPTError as exc:
        raise _seen(exc, reply) from exc
    return JSONResponse(reply.whole(run, deltas, trace))


async def _stream(server: Server, reply: Reply, ticket: Ticket) -> AsyncGenerator[str]:
    """Text of a stream; what fails before its first text is raised, later it is in the stream."""
    has_begun = False
    try:
        run = await _begin(server, reply, ticket)
        async with aclosing(run.deltas()) as deltas:
            async for delta in deltas:
                start, has_begun = "" if has_begun else "".join(reply.start()), True
                yield start + (KEEP_ALIVE if delta == Delta() else "".join(reply.step(delta)))
        trace = await _keep_trace(server, reply.key, run)
    except VPTError as exc:
        if not has_begun:
            raise _seen(exc, reply) from exc
        yield "".join(reply.fail(_seen(exc, reply)))
        return
    start = "" if has_begun else "".join(reply.start())
    yield start + "".join(reply.end(run, trace))


async def _begin(server: Server, reply: Reply, ticket: Ticket) -> Run:
    conversation = await server.desk.in_pool(reply.prepare, ticket)
    silence_s, is_live = server.settings.silence_s, bool(reply.body.stream)
    return Run(server.desk, conversation, reply.stops, silence_s, is_live)


async def _keep_trace(server: Server, key: str, run: Run) -> str | None:
    if not server.settings.num_traces:
        return None
    return await server.desk.in_pool(server.keep_trace, key, run)


def _seen(exc: VPTError, reply: Reply) -> APIError:
    error = as_api_error(exc, reply.ours)
    if error.status == 500:
        logger.error("a request failed: %s", printable(str(exc)), exc_info=exc)
    return error


class _Streaming(StreamingResponse):
    """A stream whose first text is there; it is closed whatever happens to the client."""

    def __init__(self, stream: AsyncGenerator[str], first: str) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._all(first), media_type=EVENT_STREAM, headers=headers)
        self._stream = stream

    async def _all(self, first: str) -> AsyncIterator[str]:
        yield first
        async for text in self._stream:
            yield text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.aclose()


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of work, which is cancelled if the client leaves."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "the client has left")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def read(request: Request, server: Server, kind: Any) -> Any:
    """Read the body of a request, within the limits of size and time."""
    most, parts, size = server.settings.max_body_bytes, [], 0

    async def receive() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size <= most:  # the rest is dropped, so that the client can read the answer
                parts.append(part)
            elif size > 4 * most:
                return

    try:
        await asyncio.wait_for(receive(), server.settings.max_body_s)
    except ClientDisconnect:
        raise APIError(499, "the client has left") from None
    except (TimeoutError, asyncio.TimeoutError):
        raise APIError(408, f"the body took longer than {server.settings.max_body_s:g} s") from None
    if size > most:
        raise APIError(413, f"the body is larger than {most} bytes; send smaller images")
    data = b"".join(parts)
    if size <= _SMALL_BODY:  # a thread costs more
        return read_body(kind, data)
    return await server.desk.in_pool(read_body, kind, data)


class ChatReply(Reply):
    """``POST /v1/chat/completions``."""

    body: ChatRequest

    def __init__(self, server: Server, body: ChatRequest) -> None:
        super().__init__(server, body)
        self.key = server.new_id("chatcmpl-")
        self._created = int(time.time())
        self.stops = body.stops

    def prepare(self, ticket: Ticket) -> Conversation:
        """Make the prompt of the whole conversation."""
        messages = self.server.load_messages(self.body.messages, ticket)
        request = self.server.runtime.request(messages=messages, **self.body.options())
        return request.kept

    def whole(self, run: Run, deltas: Sequence[Delta], trace: str | None) -> dict[str, Any]:
        """The completion, its calls in the message."""
        reasoning = "".join(one.reasoning for one in deltas) or None
        message = {
            "role": "assistant",
            "content": run.text,
            "refusal": None,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
            "perception": {
                "calls": [one.call for one in deltas if one.call],
                "content": [one.content for one in deltas if one.content],
                **({"trace": trace} if trace else {}),
            },
        }
        choice = {"index": 0, "message": message, "logprobs": None, **_ends(run)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(run.trace)}

    def start(self) -> Iterator[str]:
        """A chunk with the role."""
        yield self._chunk({"role": "assistant", "content": ""})

    def step(self, delta: Delta) -> Iterator[str]:
        """A chunk of text, or of a call or content."""
        if delta.text:
            yield self._chunk({"content": delta.text})
        if delta.call or delta.content:
            calls, content = ([one] if one else [] for one in (delta.call, delta.content))
            seen = {"calls": calls, "content": content}
            words = delta.reasoning
            yield self._chunk({"perception": seen, "reasoning": words, "reasoning_content": words})

    def end(self, run: Run, trace: str | None) -> Iterator[str]:
        """The reason, the usage if it is asked for, and the mark of the end."""
        seen = {"perception": {"calls": [], "content": [], "trace": trace}} if trace else {}
        yield self._chunk(seen, _ends(run))
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield sse({**self._head(), "choices": [], "usage": usage(run.trace)})
        yield "data: [DONE]\n\n"

    def fail(self, error: APIError) -> Iterator[str]:
        """The error in a chunk, and the mark of the end."""
        yield sse({**self._head(), "choices": [], **error.body})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        model = self.server.model_name
        return {"id": self.key, "object": kind, "created": self._created, "model": model}

    def _chunk(self, delta: Mapping[str, Any], ends: Mapping[str, Any] | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return sse({**self._head(), "choices": [{**choice, **(ends or {})}]})


def _ends(run: Run) -> dict[str, Any]:
    return {"finish_reason": run.finish_reason, "stop_reason": run.stop_reason}


def sse(data: Mapping[str, Any], event: str | None = None) -> str:
    """One event of a stream."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n"
