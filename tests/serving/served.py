"""A real server on a loopback port, in a thread of the tests, and what is sent to it."""

import base64
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import uvicorn

import vpt
from vpt.serving.app import create_app
from vpt.serving.server import Settings

TAGS = Path(vpt.__file__).parent / "examples" / "tags.jpg"
QUESTION = "What number is on the blue one?"


def data_uri(path=TAGS):
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


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
