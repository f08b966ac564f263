"""Replicas of the server over Ray Serve, and the front that routes requests to them.

What a request begins with decides where it goes: the response that it continues, its session or its
first image. The replica that has seen the same beginning need not read it again. Requests without
any go to the replica that has less to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping, Sequence
from contextlib import aclosing
from inspect import signature
from itertools import count
from typing import Any, cast

import ray
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.request_router import RequestRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import vpt
from vpt.errors import PromptError, RunError
from vpt.serving.app import create_app, error_response
from vpt.serving.replies import EVENT_STREAM
from vpt.serving.schema import APIError, image_url
from vpt.serving.server import Settings

logger = logging.getLogger(__name__)

SESSION = "x-session-id"
"""Header by which clients name a conversation."""

_HEALTH_S = 5.0
_SPARE = 64  # requests above the limit of a replica, which it refuses itself

Route = tuple[str, Any]
"""``("replica", name)``, ``("session", key)``, ``("image", digest)`` or ``("index", number)``."""


def route_of(path: str, headers: Mapping[str, str], body: bytes) -> Route | None:
    """What a request begins with, if anything that a replica may have seen before."""
    if session := headers.get(SESSION):
        return "session", session
    if not path.startswith("/v1/"):
        return None
    if (name := _replica_in(path.rpartition("/")[2])) is not None:
        return "replica", name
    try:
        fields = json.loads(body)
    except ValueError:  # the replica says what is wrong
        return None
    if not isinstance(fields, dict):
        return None
    if (name := _replica_in(fields.get("previous_response_id"))) is not None:
        return "replica", name
    if isinstance(key := fields.get("prompt_cache_key"), str):
        return "session", key
    messages = fields.get("messages", fields.get("input"))
    for url in _image_urls(messages if isinstance(messages, list) else ()):
        return "image", hashlib.sha256(url.encode()).hexdigest()
    return None


def _replica_in(key: object) -> str | None:
    """The replica that made an id, ``resp_REPLICA_...`` or ``chatcmpl-REPLICA-...``."""
    found = re.fullmatch(
        r"(?:resp_(\w+?)_|chatcmpl-(\w+)-)\w+", key if isinstance(key, str) else ""
    )
    return found and (found[1] or found[2])


def _image_urls(messages: Sequence[Any]) -> list[str]:
    contents = [one.get("content") for one in messages if isinstance(one, dict)]
    parts = [part for one in contents if isinstance(one, list) for part in one]
    urls = [image_url(part) for part in parts if isinstance(part, dict)]
    return [url for url in urls if isinstance(url, str)]


def ranked(route: Route | None, names: Sequence[str]) -> list[list[str]]:
    """Names of replicas in the order in which a request tries them.

    Each route has an order of its own, which a replica that comes or goes leaves as it is.
    """
    if route is None:
        return [random.sample(names, min(2, len(names))), list(names)]
    kind, key = route
    if kind == "index":
        return [[sorted(names)[key % len(names)]]] if names else []

    def rank(name: str) -> tuple[bool, bytes]:
        return name != key, hashlib.sha256(f"{key} {name}".encode()).digest()

    return [[name] for name in sorted(names, key=rank)]


class Router(RequestRouter):
    """Chooses the replica of a request by its keyword argument ``route``."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """See :func:`ranked`."""
        route = None
        if pending_request is not None:
            route = pending_request.kwargs.get("route")
            pending_request.routing_context.should_backoff = True
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        return [[by_name[name] for name in names] for names in ranked(route, list(by_name))]


class Model:
    """A replica: one model and its application, on a device of its own."""

    def __init__(self, load: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.name = serve.get_replica_context().replica_id.unique_id
        self._app = create_app(vpt.load(**load), Settings(**settings, replica=self.name))

    def check_health(self) -> None:
        """Raise if the model's thread has ended: Ray then starts the replica again."""
        if (error := self._app.state.server.desk.worker.error) is not None:
            raise RunError(f"the model's thread has ended: {error}")

    async def metrics(self, route: Route) -> tuple[str, str]:
        """Name of the replica, and its metrics."""
        return self.name, self._app.state.server.desk.metrics.text().decode()

    async def answer(
        self, scope: dict[str, Any], body: bytes, route: Route | None
    ) -> AsyncGenerator[dict[str, Any]]:
        """Messages of the application's answer to a request, as ASGI has them."""
        given, sent = asyncio.Queue[Any](), asyncio.Queue[Any]()
        given.put_nowait({"type": "http.request", "body": body})
        task = asyncio.create_task(self._app(scope, given.get, sent.put))
        task.add_done_callback(lambda task: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    break
            await task
        finally:
            task.cancel()


class Front:
    """Reads requests, and passes them to replicas and their answers back."""

    def __init__(self, model: Any, max_body_bytes: int) -> None:
        self._model = model
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        path = request.url.path
        try:
            if path == "/metrics":
                return Response(await self._metrics(), media_type="text/plain; version=0.0.4")
            body = await self._read(request)
            route = route_of(path, request.headers, body)
            messages = self._model.options(stream=True, method_name="answer").remote(
                _plain(request.scope), body, route=route
            )
            limit_s = _HEALTH_S if path == "/health" else None
            return await self._begin(messages, limit_s)
        except APIError as exc:
            return error_response(exc)

    async def _read(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._max_body_bytes:
                most = self._max_body_bytes
                raise APIError(413, f"the body is larger than {most} bytes; send smaller images")
            parts.append(part)
        return b"".join(parts)

    async def _begin(self, messages: Any, limit_s: float | None) -> Response:
        try:
            first = await asyncio.wait_for(_or_api_error(anext(messages)), limit_s)
        except (TimeoutError, asyncio.TimeoutError):
            messages.cancel()
            raise APIError(503, "no replica answers", retry_after_s=5) from None
        except asyncio.CancelledError:  # the client has left
            messages.cancel()
            raise
        response = _Passed(_bodies(messages, first), first["status"])
        response.raw_headers = [
            (name, value) for name, value in first["headers"] if name != b"x-request-id"
        ]  # Ray adds it
        return response

    async def _metrics(self) -> bytes:
        texts: dict[str, str] = {}
        for index in count():
            call = self._model.metrics.remote(route=("index", index))
            try:
                name, text = await asyncio.wait_for(_or_api_error(call), _HEALTH_S)
            except (TimeoutError, asyncio.TimeoutError):
                raise APIError(503, "no replica answers", retry_after_s=5) from None
            if name in texts:
                return merge_metrics(texts)
            texts[name] = text
        raise AssertionError("unreachable")


class _Passed(StreamingResponse):
    """An answer that is passed on; Ray cancels this if the client leaves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(cast("AsyncGenerator[bytes]", self.body_iterator)):
            await self.stream_response(send)


async def _or_api_error(work: Awaitable[Any]) -> Any:
    """The result of a call of a replica; what the cluster raises becomes an ``APIError``."""
    try:
        return await work
    except BackPressureError:
        raise APIError(
            429, "the queue is full; try again later", code="queue_full", retry_after_s=1
        ) from None
    except (RayError, RayServeException) as exc:
        logger.warning("a request was lost: %s", type(exc).__name__)
        text = "the replica that ran this request has ended; send the request again"
        raise APIError(503, text, code="replica_lost", retry_after_s=1) from exc


async def _bodies(messages: Any, first: Mapping[str, Any]) -> AsyncGenerator[bytes]:
    """Parts of an answer; a stream that breaks off ends with an error for the client."""
    is_whole = False
    try:
        while True:
            try:
                message = await _or_api_error(anext(messages))
            except StopAsyncIteration:
                break
            yield message.get("body", b"")
        is_whole = True
    except APIError as exc:
        is_whole = True
        kind = dict(first["headers"]).get(b"content-type", b"").decode()
        if not kind.startswith(EVENT_STREAM):
            raise
        yield f"data: {json.dumps(exc.body)}\n\ndata: [DONE]\n\n".encode()
    finally:
        if not is_whole:  # the client has left
            messages.cancel()


def _plain(scope: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a scope that a replica needs, and that can be sent to it."""
    names = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string")
    kept = {name: scope[name] for name in (*names, "headers") if name in scope}
    return {**kept, "asgi": {"version": "3.0"}, "client": None, "server": None}


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """Metrics of several replicas as one text; a label ``replica`` tells them apart."""
    merged: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            known = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            known.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in family.samples
            ]

    class Collected:
        def collect(self) -> list[Metric]:
            return list(merged.values())

    return generate_latest(Collected())


def build(options: Mapping[str, Any]) -> Any:
    """Make the application; ``import_path: vpt.serving.replicas:build`` for ``serve deploy``.

    Args:
        options: all of them may be left out.

            - ``load``: arguments of :func:`vpt.load`;
            - ``settings``: of :class:`vpt.serving.server.Settings`; the key by default from the
              environment, ``VPT_API_KEY``;
            - ``replicas``: their number, 1 by default;
            - ``autoscaling``: in place of ``replicas``: Ray Serve's ``AutoscalingConfig``;
            - ``resources``: of a replica, such as ``{"num_gpus": 1}``;
            - ``grace``: seconds for running requests when a replica is stopped.

    Raises:
        PromptError: for an option that is unknown or unusable.
    """
    known = {"load", "settings", "replicas", "autoscaling", "resources", "grace"}
    _refuse_unknown("", options, known)
    load, given = dict(options.get("load") or {}), dict(options.get("settings") or {})
    given.setdefault("api_key", os.environ.get("VPT_API_KEY") or None)
    num_seqs = load.get("max_num_seqs") or vpt.runtime.DEFAULT_NUM_SEQS
    scaling: dict[str, Any] = {"num_replicas": options.get("replicas") or 1}
    if (autoscaling := options.get("autoscaling")) is not None:
        _refuse_unknown("autoscaling: ", autoscaling, signature(AutoscalingConfig).parameters)
        scaling = {"autoscaling_config": {"target_ongoing_requests": num_seqs, **autoscaling}}
    try:
        settings = Settings(**given)
        model = serve.deployment(Model).options(
            name="model",
            **scaling,
            max_ongoing_requests=num_seqs + settings.max_queue + _SPARE,
            ray_actor_options=dict(options.get("resources") or _resources(load)),
            request_router_config=RequestRouterConfig(request_router_class=Router),
            health_check_period_s=2,
            graceful_shutdown_timeout_s=options.get("grace", 30),
        )
    except (TypeError, ValueError) as exc:
        reason = " ".join(str(exc).split())
        raise PromptError(f"options of the replicas: {reason}") from exc
    front = serve.deployment(Front).options(
        name="front", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(model.bind(load, given), settings.max_body_bytes)


def _refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        names = ", ".join(sorted(known))
        raise PromptError(f"{where}unknown option {unknown[0]!r}; available: {names}")


def _resources(load: Mapping[str, Any]) -> dict[str, Any]:
    """Resources of one replica."""
    import torch

    device = load.get("device")
    on_gpu = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    return {"num_gpus": 1} if on_gpu else {"num_cpus": 1}


def start(options: Mapping[str, Any], host: str, port: int) -> None:
    """Serve, on this host or on the cluster that ``RAY_ADDRESS`` names, until :func:`stop`.

    Raises:
        PromptError: for options that cannot be used.
        RunError: if the replicas do not start.
    """
    application = build(options)
    if not ray.is_initialized():
        # On this host: a processor per replica, also if it has less.
        num_cpus = max(options.get("replicas") or 1, os.cpu_count() or 1)
        own = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        ray.init(**({} if "RAY_ADDRESS" in os.environ else own), logging_level="ERROR")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_level": "WARNING"}
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        serve.run(application, name="vpt", logging_config=quiet)
    except (RayError, RuntimeError) as exc:
        stop()
        raise RunError(f"the replicas do not start: {str(exc).strip().splitlines()[-1]}") from exc


def stop() -> None:
    """End all replicas, once their requests have ended or ``grace`` is over."""
    serve.shutdown()
    ray.shutdown()
