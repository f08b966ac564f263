"""Limits of bodies and prompts, stop texts, and the end of the server."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
from served import serving, until

from vpt.serving.worker import _Text

LONG = {"model": "tiny", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 3000}
SHORT = {**LONG, "max_tokens": 3}


def test_a_large_body_is_413_and_one_that_is_no_json_400(endless):
    with serving(endless, max_body_bytes=1000, max_body_s=0.5) as (url, _):
        large = httpx.post(f"{url}/v1/chat/completions", content=b"x" * 3000)
        assert large.status_code == 413 and large.json()["error"]["code"] is None
        for body in (b"", b"{", b"[]", b"\xff", b'{"messages": "x"}', b"[" * 900):
            bad = httpx.post(f"{url}/v1/chat/completions", content=body)
            assert bad.status_code == 400 and bad.json()["error"]["message"]

        def drip():
            yield b"{"
            time.sleep(1)
            yield b"}"

        assert httpx.post(f"{url}/v1/chat/completions", content=drip()).status_code == 408


def test_a_stop_text_ends_the_answer_before_it(endless):
    with serving(endless) as (url, server):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            whole = client.chat.completions.create(**{**LONG, "max_tokens": 60})
            text = whole.choices[0].message.content
            assert whole.choices[0].finish_reason == "length"
            stop = text[len(text) // 2 :][:4]
            cut = client.chat.completions.create(**LONG, stop=["@@@@", stop])
            assert cut.choices[0].message.content == text[: text.index(stop)].rstrip()
            assert (cut.choices[0].finish_reason, cut.choices[0].stop_reason) == ("stop", stop)
            chunks = list(client.chat.completions.create(**LONG, stop=stop, stream=True))
            joined = "".join(one.choices[0].delta.content or "" for one in chunks)
            assert joined == cut.choices[0].message.content
        until(lambda: server.desk.worker.num_running == 0)


@pytest.mark.parametrize(
    ("stops", "parts", "shown"),
    [
        ((), ["  a", " b ", " "], "a b"),
        (("END",), ["x E", "N", "D y"], "x"),
        (("END",), ["x EN", "O"], "x ENO"),
        (("aab",), ["a", "a", "a", "b", "c"], "a"),
        (("b", "abc"), ["za", "bc"], "z"),
    ],
)
def test_text_is_held_back_while_it_may_be_a_stop_text(stops, parts, shown):
    text = _Text(stops)
    out = ""
    for part in parts:
        out += text.add(0, part)
        if text.stopped_by is not None:
            break
    assert out + text.end() == shown
    assert text.turn_text.strip() == shown


def test_the_text_of_a_further_turn_is_on_its_own_line():
    text = _Text(())
    assert text.add(0, "one ") + text.add(1, "") + text.add(1, " two") + text.end() == "one\ntwo"


@pytest.mark.slow
def test_sigterm_lets_the_running_finish_and_refuses_the_new(random_model):
    command = [sys.executable, "-m", "vpt", "serve", "--model", str(random_model), "--port"]
    port = free_port()
    environment = {**os.environ, "VPT_API_KEY": "from-the-environment"}
    with subprocess.Popen(
        [*command, str(port)], stderr=subprocess.PIPE, env=environment
    ) as process:
        headers = {"Authorization": "Bearer from-the-environment"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers) as http:
            until_up(http)
            name = http.get("/v1/models").json()["data"][0]["id"]
            body = {**LONG, "model": name, "max_tokens": 400, "stream": True}
            with http.stream("POST", "/v1/chat/completions", json=body, timeout=60) as got:
                lines = got.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                refused = httpx.get(f"http://127.0.0.1:{port}/health")
                assert refused.json() == {"status": "draining"}
                new = httpx.post(f"{http.base_url}/v1/chat/completions", headers=headers, json=body)
                assert new.status_code == 503 and new.headers["retry-after"]
                assert list(lines)[-2] == "data: [DONE]"
        log = process.stderr.read().decode()
        assert process.wait(20) == 0
    assert "from-the-environment" not in log and "Traceback" not in log


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def until_up(http):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail("the server did not start")
