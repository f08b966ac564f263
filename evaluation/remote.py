"""A model behind an OpenAI-compatible server of this package, asked with the ``openai`` package."""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from vpt.errors import PromptError, ServiceError
from vpt.evaluation.judge_protocol import is_loopback
from vpt.evaluation.provenance import describe_code
from vpt.evaluation.records import Record
from vpt.evaluation.runner import (
    Condition,
    Decoding,
    Task,
    Work,
    by_sample,
    check_conditions,
    failed_record,
    failed_run,
    finished_record,
    options_of,
)
from vpt.evaluation.samples import BadRow, ImageRef, Sample
from vpt.images import LoadedImage
from vpt.protocol.tokens import RELEASED_GRID_SIZE
from vpt.trace.records import CallRecord, Counts, ImageRecord, Timings, Trace

KEY_VARIABLE = "VPT_API_KEY"

_MAX_RETRIES = 8  # with a growing delay: a server that is full says so with 429 or 503
_OWN_FIELDS = ("temperature", "top_p", "seed")  # of the OpenAI API; others go into the extra body


class RemoteAsker:
    """An :class:`vpt.evaluation.evaluate.Asker` over a server: ``vpt serve``.

    Records contain what the server sends: answer, calls, counts and times, without the token
    stream, score maps, and depth maps and boxes that the model wrote.

    Args:
        url: of the API, such as ``http://127.0.0.1:8000/v1``; ``/v1`` may be left out. The key
            is read from ``VPT_API_KEY``.

    Raises:
        PromptError: if the ``openai`` package is missing.
    """

    def __init__(self, url: str) -> None:
        try:
            import openai
        except ImportError as exc:
            raise PromptError(
                f'a server is asked with the openai package ({exc}): pip install -e ".[eval]"'
            ) from exc
        self._openai = openai
        parts = urlsplit(url)
        self._url = url if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
        self._is_loopback = is_loopback(parts.hostname or "")
        self._card: Mapping[str, Any] | None = None

    def _connect(self) -> Any:
        # A proxy cannot reach our own machine's loopback.
        http = self._openai.DefaultHttpxClient(trust_env=not self._is_loopback)
        key = os.environ.get(KEY_VARIABLE) or "none"
        return self._openai.OpenAI(
            base_url=self._url, api_key=key, max_retries=_MAX_RETRIES, http_client=http
        )

    @property
    def card(self) -> Mapping[str, Any]:
        """The server's entry of its model."""
        if self._card is None:
            try:
                with self._connect() as client:
                    self._card = client.models.list().data[0].model_dump()
            except (self._openai.OpenAIError, IndexError, TypeError, ValueError) as exc:
                raise self._lost(exc) from exc
        return self._card

    def describe(self) -> Mapping[str, Any]:
        """See :class:`vpt.evaluation.evaluate.Asker`."""
        model = {"name": self.card["id"], "server": self._url}
        return {"model": model, "surroundings": describe_code(sys.argv)}

    def check(self, conditions: Sequence[Condition]) -> None:
        """See :class:`vpt.evaluation.evaluate.Asker`."""
        if (branches := self.card.get("branches")) is not None:
            check_conditions(conditions, branches)

    def ask(self, work: Sequence[Work], decoding: Decoding, batch_size: int) -> Iterator[Record]:
        """See :class:`vpt.evaluation.evaluate.Asker`; ``batch_size`` requests at once.

        Raises:
            ServiceError: if the server is down, stays full, or refuses the key or the model.
        """
        jobs = ((task, sample, decoding) for task, sample in by_sample(work))
        with self._connect() as client, ThreadPoolExecutor(batch_size) as pool:
            ask_one = partial(self._ask_one, client)
            running = {pool.submit(ask_one, *job) for job in islice(jobs, batch_size)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    if (record := future.result()) is not None:
                        yield record
                running |= {pool.submit(ask_one, *job) for job in islice(jobs, len(done))}

    def _ask_one(
        self, client: Any, task: Task, sample: Sample | BadRow, decoding: Decoding
    ) -> Record | None:
        """The record of a sample; ``None`` if the condition does not fit it."""
        if isinstance(sample, BadRow):
            return failed_record(task, sample, "row", sample.problem)
        try:
            images = [image.open() for image in sample.images]
            grid_size = self.card.get("grid_size", RELEASED_GRID_SIZE)
            if (options := options_of(task, sample, images, decoding, grid_size)) is None:
                return None
            trace = self._run(client, task.prompt(sample), sample.images, images, options)
        except self._openai.APIStatusError as exc:
            if exc.status_code not in (400, 413, 422, 500):
                raise self._lost(exc) from exc
            return failed_run(task, sample, ServiceError(f"the server's answer: {_message(exc)}"))
        except self._openai.OpenAIError as exc:
            raise self._lost(exc) from exc
        except Exception as exc:
            return failed_run(task, sample, exc)
        return finished_record(task, sample, trace)

    def _run(
        self,
        client: Any,
        question: str,
        refs: Sequence[ImageRef],
        images: Sequence[LoadedImage],
        options: Mapping[str, Any],
    ) -> Trace:
        parts = [
            {"type": "image_url", "image_url": {"url": _data_uri(ref, image)}}
            for ref, image in zip(refs, images, strict=True)
        ]
        rest = {k: v for k, v in options.items() if k not in (*_OWN_FIELDS, "max_new_tokens")}
        if (region := rest.pop("region", None)) is not None:
            rest["region"] = [region.x_min, region.y_min, region.x_max, region.y_max]
        started = time.perf_counter()
        completion = client.chat.completions.create(
            model=self.card["id"],
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            max_completion_tokens=options["max_new_tokens"],
            **{name: options[name] for name in _OWN_FIELDS},
            extra_body=rest,
        )
        ms = (time.perf_counter() - started) * 1e3
        return _trace_of(completion.model_dump(), question, images, options, ms)

    def _lost(self, exc: Exception) -> ServiceError:
        return ServiceError(
            f"no answer from the server at {self._url}: {_message(exc)}; check the address, that "
            f"it runs (`vpt serve`), and the key in {KEY_VARIABLE}, then repeat the command: it "
            "resumes the run"
        )


def _trace_of(
    completion: Mapping[str, Any],
    question: str,
    images: Sequence[LoadedImage],
    options: Mapping[str, Any],
    ms: float,
) -> Trace:
    """The trace, as far as a chat completion contains it."""
    choice, usage = completion["choices"][0], completion["usage"]
    settings = {name: value for name, value in options.items() if name != "region"}
    trace = Trace(question, settings.pop("perception"), settings=settings)
    for image in images:
        trace.add_image(image)
    for turn, call in enumerate((choice["message"].get("perception") or {}).get("calls", ())):
        add_call(trace, turn, call)
    trace.answer = (choice["message"]["content"] or "").strip()
    trace.stop_reason = choice.get("stop_reason") or choice["finish_reason"]
    trace.counts = Counts(
        prompt_tokens=usage["prompt_tokens"],
        appended_tokens=sum(call.num_tokens for call in trace.calls),
        generated_tokens=usage["completion_tokens"],
        llm_tokens=usage["total_tokens"],
    )
    trace.timings = Timings(total=ms)
    return trace


def add_call(trace: Trace, turn: int, call: Mapping[str, Any]) -> None:
    """Add a call to a trace, as far as the server sends it."""
    outcome = call.get("outcome") or "executed"
    record = CallRecord(call["branch"], "", turn, call["image"], outcome)
    record.num_tokens, record.run_ms = call.get("tokens") or 0, call.get("ms") or 0.0
    record.region = call.get("region") and tuple(call["region"])
    record.phrase = call.get("phrase")
    if outcome == "executed" and (box := call.get("box_xyxy_px")):
        x0, y0, x1, y1 = record.box_xyxy_px = tuple(box)
        record.result_image = len(trace.images)
        trace.images.append(
            ImageRecord("", (x1 - x0, y1 - y0), "", call["image"], record.box_xyxy_px)
        )
    trace.calls.append(record)


def _data_uri(ref: ImageRef, image: LoadedImage) -> str:
    """The image of a sample: the bytes of its file, or where only a part counts a PNG of that."""
    data = ref.read_bytes() if ref.crop is None else _png(image)
    return f"data:image/*;base64,{base64.b64encode(data).decode()}"


def _png(image: LoadedImage) -> bytes:
    file = io.BytesIO()
    image.pixels.save(file, "PNG")
    return file.getvalue()


def _message(exc: Exception) -> str:
    """The server's own words if it sent any; they contain no key."""
    body = getattr(exc, "body", None)
    said = body.get("message") if isinstance(body, Mapping) else None
    return str(said or exc)[:500]
