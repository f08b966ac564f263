"""Slots of the server: queue, clients that leave, keys, failures, silence, stop texts, its end."""

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from served import HEAD, messages_of, raw, serving, until

import vpt
from vpt.serving.worker import _Text

KEY = "correct-horse"


def noise():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 112, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


SHORT = {"messages": messages_of("Go on.", noise()), "max_tokens": 2}
LONG = {**SHORT, "max_tokens": 1500}


@pytest.fixture(scope="module")
def babbler(random_model):
    """A model that never ends by itself, for one request at once."""
    return vpt.load(random_model, device="cpu", max_num_seqs=1, max_model_len=2000)


class Babbling:
    """A server of a babbling model with settings; ``post`` sends it a chat request."""

    def __init__(self, runtime, url):
        self.runtime = runtime
        self.url = f"{url}/v1/chat/completions"
        self.base = url

    def post(self, body=SHORT, **options):
        return httpx.post(self.url, json=body, **{"timeout": 60, **options})

    @contextmanager
    def busy(self):
        """While a stream holds the only slot, a token each 10 ms."""
        engine = self.runtime.worker.engine
        decode = type(engine).decode
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "decode", lambda *a: time.sleep(0.01) or decode(engine, *a))
            yield from self._stream()

    def _stream(self):
        with httpx.stream("POST", self.url, json={**LONG, "stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            until(lambda: self.runtime.worker.num_running == 1)
            yield

    def is_idle(self):
        worker = self.runtime.worker
        return (worker.num_running, worker.num_waiting) == (0, 0) and (
            worker.engine.num_free_slots == worker.engine.num_slots
        )


@pytest.fixture
def serve(babbler):
    @contextmanager
    def serve(**settings):
        with serving(babbler, **settings) as (url, _):
            yield Babbling(babbler, url)

    return serve


def test_a_full_queue_refuses_and_clients_try_again(serve):
    with serve(max_queue=0) as server:
        retrying = openai.OpenAI(base_url=f"{server.base}/v1", api_key="any", max_retries=4)
        answers = []

        def ask():
            answers.append(retrying.chat.completions.create(model=None, **SHORT))

        with server.busy():
            refused = server.post()
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            error = refused.json()["error"]
            assert error["type"] == "rate_limit_error" and "try again" in error["message"]
            retrying.models.list()  # needs no slot
            thread = threading.Thread(target=ask)
            thread.start()
            time.sleep(0.2)
            assert not answers
        thread.join(30)
        assert answers[0].usage.completion_tokens == 2


WITHOUT_BODY = HEAD + b"Content-Length: 1000000\r\n\r\n"


def test_a_full_queue_refuses_a_request_before_its_body(serve):
    with serve(max_queue=0) as server, server.busy():
        for head in (WITHOUT_BODY, HEAD + b"Expect: 100-continue\r\n" + WITHOUT_BODY[len(HEAD) :]):
            answer = raw(server.base, head).lower()
            assert answer.startswith(b"http/1.1 429") and b"retry-after: 1" in answer
            assert b"the queue is full" in answer


def test_a_server_that_drains_refuses_a_request_before_its_body(babbler):
    with serving(babbler) as (url, app):
        app.desk.is_draining = True
        answer = raw(url, WITHOUT_BODY).lower()
        assert answer.startswith(b"http/1.1 503") and b"retry-after: 5" in answer
        assert b"shutting down" in answer and app.desk.num_open == 0


def test_a_request_has_its_place_while_its_body_comes(serve):
    with serve(max_queue=0) as server:
        host, port = server.base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(WITHOUT_BODY + b'{"messages')
            until(lambda: raw(server.base, WITHOUT_BODY).startswith(b"HTTP/1.1 429"))
        until(lambda: server.post().status_code == 200)


def test_bad_input_is_sent_once(serve):
    with serve() as server:
        client = openai.OpenAI(base_url=f"{server.base}/v1", api_key="any", max_retries=4)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=client.models.list().data[0].id, n=2, **SHORT)
        counted = [
            line
            for line in httpx.get(f"{server.base}/metrics").text.splitlines()
            if line.startswith("vpt:http_requests_total") and 'status="400"' in line
        ]
        assert [float(line.rpartition(" ")[2]) for line in counted] == [1]


def test_a_client_that_leaves_a_stream_frees_its_slot(serve):
    with serve() as server:
        with server.busy():
            pass
        begin = time.monotonic()
        until(server.is_idle, 2)
        assert server.post().status_code == 200
        assert time.monotonic() - begin < 3


def test_a_client_that_leaves_while_it_waits_for_an_answer_frees_its_slot(serve):
    with serve() as server:
        with pytest.raises(httpx.ReadTimeout):
            server.post(LONG, timeout=0.2)
        until(server.is_idle, 2)


def test_a_client_that_leaves_the_queue_is_forgotten(serve):
    with serve() as server:
        with server.busy():
            with pytest.raises(httpx.ReadTimeout):
                server.post(SHORT, timeout=0.2)
            with pytest.raises(httpx.ReadTimeout):
                server.post({**SHORT, "stream": True}, timeout=0.2)
            until(lambda: server.runtime.worker.num_waiting == 0, 2)
            assert server.runtime.worker.num_running == 1
        until(server.is_idle, 2)


# --- keys -----------------------------------------------------------------------------------

WRONG = (None, "", "Bearer", KEY, f"Bearer {KEY} x", f"Bearer x{KEY}", "Bearer correct")
WRONG += (f"Basic {KEY}", f"Bearer {KEY.upper()}", "Bearer corr\u00e9ct-horse")


def test_a_key_guards_all_but_health_and_metrics(serve, caplog):
    with serve(api_key=KEY) as server, caplog.at_level(logging.DEBUG, "vpt"):
        for given in WRONG:
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            for path in ("/v1/models", "/v1/nonsense", "/v1/traces/x"):
                response = httpx.get(server.base + path, headers=headers)
                assert (response.status_code, path) == (401, path), given
                assert response.json()["error"]["code"] == "invalid_api_key"
            assert server.post({}, headers=headers).status_code == 401
        for path in ("/health", "/metrics"):
            assert httpx.get(server.base + path).status_code == 200
        right = openai.OpenAI(base_url=f"{server.base}/v1", api_key=KEY)
        model = right.models.list().data[0].id
        assert right.chat.completions.create(model=model, **SHORT).choices
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.base}/v1", api_key="wrong").models.list()
    assert KEY not in caplog.text


def test_keys_are_compared_in_constant_time(serve, monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    with serve(api_key=KEY) as server:
        httpx.get(f"{server.base}/v1/models", headers={"authorization": "Bearer wrong"})
    assert compared


def test_pages_of_permitted_origins_may_call(serve):
    asked = {"origin": "https://a.org", "access-control-request-method": "POST"}
    with serve(cors_origins=("https://a.org",), api_key=KEY) as server:
        allowed = httpx.options(server.url, headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.org"
        other = httpx.options(server.url, headers={**asked, "origin": "https://b.org"})
        assert "access-control-allow-origin" not in other.headers
    with serve() as server:
        response = httpx.get(f"{server.base}/v1/models", headers={"origin": "https://a.org"})
        assert "access-control-allow-origin" not in response.headers


def test_requests_have_an_id(serve):
    with serve() as server:
        named = httpx.get(f"{server.base}/health", headers={"x-request-id": "mine-1"})
        assert named.headers["x-request-id"] == "mine-1"
        for odd in ("a b", "x" * 500, "<script>", "%0d%0aX-Evil: 1"):
            given = httpx.get(f"{server.base}/health", headers={"x-request-id": odd})
            assert given.headers["x-request-id"] not in ("", odd)


# --- silence and failure --------------------------------------------------------------------


def test_an_error_within_a_stream_is_a_chunk_before_the_end(serve, monkeypatch):
    with serve() as server:
        engine, steps = server.runtime.worker.engine, []
        decode = type(engine).decode

        def breaks(*args):
            steps.append(1)
            if len(steps) > 30:
                raise RuntimeError("a fault in /secret/path.py")
            return decode(engine, *args)

        monkeypatch.setattr(engine, "decode", breaks)
        body = {**LONG, "stream": True}
        with httpx.stream("POST", server.url, json=body) as response:
            data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        assert response.status_code == 200 and data[-1] == "[DONE]"
        error = json.loads(data[-2])["error"]
        assert error["message"] and error["type"] and "/secret" not in str(error)
        steps.clear()
        client = openai.OpenAI(base_url=f"{server.base}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="failed to answer"):
            list(client.chat.completions.create(model=None, **body))
        monkeypatch.undo()
        assert server.is_idle() and server.post().status_code == 200


def test_a_silent_stream_says_that_it_is_alive(serve, monkeypatch):
    with serve(silence_s=0.03) as server:
        engine = server.runtime.worker.engine
        decode = type(engine).decode
        monkeypatch.setattr(engine, "decode", lambda *a: time.sleep(0.1) or decode(engine, *a))
        body = {**SHORT, "max_tokens": 3, "stream": True}
        with httpx.stream("POST", server.url, json=body, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line]
        assert ": keep-alive" in lines and lines[-1] == "data: [DONE]"
        client = openai.OpenAI(base_url=f"{server.base}/v1", api_key="any")
        stream = client.chat.completions.create(model=None, **{**SHORT, "stream": True})
        assert [c.choices[0].finish_reason for c in stream][-1] == "length"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_the_death_of_the_models_thread_health_is_bad(random_model, monkeypatch):
    runtime = vpt.load(random_model, device="cpu", max_num_seqs=1, max_model_len=2000)
    with serving(runtime) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200

        def fails():
            raise RuntimeError("a fault in /secret/path.py")

        monkeypatch.setattr(runtime.worker._scheduler, "round", fails)
        server = Babbling(runtime, url)
        for status in (500, 503):
            response = server.post()
            assert response.status_code == status
            assert "/secret" not in response.text and response.json()["error"]["message"]
        assert httpx.get(f"{url}/health").status_code == 503


def test_traces_are_kept_if_permitted(serve):
    with serve() as server:
        message = server.post().json()["choices"][0]["message"]
        assert "trace" not in message["perception"]
        assert httpx.get(f"{server.base}/v1/traces/x").status_code == 404
    with serve(num_traces=1) as server:
        links = [server.post().json()["choices"][0]["message"]["perception"]["trace"] for _ in "ab"]
        assert httpx.get(server.base + links[0]).status_code == 404
        trace = vpt.Trace.from_dict(httpx.get(server.base + links[1]).json())
        assert trace.images[0].thumbnail.startswith("data:image/")
        with httpx.stream("POST", server.url, json={**SHORT, "stream": True}) as response:
            text = "".join(response.iter_text())
        link = json.loads(text.split("data: ")[-2])["choices"][0]["delta"]["perception"]["trace"]
        assert httpx.get(server.base + link).status_code == 200


# --- stop texts -----------------------------------------------------------------------------


def test_a_stop_text_ends_the_run_at_once(serve):
    with serve() as server:
        ask = openai.OpenAI(base_url=f"{server.base}/v1", api_key="x").chat.completions.create
        text = ask(model=None, **{**LONG, "max_tokens": 60}).choices[0].message.content
        stop = text[len(text) // 2 :][:4]
        cut = ask(model=None, **LONG, stop=["@@@@", stop]).choices[0]
        assert cut.message.content == text[: text.index(stop)].rstrip()
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        until(server.is_idle, 2)


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


# --- the end of the server ------------------------------------------------------------------


@contextmanager
def served_by(code, *words, **variables):
    """A process that runs Python code with these words; yields it and its address."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = str(sock.getsockname()[1])
    command = [sys.executable, "-c", code, "serve", "--port", port, *map(str, words)]
    environment = {**os.environ, **variables}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


COMMAND = "import sys; from vpt.cli import main; sys.exit(main())"
SAYS_NOTHING = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 400}


def is_up(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_sigterm_lets_the_running_finish_and_refuses_the_new(random_model):
    key = "from-the-environment"
    headers = {"Authorization": f"Bearer {key}"}
    with served_by(COMMAND, "--model", random_model, VPT_API_KEY=key) as (process, url):
        until(lambda: is_up(url), 120)
        body, path = {**SAYS_NOTHING, "stream": True}, f"{url}/v1/chat/completions"
        with httpx.stream("POST", path, headers=headers, json=body, timeout=60) as got:
            lines = got.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/health").json() == {"status": "draining"})
            new = httpx.post(path, headers=headers, json=body)
            assert new.status_code == 503 and new.headers["retry-after"]
            assert list(lines)[-2] == "data: [DONE]"
        log = process.stderr.read().decode()
        assert process.wait(20) == 0
    assert key not in log and "Traceback" not in log


@pytest.mark.slow
def test_after_a_kill_the_same_command_serves_again(random_model, tmp_path):
    words = ("--model", random_model)
    with served_by(COMMAND, *words, TMPDIR=str(tmp_path)) as (process, url):
        until(lambda: is_up(url), 120)
        body, path = {**SAYS_NOTHING, "stream": True}, f"{url}/v1/chat/completions"
        with httpx.stream("POST", path, json=body, timeout=60) as got:
            lines = got.iter_lines()
            next(lines)
            process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
        process.wait(20)
        port = url.rpartition(":")[2]
        assert list(tmp_path.iterdir()) == []
        with served_by(COMMAND, *words, "--port", port) as (_, _):  # the last one counts
            until(lambda: is_up(url), 120)
            assert httpx.post(path, json=SAYS_NOTHING, timeout=60).status_code == 200


@pytest.mark.slow
def test_the_process_ends_with_an_error_if_told_to(random_model):
    fault = "import vpt.inference.scheduler as one; one.Scheduler.round = lambda self: 1 / 0\n"
    with served_by(fault + COMMAND, "--model", random_model, "--exit-on-error") as (process, url):
        until(lambda: is_up(url), 120)
        response = httpx.post(f"{url}/v1/chat/completions", json=SAYS_NOTHING, timeout=60)
        assert response.status_code == 500 and "division" not in response.text
        assert process.wait(20) == 1
