"""A model behind ``vpt serve``, with what the page asks of a runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx

from vpt.errors import PromptError, ServiceError, VPTError
from vpt.evaluation.judge_protocol import is_loopback
from vpt.evaluation.remote import KEY_VARIABLE, add_call
from vpt.images import DEFAULT_LIMITS, LoadedImage
from vpt.inference.events import ErrorEvent, Event, ResultEvent, StopEvent, TokenEvent
from vpt.inference.request import Message, Request
from vpt.runtime import Runtime, Snapshot
from vpt.trace.records import Counts, TokenRecord, Trace, data_uri

NO_TRACES = (
    "The server hands out no trace of this answer: crops, score maps and the token stream are not "
    "shown. Start it with `vpt serve --keep-traces 16`."
)


class RemoteModel:
    """The model of a server.

    Args:
        url: of the API, such as ``http://127.0.0.1:8000/v1``; ``/v1`` may be left out. The key is
            read from ``VPT_API_KEY``.

    Raises:
        PromptError: if the URL is not one.
        ServiceError: if no server answers there, it refuses the key, or it is of another kind.
    """

    limits = DEFAULT_LIMITS

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PromptError(
                f"{url!r} is not the URL of a server; expected one such as http://127.0.0.1:8000"
            )
        self.url = url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
        key = os.environ.get(KEY_VARIABLE)
        # A proxy cannot reach our own machine's loopback. A stream is silent for 10 s at most.
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(10, read=60),
            trust_env=not is_loopback(parts.hostname),
        )
        try:
            card = self.get("/models")["data"][0]
            self.name: str = card["id"]
            self.vocabulary = SimpleNamespace(grid_size=card["grid_size"])
        except (KeyError, IndexError, TypeError, ValueError) as exc:
            raise ServiceError(
                f"{self.url} is not a server of this package; start one with `vpt serve`, and give "
                "its address, such as http://127.0.0.1:8000"
            ) from exc

    def request(self, images: Sequence[LoadedImage], question: str, **options: Any) -> Request:
        """Make a request; the server checks whether its model can answer it."""
        return Request.of(images, question, options)

    def chat(self) -> RemoteChat:
        """Begin a chat."""
        return RemoteChat(self)

    def get(self, path: str) -> Any:
        """JSON at a path below the URL; raise ``ServiceError`` if it cannot be had."""
        try:
            response = self._http.get(self.url + path)
            return self._checked(response).json()
        except httpx.HTTPError as exc:
            raise self._lost(exc) from exc

    def events(self, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """Events of a streamed response; closing the iterator ends the computation."""
        try:
            with self._http.stream("POST", f"{self.url}/responses", json=body) as response:
                if response.is_error:
                    response.read()
                for line in self._checked(response).iter_lines():
                    if line.startswith("data: {"):
                        yield json.loads(line[6:])
        except httpx.HTTPError as exc:
            raise self._lost(exc) from exc

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.status_code == 401:
            raise ServiceError(
                f"the server at {self.url} refuses the key; set {KEY_VARIABLE} to the one that it "
                "was started with"
            )
        if response.is_error:
            try:
                said = response.json()["error"]["message"]
            except (KeyError, TypeError, ValueError):
                said = f"status {response.status_code}; check the address"
            raise ServiceError(f"the answer of the server at {self.url}: {said}")
        return response

    def _lost(self, exc: httpx.HTTPError) -> ServiceError:
        return ServiceError(
            f"no answer from the server at {self.url}: {str(exc) or type(exc).__name__}; check the "
            "address, and that it runs (`vpt serve`)"
        )


Model = Runtime | RemoteModel


class RemoteChat:
    """A chat over the stored responses of a server; see :class:`vpt.chat.Chat`."""

    def __init__(self, model: RemoteModel) -> None:
        self._model = model
        self._past: tuple[Sequence[Message], str | None] = (), None

    @property
    def messages(self) -> Sequence[Message]:
        """All turns so far, without the calls."""
        return self._past[0]

    def request(self, question: str, **options: Any) -> Request:
        """Make the request of the next question."""
        return Request.of((), question, options, history=self.messages)

    def watch(self, request: Request, *others: Request) -> Generator[Snapshot]:
        """Answer a question of the chat, with index 0, then others outside of it."""
        for index, one in enumerate((request, *others)):
            run = _Run(self._model, one, self._past[1] if one.history else None, index == 0)
            try:
                with closing(run.events()) as events:
                    for event in events:
                        yield Snapshot(index, event, run.trace, one.all_images)
            except VPTError as exc:
                yield Snapshot(index, ErrorEvent(exc), run.trace, one.all_images)
            if run.key is not None and index == 0:
                self._past = [*one.messages, Message("assistant", run.trace.answer)], run.key


class _Run:
    """One response: its trace as far as events tell, at the end the server's own.

    Attributes:
        key: id of the finished response.
    """

    def __init__(
        self, model: RemoteModel, request: Request, previous: str | None, stores: bool
    ) -> None:
        self._model, self._request = model, request
        self._body = _body(model, request, previous, stores)
        self._turn = 0
        self.key: str | None = None
        self.trace = Trace(request.question, request.perception)
        for image in request.all_images:
            self.trace.add_image(image)

    def events(self) -> Generator[Event]:
        """Events as they happen; raise ``ServiceError`` if the run fails."""
        with closing(self._model.events(self._body)) as events:
            for data in events:
                if (event := self._read(data)) is not None:
                    yield event
        if self.key is None:
            raise ServiceError(f"the server at {self._model.url} broke off; ask again")

    def _read(self, data: Mapping[str, Any]) -> Event | None:
        kind, response = data.get("type"), data.get("response") or {}
        if (error := data.get("error") or response.get("error")) is not None:
            raise ServiceError(f"the answer of the server: {error.get('message')}")
        if kind == "response.output_text.delta":
            return self._add_text(data["delta"])
        if kind == "response.output_item.done" and data["item"]["type"] == "perception_call":
            return self._add_call(data["item"])
        if kind in ("response.completed", "response.incomplete"):
            self._end(response)
            return StopEvent(self.trace)
        return None

    def _add_text(self, text: str) -> TokenEvent:
        token = TokenRecord(0, text, self._turn, 0.0)
        self.trace.tokens.append(token)
        self.trace.answer = (self.trace.answer + text).lstrip()
        return TokenEvent(token, text)

    def _add_call(self, item: Mapping[str, Any]) -> ResultEvent:
        add_call(self.trace, self._turn, item)
        self._turn, self.trace.answer = self._turn + 1, ""
        return ResultEvent(self.trace.calls[-1])

    def _end(self, response: Mapping[str, Any]) -> None:
        self.key = response["id"]
        if (path := (response.get("perception") or {}).get("trace")) is not None:
            try:
                trace = Trace.from_dict(self._model.get(path.removeprefix("/v1")))
            except VPTError:  # others' answers have taken its place
                path = None
            else:
                given = [i for i, one in enumerate(trace.images) if one.parent is None]
                sources = [one.source for one in self._request.all_images]
                names = dict(zip(given, sources, strict=False))
                for index, record in enumerate(trace.images):
                    record.source = names.get(trace.root(index), record.source)
                self.trace = trace
        if path is None:
            usage = response["usage"]
            counts = usage["input_tokens"], 0, usage["output_tokens"], usage["total_tokens"]
            self.trace.counts = Counts(*counts)
            self.trace.stop_reason = response["stop_reason"]
            self.trace.warnings.append(NO_TRACES)


def _body(
    model: RemoteModel, request: Request, previous: str | None, stores: bool
) -> dict[str, Any]:
    """The body of a request for a response, which continues a previous one if any."""
    parts: list[dict[str, Any]] = [
        {"type": "input_image", "image_url": data_uri(image.pixels, "PNG", compress_level=1)}
        for image in request.images
    ]
    parts.append({"type": "input_text", "text": request.question})
    options = {name: value for name, value in request.options.items() if value is not None}
    options["max_output_tokens"] = options.pop("max_new_tokens")
    if (region := options.get("region")) is not None:
        options["region"] = [region.x_min, region.y_min, region.x_max, region.y_max]
    more = {} if previous is None else {"previous_response_id": previous}
    content = [{"role": "user", "content": parts}]
    return {
        **options,
        **more,
        "model": model.name,
        "input": content,
        "stream": True,
        "store": stores,
    }
