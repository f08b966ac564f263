"""A judge model scores free-form answers from 0 to 1, or reports why one has no score."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vpt.errors import DataError, PromptError, ServiceError
from vpt.evaluation.judge_protocol import PROMPT, PROMPT_HASH, JudgeSettings, read_score
from vpt.evaluation.records import LineFile, Record, read_lines

if TYPE_CHECKING:
    from vpt.evaluation.judge_client import Failure, JudgeClient

SCORE = "judge"
"""Name of the judge's score in a record."""

MAX_FAILURES_IN_A_ROW = 8
"""Consecutive failed calls, each with all its retries, that end a run."""


class JudgeError(ServiceError):
    """The judge cannot do its work at all: it is down, or refuses the key or the model."""


@dataclass(frozen=True)
class JudgeItem:
    """An answer to be scored: what fills the fields of ``PROMPT``."""

    question: str
    reference: str
    prediction: str


@dataclass(frozen=True)
class Judgement:
    """The judge's verdict: a score from 0 to 1, or ``None``, which is not 0, and the reason."""

    score: float | None
    reason: str = ""
    reply: str = ""
    from_cache: bool = False


class ReplyCache:
    """A file of replies, one JSON line each, so that nothing is asked twice; ``None`` for no file.

    Raises:
        DataError: if the file cannot be read, or a whole line of it is not a reply.
    """

    def __init__(self, path: Path | None) -> None:
        self._replies: dict[str, str] = {}
        self._lines = None if path is None else LineFile(path)
        for number, line in enumerate(read_lines(path) if path else (), 1):
            self._read(line, f"{path}, line {number}")

    def get(self, key: str) -> str | None:
        """The reply under a key, or ``None``."""
        return self._replies.get(key)

    def put(self, key: str, reply: str, **about: str) -> None:
        """Store a reply; it is on disk when this returns. ``about`` is for a human reader only."""
        self._replies[key] = reply
        if self._lines is not None:
            self._lines.append(json.dumps({"key": key, **about, "reply": reply}) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _read(self, line: str, place: str) -> None:
        try:
            content = json.loads(line)
            key, reply = content["key"], content["reply"]
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise DataError(
                f"{place} is not a judge's reply ({type(exc).__name__}: {exc}); delete the line to "
                "have the judge asked again"
            ) from exc
        if not isinstance(key, str) or not isinstance(reply, str):
            raise DataError(f"{place}: key and reply must be strings; delete the line")
        self._replies[key] = reply


async def judge_all(
    items: Sequence[JudgeItem],
    settings: JudgeSettings,
    cache_file: Path | None = None,
    on_done: Callable[[int, Judgement], None] | None = None,
) -> list[Judgement]:
    """Score answers by a judge.

    Equal items are asked once. Each reply is stored in the cache file as it comes, also one without
    a readable score: at temperature 0 asking again gives the same. So a second run makes no call,
    and needs no key, except for the calls that failed. ``on_done`` is called with an index in
    ``items`` and its judgement, as each one comes.

    Raises:
        PromptError: if the ``openai`` package or the key is missing.
        JudgeError: if the judge refuses the key or the model, or is down.
        DataError: if the cache file is damaged.
    """
    places: dict[str, list[int]] = {}  # message -> where it is in items
    for index, item in enumerate(items):
        places.setdefault(PROMPT.format(**vars(item)), []).append(index)
    judgements: dict[int, Judgement] = {}

    def settle(message: str, judgement: Judgement) -> None:
        for index in places[message]:
            judgements[index] = judgement
            if on_done is not None:
                on_done(index, judgement)

    with closing(ReplyCache(cache_file)) as cache:
        to_ask = []
        for message in places:
            reply = cache.get(_request_key(settings, message))
            if reply is None:
                to_ask.append(message)
            else:
                settle(message, _judge(reply, from_cache=True))
        if to_ask:
            await _ask_all(to_ask, settings, cache, settle)
    return [judgements[index] for index in range(len(items))]


def summary(judgements: Sequence[Judgement], settings: JudgeSettings) -> dict[str, Any]:
    """Numbers of the scored answers and settings, without the key, for ``results.json``."""
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    recorded = ("model", "base_url", "temperature", "max_tokens")
    return {
        "mean": math.fsum(scores) / len(scores) if scores else None,
        "n": len(scores),
        "unscored": len(judgements) - len(scores),
        "from_cache": sum(judgement.from_cache for judgement in judgements),
        **{name: getattr(settings, name) for name in recorded},
        "prompt": PROMPT,
        "prompt_hash": PROMPT_HASH,
    }


async def _ask_all(
    messages: Sequence[str],
    settings: JudgeSettings,
    cache: ReplyCache,
    settle: Callable[[str, Judgement], None],
) -> None:
    """Ask with as many workers as there may be concurrent calls; they share one iterator."""
    waiting = iter(messages)
    num_failures = 0  # in a row

    async def work(client: JudgeClient) -> None:
        nonlocal num_failures
        for message in waiting:
            reply = await client.ask(message)
            if isinstance(reply, str):
                num_failures = 0
                key = _request_key(settings, message)
                about = {"base_url": settings.base_url, "model": settings.model}
                cache.put(key, reply, **about, message=message)
                settle(message, _judge(reply, from_cache=False))
            else:
                num_failures += 1
                settle(message, Judgement(None, reply.reason))
                _check_hope(reply, num_failures, len(messages), settings)

    async with _connect(settings) as client:
        num_workers = min(settings.max_concurrency, len(messages))
        workers = [asyncio.create_task(work(client)) for _ in range(num_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def _check_hope(
    failure: Failure, num_failures: int, num_messages: int, settings: JudgeSettings
) -> None:
    """Raise a JudgeError if further calls would only fail again."""
    in_a_row = f"{num_failures} calls in a row failed, the last by: {failure.reason}."
    if failure.is_final:
        problem = (
            f"{failure.reason}. Check model, base_url (it mostly ends in /v1) and "
            f"{settings.key_variable}."
        )
    elif failure.is_unreachable and num_failures >= min(MAX_FAILURES_IN_A_ROW, num_messages):
        problem = (
            f"it cannot be reached; {in_a_row} Check that the server runs, that base_url is "
            "right, and the proxy variables."
        )
    elif num_failures >= MAX_FAILURES_IN_A_ROW:
        problem = in_a_row
    else:
        return
    raise JudgeError(
        f"judge at {settings.base_url}: {problem} Replies that came are in the cache file, if you "
        "gave one: run again to resume."
    )


def _connect(settings: JudgeSettings) -> JudgeClient:
    try:
        from vpt.evaluation.judge_client import JudgeClient  # openai is optional and slow to import
    except ImportError as exc:
        words = f'a judge needs the openai package ({exc}): pip install -e ".[eval]"'
        raise PromptError(words) from exc
    return JudgeClient(settings, _read_key(settings))


def _read_key(settings: JudgeSettings) -> str:
    key = os.environ.get(settings.key_variable, "").strip()
    if not key and settings.is_loopback:
        return "no-key"
    if not key:
        raise PromptError(
            f"no key: set the environment variable {settings.key_variable} (to any word if "
            f"{settings.base_url} asks for none)"
        )
    if not (key.isascii() and key.isprintable()):
        raise PromptError(f"{settings.key_variable} must be printable ASCII to go into a header")
    return key


def _request_key(settings: JudgeSettings, message: str) -> str:
    """Hash of all that a reply depends on; the message holds the prompt and the item."""
    how = (float(settings.temperature), settings.max_tokens)
    request = [settings.base_url.rstrip("/"), settings.model, message, *how]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def _judge(reply: str, *, from_cache: bool) -> Judgement:
    try:
        return Judgement(read_score(reply), reply=reply, from_cache=from_cache)
    except ValueError as exc:
        return Judgement(None, str(exc), reply, from_cache)


def judge_records(
    records: Sequence[Record], settings: JudgeSettings, cache_file: Path
) -> tuple[list[Record], dict[str, Any], list[dict[str, str]]]:
    """Score the answers of a run by a judge; raises as :func:`judge_all`.

    Returns:
        The records, with :data:`SCORE` among their scores if the judge scored them; the entries
        ``judge`` (:func:`summary`, and reason for no score -> number) and ``unscored`` of
        ``results.json``.
    """
    places = [i for i, record in enumerate(records) if record.error is None and record.answers]
    judgeable = [records[i] for i in places]
    items = [JudgeItem(one.question, one.answers[0], one.prediction) for one in judgeable]
    with tqdm(total=len(items), desc="judge", disable=not sys.stderr.isatty()) as bar:
        judged = asyncio.run(judge_all(items, settings, cache_file, lambda *_: bar.update()))
    unscored = []
    scored = list(records)
    for place, judgement in zip(places, judged, strict=True):
        if judgement.score is None:
            names = dict(zip(("split", "condition", "id"), records[place].key, strict=True))
            unscored.append({**names, "reason": judgement.reason})
            continue
        scores = {**records[place].scores, SCORE: judgement.score}
        scored[place] = dataclasses.replace(records[place], scores=scores)
    reasons = Counter(one["reason"] for one in unscored)
    return scored, {**summary(judged, settings), "reasons": dict(reasons)}, unscored
