"""Several replicas behind one address: who answers what, and what a lost one takes with it."""

import base64
import io
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from served import ask, data_uri

from vpt.errors import PromptError

pytest.importorskip("ray.serve")
import httpx
import openai
import ray

from vpt.serving import replicas
from vpt.serving.replicas import build, merge_metrics, ranked, route_of

CHAT = "/v1/chat/completions"


def body(**fields):
    return json.dumps(fields).encode()


def test_a_route_is_the_response_then_the_session_then_the_first_image():
    asked = {"messages": ask()}
    image = route_of(CHAT, {}, body(**asked))
    assert image[0] == "image" and image == route_of(CHAT, {}, body(messages=ask("Another?")))
    assert image != route_of(CHAT, {}, body(messages=ask(url=data_uri() + "AAAA")))
    assert route_of(CHAT, {"x-session-id": "a"}, body(**asked)) == ("session", "a")
    assert route_of(CHAT, {}, body(**asked, prompt_cache_key="b")) == ("session", "b")
    earlier = {"input": "And?", "previous_response_id": "resp_k3x_9f"}
    assert route_of("/v1/responses", {}, body(**earlier)) == ("replica", "k3x")
    assert route_of("/v1/responses/resp_k3x_9f", {}, b"") == ("replica", "k3x")
    assert route_of("/v1/traces/chatcmpl-k3x-9f", {}, b"") == ("replica", "k3x")


@pytest.mark.parametrize(
    "given",
    [
        *(b"", b"no JSON", b"[]", body(messages="x"), body(messages=[1, {"content": [2, {}]}])),
        *(body(input="x"), body(previous_response_id=4), body(previous_response_id="resp_9f")),
    ],
)
def test_what_names_nothing_has_no_route(given):
    assert route_of(CHAT, {}, given) is None


def test_a_route_keeps_its_replica_while_others_come_and_go():
    names = [f"r{n}" for n in range(5)]
    routes = [("session", str(n)) for n in range(300)]
    first = {route: ranked(route, names)[0][0] for route in routes}
    assert {len([r for r in routes if first[r] == name]) > 30 for name in names} == {True}
    for route in routes:
        assert ranked(route, names[::-1]) == ranked(route, names)
        fewer = [name for name in names if name != "r2"]
        if first[route] != "r2":
            assert ranked(route, fewer)[0] == [first[route]]
    assert ranked(("replica", "r3"), names)[0] == ["r3"]
    assert sorted(name for (name,) in ranked(("replica", "gone"), names)) == names
    assert [ranked(("index", n), names)[0] for n in (0, 4, 5)] == [["r0"], ["r4"], ["r0"]]
    few, everyone = ranked(None, names)
    assert len(few) == 2 and everyone == names
    assert ranked(None, ["r0"])[0] == ["r0"] and ranked(("index", 0), []) == []


def test_metrics_of_replicas_are_one_text_with_a_label():
    text = '# HELP vpt:a_total of a\n# TYPE vpt:a_total counter\nvpt:a_total{kind="x"} 1.0\n'
    merged = merge_metrics({"r1": text, "r2": text.replace("1.0", "2.0")}).decode()
    assert merged.count("# TYPE vpt:a_total counter") == 1
    assert 'vpt:a_total{kind="x",replica="r2"} 2.0' in merged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replica": 2}, "unknown option 'replica'; available: autoscaling, grace, load"),
        ({"replicas": -1}, "options of the replicas: .*"),
        (
            {"autoscaling": {"max": 3}},
            "autoscaling: unknown option 'max'; available: .*max_replicas",
        ),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 1}}, "max_replicas"),
        ({"settings": {"max_queue": -1}}, "max_queue must be a whole number of at least 0"),
        ({"settings": {"queue": 1}}, "unexpected keyword argument 'queue'"),
    ],
)
def test_unusable_options_are_refused(options, words):
    with pytest.raises(PromptError, match=words):
        build(options)


def test_the_command_refuses_what_does_not_go_together(run):
    both = ("serve", "--replicas", 2, "--autoscaling", "{}", "--port", 0)
    assert "exclude each other" in run(*both)[2]
    assert (
        "has a device of its own"
        in run("serve", "--replicas", 2, "--device", "cuda:1", "--port", 0)[2]
    )
    assert "is not JSON" in run("serve", "--autoscaling", "x")[2]
    assert "expected an object of JSON" in run("serve", "--autoscaling", "3")[2]


# A cluster of two -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(random_model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    load = {"path_or_id": str(random_model), "device": "cpu", "max_num_seqs": 4}
    settings = {"served_model_name": "tiny", "max_queue": 2, "max_body_bytes": 2**20}
    options = {"load": load, "settings": settings, "replicas": 2, "grace": 1}
    replicas.start(options, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    replicas.stop()


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (60, 60), (number * 20, 99, 0)).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def post(url, number=0, session=None, **fields):
    headers = {} if session is None else {"X-Session-Id": session}
    asked = {"messages": ask("What?", picture(number)), "max_tokens": 5, **fields}
    return httpx.post(url + CHAT, json=asked, headers=headers, timeout=60)


def numbers(url, name):
    """A metric by replica."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    found = re.findall(rf'^vpt:{name}{{.*replica="(\w+)".*}} (.*)$', text, re.MULTILINE)
    totals = dict.fromkeys(sorted({replica for replica, _ in found}), 0.0)
    for replica, value in found:
        totals[replica] += float(value)
    return totals


def used_by(url, work):
    """Replicas whose number of requests grew."""
    before = numbers(url, "http_requests_total")
    work()
    after = numbers(url, "http_requests_total")
    return {name for name, value in after.items() if value > before.get(name, 0)}


def until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_image_or_session_is_answered_by_one_replica(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert set(numbers(url, "num_requests_running").values()) == {0.0}
    assert len(numbers(url, "num_requests_running")) == 2
    assert len(used_by(url, lambda: [post(url, 1) for _ in range(6)])) == 1
    assert len(used_by(url, lambda: [post(url, n) for n in range(12)])) == 2
    assert len(used_by(url, lambda: [post(url, n, session="a") for n in range(6)])) == 1
    asked = {"input": "What?", "max_output_tokens": 5}
    first = httpx.post(f"{url}/v1/responses", json=asked, timeout=60).json()
    for _ in range(4):  # only the replica that stores the response can continue it
        continued = {**asked, "previous_response_id": first["id"]}
        assert httpx.post(f"{url}/v1/responses", json=continued, timeout=60).status_code == 200
    details = post(url, 1).json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_errors_pass_through_the_front(url):
    answer = httpx.get(f"{url}/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, None)
    assert post(url, max_tokens=0).json()["error"]["param"] == "max_tokens"
    large = httpx.post(url + CHAT, content=b"x" * (2**20 + 1))
    assert large.status_code == 413 and "the body is larger than 1048576 bytes" in large.text
    answer = httpx.get(f"{url}/health", headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_full_replica_refuses_and_a_client_that_leaves_frees_its_place(url):
    long = {"max_tokens": 20_000, "stream": True, "perception": "none"}
    asked = {"messages": ask("What?", picture(1)), **long}
    with httpx.Client(timeout=60) as client:
        streams = [client.build_request("POST", url + CHAT, json=asked) for _ in range(4)]
        answers = [client.send(one, stream=True) for one in streams]
        assert {one.status_code for one in answers} == {200}
        assert sorted(numbers(url, "num_requests_running").values()) == [0.0, 4.0]
        with ThreadPoolExecutor(4) as pool:
            late = pool.map(lambda n: post(url, 1, max_tokens=2).status_code, range(4))
            time.sleep(2)
            for one in answers:
                one.close()
            assert sorted(late) == [200, 200, 429, 429]
    until(lambda: not any(numbers(url, "num_requests_running").values()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_replica_loses_its_requests_only_and_comes_back(url):
    long = {"max_tokens": 4000, "perception": "none"}
    sessions = {}
    while len(sessions) < 2:
        name = f"session {time.monotonic()}"
        (replica,) = used_by(url, lambda name=name: post(url, session=name))
        sessions.setdefault(replica, name)
    (lost, of_lost), (_, of_other) = sessions.items()

    def ask_streamed(session):
        return post(url, session=session, stream=True, **long).text

    def ask_with_retries(session):
        client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="x", default_headers={"X-Session-Id": session}
        )
        options = {"extra_body": {"perception": "none"}, "max_tokens": 4000}
        return client.chat.completions.create(
            model="tiny", messages=ask("What?", picture(0)), **options
        )

    with ThreadPoolExecutor(4) as pool:
        broken, whole = pool.submit(ask_streamed, of_lost), pool.submit(ask_streamed, of_other)
        refused = pool.submit(post, url, session=of_lost, **long)
        again = pool.submit(ask_with_retries, of_lost)
        until(lambda: sum(numbers(url, "num_requests_running").values()) == 4)
        names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
        (actor,) = [name for name in names if name.endswith(lost)]
        ray.kill(ray.get_actor(actor, namespace="serve"))
        error = json.loads(broken.result().split("data: ")[-2])["error"]
        assert error["code"] == "replica_lost" and broken.result().endswith("data: [DONE]\n\n")
        assert refused.result().status_code == 503
        assert refused.result().headers["retry-after"] == "1"
        assert again.result().usage.completion_tokens > 0
        assert '"finish_reason": "length"' in whole.result()
    assert post(url, session=of_lost).status_code == 200
    until(lambda: len(numbers(url, "num_requests_running")) == 2)
    assert lost not in numbers(url, "num_requests_running")
