"""The Responses API: answers as lists of items, stored so that a next question continues them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from vpt.inference.conversation import Conversation
from vpt.inference.request import Message, Request
from vpt.protocol.messages import read_conversation
from vpt.serving.replies import Reply, sse
from vpt.serving.schema import APIError, ResponsesRequest
from vpt.serving.server import Server
from vpt.serving.worker import Delta, Run, Ticket, usage

_SKIPPED = ("perception_call", "perception_content", "reasoning")
"""Items of earlier answers that clients send back, and that a text history does not hold."""


class ResponseReply(Reply):
    """``POST /v1/responses``: each call is an item of its own, between those with text."""

    body: ResponsesRequest

    def __init__(self, server: Server, body: ResponsesRequest) -> None:
        super().__init__(server, body)
        self.key = server.new_id("resp_")
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._text: str | None = None  # of the open message
        self._num_events = 0
        previous = body.previous_response_id
        param = "previous_response_id"
        self._before = None if previous is None else server.responses.get(previous, param)
        if self._before is not None and body.instructions is not None:
            text = "instructions belong to the first response, whose stream is continued"
            raise APIError(400, text, "instructions")

    def prepare(self, ticket: Ticket) -> Conversation:
        """Make the prompt: a new one, or what continues the stored stream."""
        runtime, options = self.server.runtime, self.body.options()
        messages = self.server.load_messages(self._messages(), ticket)
        if self._before is None:
            conversation = runtime.request(messages=messages, **options).kept
        else:
            system, turns = read_conversation(messages)
            if system is not None or len(turns) > 1:
                text = "with previous_response_id, input must be one message of the user"
                raise APIError(400, text, "input")
            images, text = list(turns[0].images), turns[0].text
            request = Request.of(images, text, options, history=self._before.messages)
            conversation = runtime.converse(request, self._before.transcript)
        conversation.keep = self._stores
        return conversation

    def whole(self, run: Run, deltas: Sequence[Delta], trace: str | None) -> dict[str, Any]:
        """The response with all its items."""
        for delta in deltas:
            list(self.step(delta))
        list(self.end(run, trace))
        return self._finished

    def start(self) -> Iterator[str]:
        """The response, without items."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def step(self, delta: Delta) -> Iterator[str]:
        """Text of the open message, or an item that closes it."""
        if delta.text:
            yield from self._add_text(delta.text)
        for kind, item in (("call", delta.call), ("content", delta.content)):
            if item is None:
                continue
            yield from self._close()
            key = f"pc_{uuid.uuid4().hex}"
            yield from self._add({"id": key, "type": f"perception_{kind}", **item})

    def end(self, run: Run, trace: str | None) -> Iterator[str]:
        """The last item and the whole response."""
        if not any(item["type"] == "message" for item in self._output) and self._text is None:
            yield from self._add_text("")
        yield from self._close()
        self._finished = response = self._finish(run, trace)
        yield self._event(f"response.{response['status']}", response=response)

    def fail(self, error: APIError) -> Iterator[str]:
        """The response with its error."""
        about = {"code": error.code or "server_error", "message": error.body["error"]["message"]}
        yield self._event("response.failed", response=self._response("failed", error=about))

    @property
    def _stores(self) -> bool:
        return self.body.store is not False

    def _messages(self) -> list[dict[str, Any]]:
        given = self.body.input
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        messages = [item for item in items if item.get("type") not in _SKIPPED]
        for item in messages:
            if item.get("type", "message") != "message":
                text = f"items of the type {str(item['type'])[:50]!r} are not supported"
                raise APIError(400, text, "input")
        if self.body.instructions is not None:
            messages = [{"role": "system", "content": self.body.instructions}, *messages]
        return messages

    def _add_text(self, text: str) -> Iterator[str]:
        index = len(self._output)
        if self._text is None:
            self._text, text = "", text.lstrip()
            self._message_id = f"msg_{uuid.uuid4().hex}"
            item = self._message("in_progress", [])
            yield self._event("response.output_item.added", output_index=index, item=item)
            yield self._part("response.content_part.added", part=_part(""))
        self._text += text
        if text:
            yield self._part("response.output_text.delta", delta=text, logprobs=[])

    def _close(self) -> Iterator[str]:
        """End the open message, if there is one."""
        if (text := self._text) is None:
            return
        part = _part(text)
        yield self._part("response.output_text.done", text=text, logprobs=[])
        yield self._part("response.content_part.done", part=part)
        self._text = None
        yield from self._add(self._message("completed", [part]), is_new=False)

    def _add(self, item: dict[str, Any], is_new: bool = True) -> Iterator[str]:
        index = len(self._output)
        self._output.append(item)
        if is_new:
            yield self._event("response.output_item.added", output_index=index, item=item)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part(self, kind: str, **fields: Any) -> str:
        index = len(self._output)
        return self._event(
            kind, item_id=self._message_id, output_index=index, content_index=0, **fields
        )

    def _event(self, kind: str, **fields: Any) -> str:
        self._num_events += 1
        return sse({"type": kind, "sequence_number": self._num_events - 1, **fields}, kind)

    def _finish(self, run: Run, trace: str | None) -> dict[str, Any]:
        """The finished response, which is stored."""
        is_cut = run.finish_reason == "length"
        response = self._response(
            "incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            stop_reason=run.stop_reason,
            usage=usage(run.trace, ("input", "output")),
            **({"perception": {"trace": trace}} if trace else {}),
        )
        if self._stores:
            request = run.conversation.request
            turns = [*request.messages, Message("assistant", run.text)]
            transcript = run.conversation.transcript
            self.server.responses.put(self.key, response, turns, transcript)
        return response

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.key,
            "object": "response",
            "created_at": self._created,
            "model": self.server.model_name,
            "status": status,
            "output": list(self._output),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "previous_response_id": body.previous_response_id,
            "max_output_tokens": body.max_output_tokens,
            "store": self._stores,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "text": {"format": {"type": "text"}},
            **fields,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
