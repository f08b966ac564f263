"""A real server on a loopback port, in a thread of the tests, and what is sent to it."""

import base64
import json
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import uvicorn

import vpt
from vpt.serving.app import create_app
from vpt.serving.server import Settings

EXAMPLES = Path(vpt.__file__).parent / "examples"
QUESTIONS = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
TAGS = EXAMPLES / "tags.jpg"
QUESTION = "What number is on the blue one?"


BLUE = (QUESTION, "tags.jpg")
"""A question on which the model looks at a region; the answer is 3."""


def data_uri(data=TAGS, kind="image/jpeg"):
    """A data URI of a file or of bytes."""
    data = data.read_bytes() if isinstance(data, Path) else data
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(picture="tags.jpg", **about):
    """The part of a message for an example picture, or for the bytes of an image."""
    url = data_uri(EXAMPLES / picture if isinstance(picture, str) else picture)
    return {"type": "image_url", "image_url": {"url": url, **about}}


def messages_of(question, *pictures):
    """The one message of a question about pictures."""
    parts = [image_part(picture) for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
"""The beginning of a request, as it is sent."""


def raw(url, data, seconds=10):
    """Send bytes as they are; returns what comes back until the server closes, or time is up."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as sock:
        sock.sendall(data)
        answer = b""
        try:
            while part := sock.recv(65536):
                answer += part
                if b"}}" in answer:
                    break
        except TimeoutError:
            pass
        return answer


def until(is_true, seconds=10.0):
    """Wait until something is true; fails after some seconds."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.01)


def ask(question=QUESTION, url=None):
    """Messages with a question about the picture of tags."""
    image = {"type": "image_url", "image_url": {"url": url or data_uri()}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


@contextmanager
def serving(runtime, **settings):
    """Serve a runtime; returns the URL and the application's server."""
    app = create_app(runtime, Settings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app.state.server
    finally:
        server.should_exit = True
        thread.join()
