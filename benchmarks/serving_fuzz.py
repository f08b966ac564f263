"""Damaged requests for a server: none may be answered with 5xx, a traceback or a path."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
from PIL import Image

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -0.0, 1e308, 1e-320, 0.5),
    *("", " ", "\0", "auto", "\ud800", "\u202e", "a" * 5000, "🙂", "<|im_end|>", "<|image_pad|>"),
    *("<|clip_action|>", "../../etc/passwd", "%s%n", "${jndi:x}", "\r\nX-Evil: 1"),
    *([], {}, [[]], [None], {"a": {}}, [0, 0, 7, 7], [-1] * 4, ["x"] * 40),
)
_FIELDS = (
    *("model", "messages", "stream", "stream_options", "temperature", "top_p", "top_k", "seed"),
    *("stop", "max_tokens", "max_completion_tokens", "n", "logprobs", "top_logprobs", "tools"),
    *("tool_choice", "response_format", "perception", "max_calls", "look_at", "constrain"),
    *("region", "look_for", "user", "metadata", "store", "input", "previous_response_id", "x"),
)
_PATHS = ("/v1/chat/completions",) * 8 + ("/v1/responses",) * 2
_URLS = (
    *("", "data:", "data:;base64,", "data:image/png;base64,****", "data:image/svg+xml,<svg/>"),
    *("file:///etc/passwd", "/etc/passwd", "http://127.0.0.1/", "http://[::1]/", "gopher://x"),
    *("http://169.254.169.254/latest", "http://2130706433/", "https://a:b@c/", "javascript:1"),
    *("//x", "C:\\x", "\0", "http://localhost:1/\r\nHost: x"),
)
_LEAKS = re.compile(
    r"Traceback|File \"|site-packages|\.py\b|/(?:usr|tmp|home|root|var)/|0x[0-9a-f]{8}"
)


def fuzz(url: str, model: str, number: int, seed: int = 0) -> dict[str, int]:
    """Send ``number`` damaged requests; returns how often each status came.

    Raises:
        AssertionError: naming the request (its index with this seed) that got 5xx, no answer within
            a minute, an error of another shape, or a traceback or path.
    """
    statuses: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for index in range(number):
            rng = random.Random(f"{seed} {index}")
            path, content, headers = _request(rng, model)
            try:
                response = client.post(path, content=content, headers=headers)
            except httpx.HTTPError as exc:
                raise AssertionError(f"request {index}: {exc!r}; {content[:300]!r}") from exc
            words = f"request {index}: {response.status_code} {response.text[:500]}"
            assert response.status_code < 500, f"{words}; {content[:300]!r}"
            if response.status_code >= 400:
                error = response.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}, words
                assert not _LEAKS.search(error["message"].replace("/etc/passwd", "")), words
            statuses[str(response.status_code)] += 1
        assert client.get("/health").status_code == 200
    return dict(statuses)


def _request(rng: random.Random, model: str) -> tuple[str, bytes, dict[str, str]]:
    path = rng.choice(_PATHS)
    body = _good_body(rng, model, "input" if path.endswith("responses") else "messages")
    for _ in range(rng.randrange(1, 4)):
        rng.choice(_DAMAGES)(rng, body)
    content = json.dumps(body).encode()
    if rng.random() < 0.2:
        content = _damage_bytes(rng, content)
    return path, content, _headers(rng)


def _good_body(rng: random.Random, model: str, name: str) -> dict[str, Any]:
    file = io.BytesIO()
    side = rng.choice((8, 64, 200))
    Image.effect_noise((side, side), 90).convert("RGB").save(file, rng.choice(("PNG", "JPEG")))
    data = bytearray(file.getvalue())
    if rng.random() < 0.3:
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    image = {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
    parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "How many?"}]
    messages = [{"role": "user", "content": parts}]
    return {"model": model, name: messages, "max_tokens": 4, "stream": rng.random() < 0.3}


def _set_field(rng: random.Random, body: dict[str, Any]) -> None:
    body[rng.choice(_FIELDS)] = rng.choice(_ODD)


def _drop_field(rng: random.Random, body: dict[str, Any]) -> None:
    body.pop(rng.choice([*body, "x"]), None)


def _set_deep(rng: random.Random, body: dict[str, Any]) -> None:
    """Replace one value anywhere in the body."""
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in inner:
            places.append((value, key))
            if isinstance(one, dict | list):
                collect(one)

    collect(body)
    if places:
        holder, key = rng.choice(places)
        holder[key] = copy.deepcopy(rng.choice(_ODD))


def _set_url(rng: random.Random, body: dict[str, Any]) -> None:
    part = {"type": "image_url", "image_url": {"url": rng.choice(_URLS)}}
    body["messages"] = [{"role": "user", "content": [part]}]


def _nest(rng: random.Random, body: dict[str, Any]) -> None:
    value: Any = 0
    for _ in range(rng.choice((10, 200, 900))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    body[rng.choice(_FIELDS)] = value


def _many_messages(rng: random.Random, body: dict[str, Any]) -> None:
    roles = ("user", "assistant", "system", "developer", "tool", "function", "")
    texts = ("hi", "", None, [], [{"type": "text", "text": "hi"}], [{"type": "input_audio"}])
    body["messages"] = [
        {"role": rng.choice(roles), "content": rng.choice(texts)} for _ in range(rng.randrange(9))
    ]


_DAMAGES: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    *(_set_field, _set_field, _drop_field, _set_deep, _set_deep, _set_url, _nest, _many_messages),
)


def _damage_bytes(rng: random.Random, content: bytes) -> bytes:
    kind, place = rng.randrange(5), rng.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + rng.randbytes(8) + content[place:]
    if kind == 2:
        return content + content
    return (b"", b"null", b"[" * 5000, b'"', rng.randbytes(400))[rng.randrange(5)]


def _headers(rng: random.Random) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    odd = ("", "text/plain", "multipart/form-data", "application/json; charset=utf-16", "x" * 3000)
    if rng.random() < 0.2:
        name = rng.choice(("content-type", "accept", "content-encoding", "x-request-id", "origin"))
        headers[name] = rng.choice((*odd, "gzip", "a\tb", "%0d%0aX: y"))
    if rng.random() < 0.1:
        headers["authorization"] = rng.choice(("Bearer", "Bearer x", "Basic eDp5", ""))
    return headers
