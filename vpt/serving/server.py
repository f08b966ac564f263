"""What the routes share: settings, the desk, messages with images, kept traces."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vpt.images import LoadedImage, load_image
from vpt.inference.conversation import Transcript
from vpt.inference.request import Message as TurnMessage
from vpt.inference.request import check_number
from vpt.runtime import Runtime
from vpt.serving.schema import APIError, image_url, num_details, plain_part
from vpt.serving.worker import Desk, Run, Ticket

logger = logging.getLogger(__name__)

MAX_STORED_PIXELS = 2**28
"""Pixels of the images of all stored responses; 0.8 GB of memory."""


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
        replica: name of this replica, if there are several.

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
    replica: str = ""

    def __post_init__(self) -> None:
        for name, least in (("max_queue", 0), ("max_body_bytes", 1), ("num_traces", 0)):
            check_number(name, getattr(self, name), int, least)


@dataclass(frozen=True)
class StoredResponse:
    """A finished answer of the Responses API, to be continued."""

    body: dict[str, Any]
    messages: Sequence[TurnMessage]
    transcript: Transcript
    expires_at: float

    @property
    def num_pixels(self) -> int:
        """Of all its images."""
        return sum(one.size_wh[0] * one.size_wh[1] for one in self.transcript.images)


class ResponseStore:
    """Finished answers by their ids: the latest, for a while, within the memory for images."""

    def __init__(self, most: int, ttl_s: float) -> None:
        self._most = most
        self._ttl_s = ttl_s
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()

    def get(self, key: str, param: str | None = None) -> StoredResponse:
        """Return an answer; raise ``APIError`` if there is none."""
        self._expire()
        if (found := self._entries.get(key)) is not None:
            return found
        text = f"there is no stored response {key[:80]!r}; the server keeps the latest for a while"
        if param is None:
            raise APIError(404, text)
        raise APIError(400, text, param, "previous_response_not_found")

    def put(
        self,
        key: str,
        body: dict[str, Any],
        messages: Sequence[TurnMessage],
        transcript: Transcript,
    ) -> None:
        """Store an answer; the oldest give way."""
        end = time.monotonic() + self._ttl_s
        self._entries[key] = StoredResponse(body, messages, transcript, end)
        self._expire()

    def delete(self, key: str) -> None:
        """Forget an answer; raise ``APIError`` if there is none."""
        self.get(key)
        del self._entries[key]

    def _expire(self) -> None:
        num_pixels = sum(one.num_pixels for one in self._entries.values())
        while self._entries:
            oldest = next(iter(self._entries.values()))
            is_old = oldest.expires_at <= time.monotonic()
            if not is_old and len(self._entries) <= self._most and num_pixels <= MAX_STORED_PIXELS:
                return
            num_pixels -= oldest.num_pixels
            self._entries.popitem(last=False)


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
        self.responses = ResponseStore(settings.num_responses, settings.response_ttl_s)
        self._has_seen_detail = False

    def new_id(self, prefix: str) -> str:
        """An id of an answer, such as ``resp_...``; it contains the name of the replica, if any."""
        parts = [*filter(None, [self.settings.replica]), uuid.uuid4().hex]
        return prefix + prefix[-1].join(parts)

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
        ticket.reserve(image)
        return image

    def keep_trace(self, key: str, run: Run) -> str:
        """Keep the trace of an answer; returns its path."""
        run.trace.keep_thumbnails(run.conversation.request.all_images)
        self.traces[key] = run.trace.to_dict()
        while len(self.traces) > self.settings.num_traces:
            self.traces.popitem(last=False)
        return f"/v1/traces/{key}"
