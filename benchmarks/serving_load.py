"""A server under load: throughput and latency, or four times what it can take.

Run as ``python benchmarks/serving_load.py``. It starts ``vpt serve`` on free ports, and asks it
unique questions: own pictures, all perception modes, greedy and sampled. Every answer is compared
with the one that the model gave alone, in this process. Rounds of the server and of ``ask_many``
alternate, since other programs slow both down. CPU time is that of the process that answers; the
clients run in this process, and theirs is reported separately.

``--overload`` sends four times the measured rate for a minute: each request must be answered, or
refused with 429 or 503 and Retry-After. The report has the server's memory over time. ``--fuzz N``
sends N damaged requests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from reporting import announce, save
from serving_fuzz import fuzz

import vpt

EXAMPLES = Path(__file__).parents[1] / "examples"
MODES = ("auto", "none", "crop", "clip", "dino", "sam", "reencode")
OVERLOAD = 4
_FEW = 10  # wrong answers that are listed


@dataclasses.dataclass(frozen=True)
class Question:
    """One request; every third one samples, and then writes many words."""

    number: int
    picture: bytes
    text: str
    options: dict[str, Any]

    def body(self, model: str, *, stream: bool) -> bytes:
        """The body of a chat completion request."""
        url = f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.text},
        ]
        options = {**self.options, "max_tokens": self.options["max_new_tokens"]}
        del options["max_new_tokens"]
        messages = [{"role": "user", "content": parts}]
        return json.dumps(
            {"model": model, "messages": messages, "stream": stream, **options}
        ).encode()


def make_questions(number: int, seed: int, num_tokens: int, first: int = 0) -> list[Question]:
    """Questions about noisy copies of the example pictures, no two alike, numbered from first."""
    known = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
    rng, questions = np.random.default_rng(seed % 2**32), []
    for index in range(number):
        one = known[index % len(known)]
        pixels = np.asarray(Image.open(EXAMPLES / one["picture"]).convert("RGB"), np.int16)
        noisy = np.clip(pixels + rng.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "PNG", compress_level=1)
        mode = MODES[index // len(known) % len(MODES)]
        options = {"perception": mode, "max_new_tokens": num_tokens, "seed": index}
        options["temperature"] = 3.0 if index % 3 == 0 else 0.0
        questions.append(Question(first + index, file.getvalue(), one["question"], options))
    return questions


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a request: its status (0 for none), answer, and times in seconds."""

    question: Question
    status: int
    text: str | None = None
    first_s: float = 0.0
    total_s: float = 0.0
    may_retry: bool = False
    dropped: bool = False


class Server:
    """``vpt serve`` in a process of its own."""

    def __init__(self, words: Sequence[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vpt", "serve", "--port", str(port), *words]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        for _ in range(1200):
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    break
            time.sleep(0.1)
        self.model = httpx.get(f"{self.url}/v1/models").json()["data"][0]["id"]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    @property
    def memory_mb(self) -> float:
        """Resident memory, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+)", status)
        return int(found[1]) / 1024 if found else 0.0

    @property
    def cpu_s(self) -> float:
        """CPU time of the process so far, in seconds."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def gauge(self, name: str) -> float:
        """A value of ``/metrics``, over all labels."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(map(float, re.findall(rf"^vpt:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
        yield client


async def send(
    client: httpx.AsyncClient,
    server: Server,
    question: Question,
    body: bytes,
    *,
    stream: bool,
    drop: bool,
) -> Outcome:
    """Ask one question; with ``drop`` leave after the first token, or after a moment."""
    asked = _send(client, f"{server.url}/v1/chat/completions", question, body, stream, drop)
    try:
        return await (asyncio.wait_for(asked, 0.05) if drop and not stream else asked)
    except asyncio.TimeoutError:
        return Outcome(question, 200, dropped=True)
    except httpx.TransportError:
        return Outcome(question, 0)


async def _send(
    client: httpx.AsyncClient, url: str, question: Question, body: bytes, stream: bool, drop: bool
) -> Outcome:
    headers = {"content-type": "application/json"}
    begin, first, texts = time.perf_counter(), 0.0, []
    async with client.stream("POST", url, content=body, headers=headers) as response:
        if response.status_code != 200 or not stream:
            data = json.loads(await response.aread())
            return _whole(question, response, data, time.perf_counter() - begin)
        async for line in response.aiter_lines():
            chunk = json.loads(line[6:]) if line.startswith("data: {") else {"choices": []}
            if "error" in chunk:
                return Outcome(question, 500)
            delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
            if (delta.get("perception") or {}).get("calls"):
                texts.clear()  # the answer is the text after the last call
            texts.append(delta.get("content") or "")
            if not first and (texts[-1] or delta.get("perception")):
                first = time.perf_counter() - begin
                if drop:
                    return Outcome(question, 200, dropped=True)
    total = time.perf_counter() - begin
    return Outcome(question, 200, "".join(texts), first or total, total)


def _whole(question: Question, response: httpx.Response, data: Any, seconds: float) -> Outcome:
    status, may_retry = response.status_code, "retry-after" in response.headers
    if status != 200:
        return Outcome(question, status, total_s=seconds, may_retry=may_retry)
    text = data["choices"][0]["message"]["content"] or ""
    return Outcome(question, status, text, seconds, seconds)


async def load(
    server: Server, questions: Sequence[Question], num_clients: int, drop_share: float
) -> tuple[list[Outcome], float]:
    """Outcomes of ``num_clients`` clients that each ask one question after the other; seconds."""
    rng, outcomes = random.Random(0), list[Outcome]()
    bodies = [one.body(server.model, stream=one.number % 2 == 0) for one in questions]
    waiting = zip(questions, bodies, strict=True)

    async def ask_on(client: httpx.AsyncClient) -> None:
        for question, body in waiting:
            how = {"stream": question.number % 2 == 0, "drop": rng.random() < drop_share}
            outcomes.append(await send(client, server, question, body, **how))

    async with _client() as client:
        begin = time.perf_counter()
        await asyncio.gather(*(ask_on(client) for _ in range(num_clients)))
        return outcomes, time.perf_counter() - begin


async def overload(
    server: Server, questions: Sequence[Question], rate: float, seconds: float
) -> tuple[list[Outcome], list[float]]:
    """Outcomes of ``rate`` requests a second, however many are under way; memory over time."""
    outcomes: list[Outcome] = []
    memory: list[float] = []
    again, rng = itertools.cycle(questions), random.Random(0)

    async def one(client: httpx.AsyncClient, question: Question) -> None:
        how = {"stream": rng.random() < 0.5, "drop": rng.random() < 0.05}
        body = question.body(server.model, stream=how["stream"])
        outcomes.append(await send(client, server, question, body, **how))

    tasks: list[asyncio.Task[None]] = []
    async with _client() as client:
        begin = time.perf_counter()
        while (now := time.perf_counter() - begin) < seconds:
            while len(tasks) < now * rate:
                tasks.append(asyncio.create_task(one(client, next(again))))
            if len(memory) <= now:
                memory.append(server.memory_mb)
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
    return outcomes, memory


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a round of requests took: requests a second, and ms of CPU time per request."""

    requests_per_s: float
    cpu_ms: float
    client_cpu_ms: float = 0.0


class Local:
    """The model in this process, with ``size`` requests at once."""

    def __init__(self, args: argparse.Namespace, size: int) -> None:
        self.runtime = vpt.load(args.model, device=args.device, max_num_seqs=size)
        self._size = size

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.runtime.close()

    def ask(self, questions: Sequence[Question]) -> tuple[list[str], Cost]:
        """Answers of ``ask_many``, and their cost."""
        given = [{"images": q.picture, "question": q.text, **q.options} for q in questions]
        begin, cpu_s = time.perf_counter(), time.process_time()
        answers = self.runtime.ask_many(given, batch_size=self._size)
        seconds, number = time.perf_counter() - begin, len(questions)
        cost = Cost(number / seconds, (time.process_time() - cpu_s) / number * 1e3)
        return [answer.text.strip() for answer in answers], cost


def ask_server(
    server: Server, questions: Sequence[Question], num_clients: int, drop_share: float
) -> tuple[list[Outcome], Cost]:
    """Outcomes of clients, and their cost."""
    cpu_s, client_s = server.cpu_s, time.process_time()
    outcomes, seconds = asyncio.run(load(server, questions, num_clients, drop_share))
    settle(server)
    spent = server.cpu_s - cpu_s, time.process_time() - client_s
    number = len(questions)
    return outcomes, Cost(number / seconds, *(one / number * 1e3 for one in spent))


def kind_of(outcome: Outcome, expected: Sequence[str]) -> str:
    """What came of a request; ``wrong`` is another answer than the model's own."""
    if outcome.dropped:
        return "left"
    if outcome.status in (429, 503) and outcome.may_retry:
        return "refused"
    if outcome.status != 200 or outcome.text is None:
        return "lost"
    return "answered" if outcome.text.strip() == expected[outcome.question.number] else "wrong"


def check(outcomes: Sequence[Outcome], expected: Sequence[str]) -> dict[str, int]:
    """Numbers of outcomes by kind."""
    kinds: Counter[str] = Counter(answered=0, refused=0, wrong=0, lost=0)
    kinds.update(kind_of(one, expected) for one in outcomes)
    return dict(kinds)


def mistakes(outcomes: Sequence[Outcome], expected: Sequence[str]) -> list[dict[str, Any]]:
    """The first wrong answers, with their questions."""
    wrong = [one for one in outcomes if kind_of(one, expected) == "wrong"]
    return [
        {
            "question": one.question.text,
            "number": one.question.number,
            "options": one.question.options,
            "answer": one.text,
            "alone": expected[one.question.number],
        }
        for one in wrong[:_FEW]
    ]


def percentiles(seconds: Sequence[float]) -> str:
    """p50, p95 and p99 in milliseconds."""
    values = np.percentile(seconds, [50, 95, 99]) * 1e3 if seconds else [float("nan")] * 3
    return " / ".join(f"{value:.0f}" for value in values)


def settle(server: Server) -> None:
    """Wait until no request runs or waits; ``SystemExit`` if one stays."""
    for _ in range(200):
        if server.gauge("num_requests_running") == server.gauge("num_requests_waiting") == 0:
            return
        time.sleep(0.1)
    raise SystemExit("requests still hold slots after all clients have left")


def measure_load(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Throughput of clients one by one and together, beside ``ask_many`` in this process."""
    kinds = {
        "one client": (1, 0.0),
        f"{args.clients} clients": (args.clients, 0.0),
        f"{args.clients} clients, {args.drop:.0%} leave": (args.clients, args.drop),
    }
    costs: dict[str, list[Cost]] = defaultdict(list)
    seen: dict[str, list[Outcome]] = defaultdict(list)
    expected: list[str] = []
    with contextlib.ExitStack() as stack:
        alone, many = (stack.enter_context(Local(args, size)) for size in (1, args.num_seqs))
        servers = {kind: stack.enter_context(Server(words)) for kind in kinds}
        for number in range(-1, args.rounds):  # the first warms all of them
            questions = make_questions(
                args.requests, args.seed + number, args.tokens, len(expected)
            )
            answers, cost = alone.ask(questions)
            expected += answers
            costs["one by one, in process"].append(cost)
            together, cost = many.ask(questions)
            costs["ask_many, in process"].append(cost)
            if together != answers:
                raise SystemExit("ask_many gives other answers than ask")
            for kind, how in kinds.items():
                outcomes, cost = ask_server(servers[kind], questions, *how)
                costs[kind].append(cost)
                seen[kind] += outcomes
    return {
        "costs": {kind: describe(some[1:]) for kind, some in costs.items()},
        "server / ask_many": compare(costs, f"{args.clients} clients"),
        **{kind: summarise(some, expected, args.requests) for kind, some in seen.items()},
    }


def describe(costs: Sequence[Cost]) -> dict[str, str]:
    """Median and range of each cost over the rounds."""
    fields = [field.name for field in dataclasses.fields(Cost)]
    return {name: spread([getattr(one, name) for one in costs]) for name in fields}


def compare(costs: Mapping[str, Sequence[Cost]], kind: str) -> dict[str, str]:
    """Throughput, and answers per CPU second, relative to ``ask_many`` of the same round."""
    pairs = list(zip(costs[kind], costs["ask_many, in process"], strict=True))[1:]
    return {
        "requests_per_s": spread([one.requests_per_s / many.requests_per_s for one, many in pairs]),
        "requests per CPU second": spread([many.cpu_ms / one.cpu_ms for one, many in pairs]),
    }


def summarise(
    outcomes: Sequence[Outcome], expected: Sequence[str], num_warm: int
) -> dict[str, Any]:
    """Kinds of all outcomes, and latency of those after the first ``num_warm`` questions."""
    done = [one for one in outcomes if one.text is not None and one.question.number >= num_warm]
    streamed = [one.first_s for one in done if one.question.number % 2 == 0]
    return {
        "outcomes": check(outcomes, expected),
        "first token of a stream, ms (p50 / p95 / p99)": percentiles(streamed),
        "answer, ms (p50 / p95 / p99)": percentiles([one.total_s for one in done]),
    }


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def measure_overload(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Outcomes at four times the rate that the server can take."""
    questions = make_questions(args.requests, args.seed, args.tokens)
    with Local(args, 1) as alone:
        expected, _ = alone.ask(questions)
    with Server([*words, "--max-queue", str(args.queue)]) as server:
        _, seconds = asyncio.run(load(server, questions, args.num_seqs, 0.0))
        rate = len(questions) / seconds
        cpu_s, client_s = server.cpu_s, time.process_time()
        sent = asyncio.run(overload(server, questions, OVERLOAD * rate, args.seconds))
        settle(server)
        spent = server.cpu_s - cpu_s, time.process_time() - client_s
        outcomes, memory = sent
        again, _ = asyncio.run(load(server, questions[:20], 4, 0.0))
    return {
        "capacity, requests per s": rate,
        "sent": len(outcomes),
        "outcomes": check(outcomes, expected),
        "wrong": mistakes(outcomes, expected),
        "CPU time, s: server, clients": [round(one, 1) for one in spent],
        "statuses": dict(Counter(one.status for one in outcomes)),
        "memory, MB, at tenths of the time": memory_over_time(memory),
        "afterwards": check(again, expected),
    }


def memory_over_time(memory: Sequence[float]) -> list[int]:
    """Eleven values, from the start to the end."""
    return [
        round(memory[index]) for index in np.linspace(0, len(memory) - 1, 11).round().astype(int)
    ]


def measure_fuzz(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Statuses of damaged requests; an answer that must not be raises ``AssertionError``."""
    with Server(words) as server:
        statuses = fuzz(server.url, server.model, args.fuzz, args.seed)
        settle(server)
        return {"statuses": statuses}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or id; by default the shipped model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=112, help="unique questions of a round")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--tokens", type=int, default=24, help="written at most per answer")
    parser.add_argument("--num-seqs", type=int, default=16, help="requests that run at once")
    parser.add_argument("--queue", type=int, default=32, help="waiting requests of --overload")
    parser.add_argument("--drop", type=float, default=0.1, help="share of clients that leave")
    parser.add_argument("--overload", action="store_true")
    parser.add_argument("--seconds", type=float, default=60, help="of --overload")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    report = announce(args)
    words = ["--device", args.device, "--max-num-seqs", str(args.num_seqs)]
    words += ["--model", args.model] if args.model else []
    measure = measure_fuzz if args.fuzz else measure_overload if args.overload else measure_load
    report["results"] = measure(args, words)
    print(json.dumps(report["results"], indent=1))
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
