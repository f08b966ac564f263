"""The HTTP application: OpenAI's routes over a runtime, with errors as its clients read them."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vpt.errors import VPTError
from vpt.images import LoadedImage, load_image
from vpt.inference.conversation import Conversation
from vpt.inference.request import check_number
from vpt.runtime import Runtime
from vpt.serving.schema import (
    APIError,
    ChatRequest,
    as_api_error,
    image_url,
    num_details,
    plain_part,
    read_body,
)
from vpt.serving.worker import Delta, Desk, Run, Ticket, usage
from vpt.view.wording import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

EVENT_STREAM = "text/event-stream"
KEEP_ALIVE = ": keep-alive\n\n"
_REQUEST_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        served_model_name: by default the last part of the runtime's name.
        api_key: guards all below ``/v1``; ``None`` for no guard.
        max_queue: requests that wait while all slots are taken.
        cors_origins: origins of web pages that may call the server; ``("*",)`` for all.
        max_body_bytes: of a request.
        max_body_s: seconds in which it must have come.
        max_images: of a request, those of earlier turns included.
        silence_s: seconds after which a stream says that it is alive.
        num_responses: answers of the Responses API that are kept for follow-up questions.
        response_ttl_s: seconds for which they are kept.
        num_traces: traces of the latest answers that are kept for ``/v1/traces``.

    Raises:
        PromptError: naming the number that is out of bounds.
    """

    served_model_name: str = ""
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = 64
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 32 * 2**20
    max_body_s: float = 60.0
    max_images: int = 64
    silence_s: float = 10.0
    num_responses: int = 128
    response_ttl_s: float = 3600.0
    num_traces: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_queue", 0), ("max_body_bytes", 1), ("num_traces", 0)):
            check_number(name, getattr(self, name), int, least)


class Server:
    """What the routes share.

    Attributes:
        desk: takes the requests.
        model_name: as clients name the model.
    """

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.runtime = runtime
        self.settings = settings
        self.desk = Desk(runtime, settings.max_queue)
        self.created = int(time.time())
        last = re.split(r"[/\\]", runtime.name.rstrip("/\\"))[-1]
        self.model_name = settings.served_model_name or last or "vpt"
        self.traces: OrderedDict[str, Any] = OrderedDict()
        self._has_seen_detail = False

    def check_model(self, name: str | None) -> None:
        """Raise ``APIError`` if a client asks for another model."""
        if name is not None and name != self.model_name:
            text = f"there is no model {name[:100]!r} here; expected {self.model_name!r}"
            raise APIError(404, text, "model", "model_not_found")

    def load_messages(
        self, messages: Sequence[Mapping[str, Any]], ticket: Ticket
    ) -> list[dict[str, Any]]:
        """Messages with their images loaded; takes a while."""
        if num_details(messages) and not self._has_seen_detail:
            self._has_seen_detail = True
            logger.info("the field `detail` of images has no effect")
        num_images = 0
        loaded: list[dict[str, Any]] = []
        for message in messages:
            content, parts = message.get("content"), []
            for part in content if isinstance(content, list) else ():
                url = image_url(part) if isinstance(part, Mapping) else None
                if url is None:
                    parts.append(plain_part(part))
                    continue
                num_images += 1
                if num_images > self.settings.max_images:
                    most = self.settings.max_images
                    raise APIError(400, f"a request has at most {most} images", "messages")
                parts.append({"type": "image", "image": self._load(url, ticket)})
            known = {key: message[key] for key in ("role", "content") if key in message}
            loaded.append({**known, "content": parts} if isinstance(content, list) else known)
        return loaded

    def _load(self, url: str, ticket: Ticket) -> LoadedImage:
        limits = self.runtime.limits
        if url[:5].lower() != "data:" and not limits.allowed_media_domains:
            text = "this server fetches no images; send the image as a data URI"
            raise APIError(400, text, "messages", "invalid_image")
        image = load_image(url, limits=limits)
        ticket.num_pixels += self.desk.reserve([image])
        return image

    def keep_trace(self, key: str, run: Run) -> str | None:
        """Keep the trace of an answer if traces are kept; returns its path."""
        if not self.settings.num_traces:
            return None
        run.trace.keep_thumbnails(run.conversation.request.all_images)
        self.traces[key] = run.trace.to_dict()
        while len(self.traces) > self.settings.num_traces:
            self.traces.popitem(last=False)
        return f"/v1/traces/{key}"


def create_app(runtime: Runtime, settings: Settings | None = None) -> FastAPI:
    """Make the application that serves a runtime.

    ``app.state.server`` is its :class:`Server`.
    """
    settings = settings or Settings()
    server = Server(runtime, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.desk.close()

    app = FastAPI(openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.server = server
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(VPTError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    app.add_middleware(_Door, server=server)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    _add_routes(app, server)
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        if server.desk.worker.error is not None or server.desk.is_draining:
            status = "draining" if server.desk.is_draining else "failed"
            return JSONResponse({"status": status}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.desk.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(server)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return _card(server)

    @app.get("/v1/traces/{key}")
    async def trace(key: str) -> Response:
        if (found := server.traces.get(key)) is None:
            raise APIError(404, "there is no such trace; the server keeps the latest, if any")
        return JSONResponse(found)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read(request, server, ChatRequest)
        return await answer(request, server, _Chat(server, body))


def _card(server: Server) -> dict[str, Any]:
    return {
        "id": server.model_name,
        "object": "model",
        "created": server.created,
        "owned_by": "vpt",
        "max_model_len": server.desk.worker.engine.cache.capacity,
    }


# --- one answer -----------------------------------------------------------------------------


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
    if not reply.body.stream:
        return await unless_left(request, _whole(server, reply))
    stream = _stream(server, reply)
    first = await unless_left(request, anext(stream))
    return _Streaming(stream, first)


async def _whole(server: Server, reply: Reply) -> Response:
    try:
        with Ticket(server.desk) as ticket:
            run = await _begin(server, reply, ticket)
            deltas = [delta async for delta in run.deltas()]
            trace = await server.desk.in_pool(server.keep_trace, reply.key, run)
    except VPTError as exc:
        raise _seen(exc, reply) from exc
    return JSONResponse(reply.whole(run, deltas, trace))


async def _stream(server: Server, reply: Reply) -> AsyncGenerator[str]:
    """Text of a stream; what fails before its first text is raised, later it is in the stream."""
    has_begun = False
    try:
        with Ticket(server.desk) as ticket:
            run = await _begin(server, reply, ticket)
            async with aclosing(run.deltas()) as deltas:
                async for delta in deltas:
                    text = KEEP_ALIVE if delta == Delta() else "".join(reply.step(delta))
                    if not has_begun:
                        text, has_begun = "".join(reply.start()) + text, True
                    yield text
            trace = await server.desk.in_pool(server.keep_trace, reply.key, run)
    except VPTError as exc:
        if not has_begun:
            raise _seen(exc, reply) from exc
        yield "".join(reply.fail(_seen(exc, reply)))
        return
    start = "" if has_begun else "".join(reply.start())
    yield start + "".join(reply.end(run, trace))


async def _begin(server: Server, reply: Reply, ticket: Ticket) -> Run:
    conversation = await server.desk.in_pool(reply.prepare, ticket)
    return Run(server.desk, conversation, reply.stops, server.settings.silence_s)


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
    except (TimeoutError, asyncio.TimeoutError):
        raise APIError(408, f"the body took longer than {server.settings.max_body_s:g} s") from None
    if size > most:
        raise APIError(413, f"the body is larger than {most} bytes; send smaller images")
    return await server.desk.in_pool(read_body, kind, b"".join(parts))


# --- chat completions -----------------------------------------------------------------------


class _Chat(Reply):
    """``POST /v1/chat/completions``."""

    body: ChatRequest

    def __init__(self, server: Server, body: ChatRequest) -> None:
        super().__init__(server, body)
        self.key = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.stops = body.stops

    def prepare(self, ticket: Ticket) -> Conversation:
        messages = self.server.load_messages(self.body.messages, ticket)
        request = self.server.runtime.request(messages=messages, **self.body.options())
        return request.kept

    def whole(self, run: Run, deltas: Sequence[Delta], trace: str | None) -> dict[str, Any]:
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
        yield self._chunk({"role": "assistant", "content": ""})

    def step(self, delta: Delta) -> Iterator[str]:
        if delta.text:
            yield self._chunk({"content": delta.text})
        if delta.call or delta.content:
            calls, content = ([one] if one else [] for one in (delta.call, delta.content))
            seen = {"calls": calls, "content": content}
            words = delta.reasoning
            yield self._chunk({"perception": seen, "reasoning": words, "reasoning_content": words})

    def end(self, run: Run, trace: str | None) -> Iterator[str]:
        seen = {"perception": {"calls": [], "content": [], "trace": trace}} if trace else {}
        yield self._chunk(seen, _ends(run))
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield sse({**self._head(), "choices": [], "usage": usage(run.trace)})
        yield "data: [DONE]\n\n"

    def fail(self, error: APIError) -> Iterator[str]:
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


# --- the door -------------------------------------------------------------------------------


class _Door:
    """Every request passes here: its id, the key, the log and the count of answers."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app = app
        self._server = server
        key = server.settings.api_key
        self._bearer = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started, status = Headers(scope=scope), time.perf_counter(), 500
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            app = self._app if self._may_enter(scope["path"], headers) else _refused()
            await app(scope, receive, send_on)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._server.desk.metrics.requests.labels(path, str(status)).inc()
            ms = (time.perf_counter() - started) * 1e3
            logger.info("%s %s %d %.0f ms %s", scope["method"], path, status, ms, request_id)

    def _may_enter(self, path: str, headers: Headers) -> bool:
        if self._bearer is None or not (path == "/v1" or path.startswith("/v1/")):
            return True
        given = headers.get("authorization", "").encode("latin-1", "replace")
        return hmac.compare_digest(given, self._bearer)


def _refused() -> Response:
    return error_response(
        APIError(
            401,
            "the API key is missing or wrong; send it as a bearer token",
            None,
            "invalid_api_key",
        )
    )


def error_response(error: APIError) -> Response:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


async def _on_error(request: Request, exc: Exception) -> Response:
    return error_response(as_api_error(exc))


async def _on_http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    texts = {404: "there is no such path", 405: "this path does not take this method"}
    response = error_response(APIError(exc.status_code, texts.get(exc.status_code, "refused")))
    response.headers.update(exc.headers or {})
    return response
