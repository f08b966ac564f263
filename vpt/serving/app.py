"""The HTTP application: OpenAI's routes over a runtime, with errors as its clients read them."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vpt.errors import VPTError
from vpt.runtime import Runtime
from vpt.serving.replies import ChatReply, answer, read
from vpt.serving.responses import ResponseReply
from vpt.serving.schema import APIError, ChatRequest, ResponsesRequest, as_api_error
from vpt.serving.server import Server, Settings
from vpt.serving.worker import Ticket

__all__ = ["Server", "Settings", "create_app"]

logger = logging.getLogger(__name__)

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
_REQUEST_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)


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

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        body = await read(request, server, ChatRequest)
        return await answer(request, server, ChatReply(server, body))

    @app.post(RESPONSES)
    async def respond(request: Request) -> Response:
        body = await read(request, server, ResponsesRequest)
        return await answer(request, server, ResponseReply(server, body))

    @app.get("/v1/responses/{key}")
    async def response(key: str) -> Response:
        return JSONResponse(server.responses.get(key).body)

    @app.delete("/v1/responses/{key}")
    async def forget(key: str) -> dict[str, Any]:
        server.responses.delete(key)
        return {"id": key, "object": "response", "deleted": True}


def _card(server: Server) -> dict[str, Any]:
    return {
        "id": server.model_name,
        "object": "model",
        "created": server.created,
        "owned_by": "vpt",
        "max_model_len": server.desk.worker.engine.cache.capacity,
        "branches": list(server.runtime.vocabulary.branches),
        "grid_size": server.runtime.vocabulary.grid_size,
    }


class _Door:
    """Every request passes here: its id, the key, its place, the log and the count of answers.

    What is refused here is refused before its body is read.
    """

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

        asks = scope["method"] == "POST" and scope["path"] in (CHAT, RESPONSES)
        with ExitStack() as places:
            try:
                app = self._admit(scope, headers, places if asks else None)
                await app(scope, receive, send_on)
            finally:
                route = getattr(scope.get("route"), "path", "other")
                path = scope["path"] if asks else route
                self._server.desk.metrics.requests.labels(path, str(status)).inc()
                ms = (time.perf_counter() - started) * 1e3
                logger.info("%s %s %d %.0f ms %s", scope["method"], path, status, ms, request_id)

    def _admit(self, scope: Scope, headers: Headers, places: ExitStack | None) -> ASGIApp:
        """The application, or a refusal; with ``places`` the request takes one of the desk's."""
        try:
            if not self._may_enter(scope["path"], headers):
                text = "the API key is missing or wrong; send it as a bearer token"
                raise APIError(401, text, None, "invalid_api_key")
            if places is not None:
                ticket = places.enter_context(Ticket(self._server.desk))
                scope.setdefault("state", {})["ticket"] = ticket
        except APIError as exc:
            return error_response(exc)
        return self._app

    def _may_enter(self, path: str, headers: Headers) -> bool:
        if self._bearer is None or not (path == "/v1" or path.startswith("/v1/")):
            return True
        given = headers.get("authorization", "").encode("latin-1", "replace")
        return hmac.compare_digest(given, self._bearer)


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
