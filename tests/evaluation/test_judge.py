"""A judge scores answers, with the real ``openai`` client against a server on this machine."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vpt.errors import DataError, PromptError
from vpt.evaluation import judge
from vpt.evaluation.judge import (
    JudgeError,
    JudgeItem,
    Judgement,
    judge_records,
    summary,
)
from vpt.evaluation.judge_protocol import PROMPT, PROMPT_HASH, JudgeSettings
from vpt.evaluation.records import Record
from vpt.evaluation.table import shortfalls

pytest.importorskip("openai")

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-1234"
SOON = {"retry-after-ms": "1"}  # a header by which the client waits next to nothing


def judge_all(*args, **options):
    return asyncio.run(judge.judge_all(*args, **options))


def items(num, prediction="red"):
    return [JudgeItem(f"What colour is flower {i}?", "red", prediction) for i in range(num)]


def said(content, finish_reason="stop"):
    """A whole answer of a server: status, headers, body."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content},
    }
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, {}, json.dumps(body)


def refused(status, message="no", headers=SOON, **error):
    return status, headers, json.dumps({"error": {"message": message, **error}})


class FakeJudge(ThreadingHTTPServer):
    """An endpoint that answers what ``answer(message, number of the request)`` says."""

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.lock = threading.Lock()
        self.requests, self.headers, self.times = [], [], []
        self.in_flight = self.max_in_flight = 0

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def settings(self, **changes):
        return JudgeSettings("m", self.base_url, **{"max_retries": 2, "timeout_s": 10, **changes})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append({"path": self.path, **request})
            server.headers.append(self.headers)
            server.times.append(time.monotonic())
            server.in_flight += 1
            server.max_in_flight = max(server.max_in_flight, server.in_flight)
        status, headers, body = server.answer(request["messages"][0]["content"], number)
        with server.lock:
            server.in_flight -= 1
        try:
            self.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for piece in [body] if isinstance(body, str) else body:
                self.wfile.write(piece.encode())
        except ConnectionError:
            pass  # a client that did not wait

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    running = []

    def start(answer):
        server = FakeJudge(answer)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def in_turn(*answers):
    """The first answer first, and the last one for all that follow."""
    return lambda _, number: answers[min(number, len(answers) - 1)]


# --- what is asked, and what comes back -----------------------------------------------------


def test_scores_come_back_in_order(serve):
    def answer(message, _):
        number = int(message.split("flower ")[1][0])
        time.sleep(0.02 * (4 - number))  # the last is the first to be answered
        return said(f"score: 0.{number}")

    server = serve(answer)
    done = []
    judgements = judge_all(items(5), server.settings(), on_done=lambda *args: done.append(args))
    assert [j.score for j in judgements] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert judgements[1] == Judgement(0.1, reason="", reply="score: 0.1", from_cache=False)
    assert sorted(done, key=lambda pair: pair[0]) == list(enumerate(judgements))


def test_the_request_follows_the_protocol(serve):
    server = serve(in_turn(said("score: 1")))
    judge_all(items(1), server.settings())
    assert server.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "m",
            "messages": [
                {
                    "role": "user",
                    "content": PROMPT.format(**vars(items(1)[0])),
                }
            ],
            "temperature": 0.0,
            "max_tokens": 64,
        }
    ]


def test_no_items_need_no_judge(tmp_path):
    assert judge_all([], JudgeSettings("m"), tmp_path / "cache.jsonl") == []


def test_a_running_loop_can_await_the_same(serve):
    server = serve(in_turn(said("score: 1")))

    async def run():
        return await judge.judge_all(items(2), server.settings())

    assert [j.score for j in asyncio.run(run())] == [1.0, 1.0]


def test_never_more_calls_at_once_than_allowed_and_no_fewer(serve):
    all_three = threading.Barrier(3, timeout=5)  # broken if there are ever fewer

    def answer(*_):
        all_three.wait()
        time.sleep(0.01)  # time for a fourth to come
        return said("score: 1")

    server = serve(answer)
    judge_all(items(12), server.settings(max_concurrency=3, max_retries=0))
    assert len(server.requests) == 12
    assert server.max_in_flight == 3


def test_equal_items_are_asked_once(serve):
    server = serve(in_turn(said("score: 1")))
    done = Counter()
    judgements = judge_all(
        items(3) * 4, server.settings(), on_done=lambda index, _: done.update([index])
    )
    assert len(server.requests) == 3
    assert [j.score for j in judgements] == [1.0] * 12
    assert done == Counter(range(12))


def test_an_error_of_the_caller_ends_the_run(serve):
    server = serve(in_turn(said("score: 1")))

    def on_done(index, judgement):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        judge_all(items(5), server.settings(max_concurrency=1), on_done=on_done)
    assert len(server.requests) == 1


# --- unscored, which is not 0 ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "reason"),
    [("It is fine.", "no 'score: <number>'"), ("score: 7", "not one from 0 to 1")],
)
def test_an_unreadable_reply_is_unscored_and_kept(serve, tmp_path, reply, reason):
    server = serve(in_turn(said(reply)))
    for from_cache in (False, True):
        (judgement,) = judge_all(items(1), server.settings(), tmp_path / "cache.jsonl")
        assert (judgement.score, judgement.reply) == (None, reply)
        assert reason in judgement.reason
        assert judgement.from_cache is from_cache
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, {}, '{"choices": [{"mess'), "not a chat completion"),
        ((200, {"content-type": "text/html"}, "<p>Hello</p>"), r"not a chat completion.*Hello"),
        ((200, {}, "{}"), "not a chat completion"),
        ((200, {}, "null"), "not a chat completion"),
        ((200, {}, '{"choices": []}'), "not a chat completion"),
        ((200, {}, '{"choices": [{"message": null}]}'), "not a chat completion"),
        (said(None, "content_filter"), "reply is empty.*content_filter"),
        (said(" ", "length"), "reply is empty.*raise max_tokens"),
        (refused(400, "flagged"), "400.*flagged"),
        (refused(403, "flagged"), "403.*flagged"),
    ],
)
def test_what_is_no_reply_is_unscored_not_retried_and_not_kept(serve, tmp_path, answer, reason):
    server = serve(in_turn(answer, said("score: 1")))
    cache_file = tmp_path / "cache.jsonl"
    (judgement,) = judge_all(items(1), server.settings(), cache_file)
    assert (judgement.score, judgement.reply) == (None, "")
    assert_matches(reason, judgement.reason)
    assert len(server.requests) == 1
    assert not cache_file.exists()
    assert judge_all(items(1), server.settings(), cache_file)[0].score == 1.0


def assert_matches(pattern, text):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


@pytest.mark.parametrize("depth", [2_000, 200_000])
def test_a_deeply_nested_reply_is_unscored_and_leaves_the_others_alone(serve, depth):
    deep = (200, {}, '{"choices": ' + "[" * depth + "]" * depth + "}")
    server = serve(lambda message, _: deep if "flower 1" in message else said("score: 1"))
    judgements = judge_all(items(3), server.settings())
    assert [j.score for j in judgements] == [1.0, None, 1.0]
    assert "not a chat completion" in judgements[1].reason


def test_a_reply_in_parts_is_read(serve):
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "score: "}, "odd"]
    server = serve(in_turn(said([*parts, {"type": "text", "text": "0.5"}])))
    assert judge_all(items(1), server.settings())[0] == Judgement(0.5, reply="score: 0.5")


def test_a_failed_call_leaves_the_others_alone(serve):
    def answer(message, _):
        return refused(500, "broken") if "flower 1" in message else said("score: 0")

    server = serve(answer)
    judgements = judge_all(items(3), server.settings())
    assert [j.score for j in judgements] == [0.0, None, 0.0]
    assert_matches("the call failed .*500.*broken", judgements[1].reason)


def test_text_that_is_no_unicode_is_unscored(serve):
    server = serve(in_turn(said("score: 1")))
    judgements = judge_all([*items(1, "\ud83d"), *items(1)], server.settings())
    assert [j.score for j in judgements] == [None, 1.0]
    assert "cannot be sent as UTF-8" in judgements[0].reason


# --- retries --------------------------------------------------------------------------------


def test_a_rate_limit_is_waited_out_as_long_as_the_server_says(serve):
    server = serve(in_turn(refused(429, headers={"retry-after": "1"}), said("score: 1")))
    assert judge_all(items(1), server.settings())[0].score == 1.0
    first, second = server.times
    assert second - first >= 1.0  # without the header it would be at most 0.5


def test_waits_grow_when_the_server_names_none(serve):
    server = serve(in_turn(refused(500, headers={}), refused(503, headers={}), said("score: 1")))
    assert judge_all(items(1), server.settings())[0].score == 1.0
    first, second, third = server.times
    assert second - first >= 0.375
    assert third - second >= 0.75


def test_a_server_that_keeps_failing_is_asked_so_often_and_no_more(serve):
    server = serve(in_turn(refused(500)))
    (judgement,) = judge_all(items(1), server.settings(max_retries=4))
    assert judgement.score is None
    assert len(server.requests) == 5


def test_a_late_reply_is_asked_for_again(serve):
    def answer(_, number):
        if number == 0:
            asked_again.wait(5)
        else:
            asked_again.set()
        return said("score: 1")

    asked_again = threading.Event()
    server = serve(answer)
    assert judge_all(items(1), server.settings(timeout_s=0.7, max_retries=1))[0].score == 1.0
    assert len(server.requests) == 2


def test_no_reply_in_time_is_unscored(serve):
    def answer(*_):
        time.sleep(0.4)
        return said("score: 1")

    server = serve(answer)
    (judgement,) = judge_all(items(1), server.settings(timeout_s=0.2, max_retries=0))
    assert judgement == Judgement(None, "no reply within 0.2 s")


def test_a_reply_that_trickles_in_is_given_up_and_asked_for_again(serve):
    def trickle(body):
        for character in body:
            time.sleep(0.2)  # each read is in time, the whole is not
            yield character

    def answer(_, number):
        status, headers, body = said("score: 1")
        return status, headers, trickle(body) if number == 0 else body

    server = serve(answer)
    started = time.monotonic()
    settings = server.settings(timeout_s=1, max_retries=1, max_concurrency=1)
    assert judge_all(items(1), settings)[0].score == 1.0
    assert len(server.requests) == 2
    assert time.monotonic() - started < 5


# --- runs that end --------------------------------------------------------------------------


def test_a_refused_key_ends_the_run_at_once_and_is_not_shown(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(in_turn(refused(401, f"Incorrect API key provided: {KEY}")))
    with pytest.raises(JudgeError, match=r"refused the key in OPENAI_API_KEY \(401\)") as caught:
        judge_all(items(50), server.settings(max_concurrency=2))
    assert len(server.requests) <= 2
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_an_unknown_model_ends_the_run_at_once(serve):
    server = serve(in_turn(refused(404, "The model `m` does not exist")))
    with pytest.raises(JudgeError, match=r"no model 'm' there .*does not exist.*Check model"):
        judge_all(items(50), server.settings(max_concurrency=1))
    assert len(server.requests) == 1


@pytest.mark.parametrize("num_items", [1, 30])
def test_a_judge_that_is_down_ends_the_run(serve, num_items):
    server = serve(in_turn(said("score: 1")))
    settings = server.settings(max_retries=0)
    server.server_close()
    with pytest.raises(JudgeError, match=r"cannot be reached.*Check that the server runs"):
        judge_all(items(num_items), settings)


def test_a_judge_that_goes_down_leaves_its_replies_in_the_cache(serve, tmp_path):
    server = serve(lambda _, number: said("score: 1") if number < 5 else refused(503))
    settings = server.settings(max_retries=0, max_concurrency=1)
    cache_file = tmp_path / "cache.jsonl"
    with pytest.raises(JudgeError, match=r"8 calls in a row failed.*503.*run again to resume"):
        judge_all(items(30), settings, cache_file)
    assert len(server.requests) == 5 + judge.MAX_FAILURES_IN_A_ROW
    server.answer = in_turn(said("score: 1"))
    judgements = judge_all(items(30), settings, cache_file)
    assert [j.from_cache for j in judgements] == [True] * 5 + [False] * 25


def test_failures_between_successes_do_not_end_the_run(serve):
    server = serve(lambda _, number: said("score: 1") if number % 8 == 7 else refused(400))
    judgements = judge_all(items(32), server.settings(max_concurrency=1))
    assert sum(j.score is None for j in judgements) == 28


# --- cache ----------------------------------------------------------------------------------


def test_a_second_run_makes_no_call_and_needs_no_server_and_no_key(serve, tmp_path, monkeypatch):
    server = serve(in_turn(said("score: 0.5")))
    first = judge_all(items(4), server.settings(), tmp_path / "cache.jsonl")
    monkeypatch.setattr(judge, "_connect", None)
    done = []
    second = judge_all(
        items(4), server.settings(), tmp_path / "cache.jsonl", lambda *args: done.append(args)
    )
    assert len(server.requests) == 4
    assert [(j.score, j.reply) for j in second] == [(j.score, j.reply) for j in first]
    assert all(j.from_cache for j in second)
    assert done == list(enumerate(second))


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 65}], ids=str
)
def test_what_changes_the_reply_is_asked_anew(serve, tmp_path, change):
    server = serve(in_turn(said("score: 1")))
    judge_all(items(1), server.settings(), tmp_path / "cache.jsonl")
    changed = JudgeSettings(**{"model": "m", "base_url": server.base_url, **change})
    assert not judge_all(items(1), changed, tmp_path / "cache.jsonl")[0].from_cache
    assert len(server.requests) == 2


def test_another_endpoint_is_another_judge(serve, tmp_path):
    for _ in range(2):
        server = serve(in_turn(said("score: 1")))
        judge_all(items(1), server.settings(), tmp_path / "cache.jsonl")
        assert len(server.requests) == 1


@pytest.mark.parametrize("field", ["question", "reference", "prediction"])
def test_another_item_is_asked_anew(serve, tmp_path, field):
    server = serve(in_turn(said("score: 1")))
    item = {"question": "q", "reference": "r", "prediction": "p"}
    judge_all([JudgeItem(**item)], server.settings(), tmp_path / "cache.jsonl")
    judge_all([JudgeItem(**{**item, field: "x"})], server.settings(), tmp_path / "cache.jsonl")
    assert len(server.requests) == 2


def test_concurrency_retries_and_a_final_slash_do_not_matter_to_the_cache(serve, tmp_path):
    server = serve(in_turn(said("score: 1")))
    judge_all(items(1), server.settings(), tmp_path / "cache.jsonl")
    same = JudgeSettings(
        "m", server.base_url + "/", max_concurrency=1, max_retries=1, timeout_s=1, temperature=0
    )
    assert judge_all(items(1), same, tmp_path / "cache.jsonl")[0].from_cache


def test_a_damaged_cache_is_an_error_before_any_call(serve, tmp_path):
    server = serve(in_turn(said("score: 1")))
    (tmp_path / "cache.jsonl").write_text("damaged\n")
    with pytest.raises(DataError, match="line 1"):
        judge_all(items(1), server.settings(), tmp_path / "cache.jsonl")
    assert server.requests == []


# --- key and proxy --------------------------------------------------------------------------


def test_the_key_goes_to_the_server_and_nowhere_else(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    server = serve(in_turn(said("score: 1"), refused(400, f"I was given {KEY}")))
    settings = server.settings(key_variable="MY_KEY", max_concurrency=1)
    judgements = judge_all(items(2), settings, tmp_path / "cache.jsonl")
    assert [headers["authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 2
    assert "I was given [key]" in judgements[1].reason
    written = (tmp_path / "cache.jsonl").read_text()
    for text in (repr(judgements), repr(settings), repr(summary(judgements, settings)), written):
        assert KEY not in text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.8.8"])
def test_a_server_on_this_machine_gets_a_placeholder_for_a_key(host):
    assert judge._read_key(JudgeSettings("m", f"http://{host}:1/v1")) == "no-key"


def test_a_missing_key_is_an_error_before_any_call():
    with pytest.raises(PromptError, match="set the environment variable OPENAI_API_KEY"):
        judge_all(items(1), JudgeSettings("m"))
    with pytest.raises(PromptError, match="set the environment variable MY_KEY"):
        judge_all(items(1), JudgeSettings("m", "http://10.0.0.1/v1", key_variable="MY_KEY"))


def test_a_key_that_fits_no_header_is_an_error_that_does_not_show_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nsecond line")
    with pytest.raises(PromptError, match="printable ASCII") as caught:
        judge_all(items(1), JudgeSettings("m"))
    assert KEY not in str(caught.value)


def test_a_proxy_is_not_used_to_reach_this_machine(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server = serve(in_turn(said("score: 1")))
    assert judge_all(items(1), server.settings())[0].score == 1.0


# --- settings, summary, imports -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": " "}, "model is empty"),
        ({"base_url": "localhost:8000"}, "must be like http.*'localhost:8000'"),
        ({"base_url": "ftp://host/v1"}, "must be like http"),
        ({"base_url": "http:///v1"}, "must be like http"),
        ({"max_concurrency": 0}, "max_concurrency must be a whole number from 1, not 0"),
        ({"max_concurrency": 1.5}, "max_concurrency must be a whole number from 1, not 1.5"),
        ({"max_retries": -1}, "max_retries must be a whole number from 0, not -1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1, not 0"),
        ({"timeout_s": 0}, "timeout_s must be above 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be above 0"),
        ({"timeout_s": float("inf")}, "timeout_s must be above 0"),
        ({"temperature": -1}, "temperature must be from 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, problem):
    with pytest.raises(PromptError, match=problem):
        JudgeSettings(**{"model": "m", **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"base_url": f"http://me:{KEY}@host/v1"},
        {"base_url": f"me:{KEY}@host/v1"},
        {"base_url": f"http://host/v1?key={KEY}"},
        {"base_url": f"http://host/v1#{KEY}"},
        {"key_variable": KEY},
    ],
)
def test_a_key_in_the_settings_is_refused_and_not_shown(changes):
    with pytest.raises(PromptError, match="environment variable") as caught:
        JudgeSettings(**{"model": "m", **changes})
    assert KEY not in str(caught.value)


def test_the_summary_counts_unscored_apart():
    judgements = [
        Judgement(1.0, reply="score: 1", from_cache=True),
        Judgement(None, "no connection"),
        Judgement(0.5, reply="score: 0.5"),
    ]
    assert summary(judgements, JudgeSettings("m", "http://host/v1")) == {
        "mean": 0.75,
        "n": 2,
        "unscored": 1,
        "from_cache": 1,
        "model": "m",
        "base_url": "http://host/v1",
        "temperature": 0.0,
        "max_tokens": 64,
        "prompt": PROMPT,
        "prompt_hash": PROMPT_HASH,
    }


@pytest.mark.parametrize("judgements", [[], [Judgement(None, "no connection")]])
def test_a_mean_over_nothing_is_none(judgements):
    result = summary(judgements, JudgeSettings("m"))
    assert (result["mean"], result["n"], result["unscored"]) == (None, 0, len(judgements))


def test_answers_without_a_score_are_named_with_their_reason(serve):
    def answer(message, _):
        return said("Fine." if "flower 1" in message else "score: 1")

    records = [
        Record("own", "auto", str(number), f"What colour is flower {number}?", "red", ("red",))
        for number in range(3)
    ]
    records.append(Record("own", "auto", "3", "?", error={"kind": "run", "message": "torn"}))
    scored, told, unscored = judge_records(records, serve(answer).settings(), None)
    assert [record.scores for record in scored] == [{"judge": 1.0}, {}, {"judge": 1.0}, {}]
    reason = "the reply has no 'score: <number>'"
    assert (told["n"], told["unscored"], told["reasons"]) == (2, 1, {reason: 1})
    assert unscored == [{"split": "own", "condition": "auto", "id": "1", "reason": reason}]
    results = {"splits": [], "judge": told, "unscored": unscored}
    assert shortfalls(results, Path("out")) == [
        f'1 of 3 answers have no judge score (1 x {reason}); see "unscored" in out/results.json'
    ]


def test_without_the_openai_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "vpt.evaluation.judge_client", raising=False)
    with pytest.raises(PromptError, match=r'pip install -e "\.\[eval\]"'):
        judge_all(items(1), JudgeSettings("m", "http://localhost/v1"))


def test_importing_the_judge_imports_neither_torch_nor_openai():
    code = "import sys, vpt.evaluation.judge; print({'torch', 'openai'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
