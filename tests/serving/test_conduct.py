"""How the server conducts itself: keys, limits, clients that leave, threads that die, its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from served import ask, serving

import vpt
from vpt.serving.worker import _Text

LONG = {"model": "tiny", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 3000}
SHORT = {**LONG, "max_tokens": 3}


@pytest.fixture(scope="module")
def slow(endless):
    """A server of two slots and a queue of one, with a key."""
    with serving(endless, max_queue=1, api_key="secret", cors_origins=["http://page"]) as served:
        yield served


@pytest.fixture
def http(slow):
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=slow[0], headers=headers, timeout=60) as client:
        yield client


def until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer secre", "secret", "Bearer secret"])
def test_a_wrong_key_is_401_and_health_and_metrics_need_none(slow, key):
    headers = {} if key is None else {"Authorization": key}
    answer = httpx.get(f"{slow[0]}/v1/models", headers=headers)
    is_right = key == "Bearer secret"
    assert answer.status_code == (200 if is_right else 401)
    if not is_right:
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{slow[0]}/health").json() == {"status": "ok"}
    assert "vpt:num_requests_running" in httpx.get(f"{slow[0]}/metrics").text


def test_a_request_id_is_kept_if_it_is_harmless_and_made_otherwise(http):
    for given, is_kept in (("a-1", True), ("x" * 200, False), ("a b", False)):
        answer = http.get("/v1/models", headers={"X-Request-Id": given})
        assert (answer.headers["x-request-id"] == given) is is_kept


def test_pages_of_listed_origins_may_call(http):
    asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    allowed = http.options("/v1/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "http://page"
    other = http.options("/v1/chat/completions", headers={**asked, "Origin": "http://evil"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(slow, stream):
    url, server = slow
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as sock:
        sock.sendall(head + body)
        until(lambda: server.desk.worker.num_running == 1)
        if stream:
            assert sock.recv(10).startswith(b"HTTP/1.1")
    until(lambda: server.desk.worker.num_running == 0)
    assert server.desk.num_open == server.desk.num_pixels == 0
    assert server.runtime.engine.num_free_slots == 2


def test_a_full_queue_is_429_and_the_others_are_answered(slow, http):
    def send(results):
        results.append(http.post("/v1/chat/completions", json={**LONG, "max_tokens": 400}))

    results = []
    threads = [threading.Thread(target=send, args=(results,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: slow[1].desk.num_open == 3)
    refused = http.post("/v1/chat/completions", json={**SHORT, "stream": True})
    for thread in threads:
        thread.join()
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert [one.status_code for one in results] == [200, 200, 200]
    assert http.post("/v1/chat/completions", json=SHORT).status_code == 200


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


def test_a_prompt_that_does_not_fit_is_400_also_as_a_stream(endless):
    body = {**LONG, "messages": [{"role": "user", "content": "many words " * 20_000}]}
    with serving(endless) as (url, _):
        for stream in (False, True):
            bad = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": stream})
            assert bad.status_code == 400
            assert bad.json()["error"]["code"] == "context_length_exceeded"


def test_a_silent_stream_has_comments(endless):
    with serving(endless, silence_s=0.001) as (url, _):
        body = {**SHORT, "stream": True}
        lines = httpx.post(f"{url}/v1/chat/completions", json=body).text.split("\n\n")
    assert ": keep-alive" in lines
    assert lines[-2] == "data: [DONE]"


def test_the_death_of_the_models_thread_is_500_then_503(monkeypatch):
    from tiny_model import tiny_model

    runtime = vpt.Runtime(*tiny_model(), name="tiny")
    with serving(runtime) as (url, server):

        def fail():
            raise ValueError("/secret/path")

        monkeypatch.setattr(server.desk.worker._scheduler, "round", fail)
        failed = httpx.post(f"{url}/v1/chat/completions", json=SHORT)
        assert failed.status_code == 500 and "secret" not in failed.text
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        assert httpx.post(f"{url}/v1/chat/completions", json=SHORT).status_code == 503


def test_traces_are_kept_if_asked_for(client, url):
    done = client.chat.completions.create(model="embedded", messages=ask())
    path = done.choices[0].message.perception["trace"]
    trace = vpt.Trace.from_dict(httpx.get(url + path).json())
    assert trace.answer == "3" and trace.images[0].thumbnail
    assert httpx.get(f"{url}/v1/traces/none").status_code == 404


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
