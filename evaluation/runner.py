"""Asks the samples of a split under a condition, and gives a record of each as it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

from vpt.errors import DataError, ImageError, as_vpt_error
from vpt.evaluation.conditions import Condition
from vpt.evaluation.records import Record
from vpt.evaluation.samples import BadRow, Sample
from vpt.evaluation.scores.map_support import Decode, map_supports_answer
from vpt.evaluation.scores.region_hit import best_iou, is_shown
from vpt.evaluation.scores.table import Score
from vpt.inference.conversation import ErrorEvent, Request, StopEvent
from vpt.inference.sampling import Sampling
from vpt.trace.records import Trace

if TYPE_CHECKING:
    from vpt.runtime import Runtime


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen; a change of it is another run.

    Attributes:
        max_new_tokens: per answer, calls included; ``None`` for what the split says.
        max_calls: perception calls at most.
        constrain: whether the grammar forbids malformed calls.
        temperature: 0 for greedy.
        top_p: share of probability to choose from.
        top_k: tokens to choose from, 0 for all.
        seed: of the choice, if it is one, and of random crops.

    Raises:
        PromptError: naming the attribute that has another type or is out of bounds.
    """

    max_new_tokens: int | None = None
    max_calls: int = 4
    constrain: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        request = Request(
            [],
            "",
            max_calls=self.max_calls,
            max_new_tokens=1 if self.max_new_tokens is None else self.max_new_tokens,
            constrain=self.constrain,
            sampling=Sampling(self.temperature, self.top_k, self.top_p, self.seed),
        )
        stored = {**vars(request), **vars(request.sampling)}  # numbers of numpy's are Python's
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                object.__setattr__(self, field.name, stored[field.name])


@dataclass(frozen=True)
class Task:
    """A split under a condition.

    Attributes:
        split: name.
        condition: how to ask.
        prompt: sample -> what is put to the model.
        score: of the answers.
        max_new_tokens: per answer.
    """

    split: str
    condition: Condition
    prompt: Callable[[Sample], str]
    score: Score
    max_new_tokens: int


@dataclass(frozen=True)
class Work:
    """Samples that a task still has to ask.

    Attributes:
        task: how to ask them.
        samples: of its split.
    """

    task: Task
    samples: tuple[Sample | BadRow, ...]


def run_task(
    runtime: Runtime,
    task: Task,
    samples: Iterable[Sample | BadRow],
    decoding: Decoding,
    batch_size: int = 8,
) -> Iterator[Record]:
    """Ask samples; their records come in the order in which they end.

    A sample that cannot be asked under the condition (no evidence for ``truth``) has no record.
    Rows and images that cannot be used, and runs that fail, have one with an error.

    Args:
        runtime: of the model.
        task: what is asked, and how it is scored.
        samples: taken up as room is made for them.
        decoding: how answers are chosen.
        batch_size: samples at once.
    """
    yield from _Batch(runtime, task, decoding).run(samples, batch_size)


class _Batch:
    """Samples that are asked together."""

    def __init__(self, runtime: Runtime, task: Task, decoding: Decoding) -> None:
        self.runtime = runtime
        self.task = task
        self.decoding = decoding
        tokenizer = runtime.depth_tokenizer
        self.decode = None if tokenizer is None else tokenizer.decode
        self.asked: list[Sample] = []
        self.spoilt: list[Record] = []

    def run(self, samples: Iterable[Sample | BadRow], batch_size: int) -> Iterator[Record]:
        for index, event in self.runtime.stream_many(self._requests(samples), batch_size):
            yield from self._take_spoilt()
            if isinstance(event, StopEvent):
                yield finished_record(self.task, self.asked[index], event.trace, self.decode)
            elif isinstance(event, ErrorEvent):
                yield _failed_run(self.task, self.asked[index], event.error)
        yield from self._take_spoilt()

    def _take_spoilt(self) -> Iterator[Record]:
        spoilt, self.spoilt = self.spoilt, []
        yield from spoilt

    def _requests(self, samples: Iterable[Sample | BadRow]) -> Iterator[Request]:
        for sample in samples:
            if isinstance(sample, BadRow):
                self.spoilt.append(failed_record(self.task, sample, "row", sample.problem))
                continue
            try:
                request = self._request(sample)
            except Exception as exc:
                self.spoilt.append(_failed_run(self.task, sample, exc))
            else:
                if request is not None:
                    self.asked.append(sample)
                    yield request

    def _request(self, sample: Sample) -> Request | None:
        images = [image.open() for image in sample.images]
        size_wh = images[0].size_wh if images else (0, 0)
        grid_size = self.runtime.vocabulary.grid_size
        condition = self.task.condition.request_options(sample, size_wh, grid_size)
        if condition is None:
            return None
        decoding = self.decoding
        return self.runtime.request(
            images,
            self.task.prompt(sample),
            max_new_tokens=decoding.max_new_tokens or self.task.max_new_tokens,
            max_calls=decoding.max_calls,
            constrain=decoding.constrain,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            seed=crc32(f"{decoding.seed} {sample.id}".encode()),
            **condition,
        )


def finished_record(
    task: Task, sample: Sample, trace: Trace, decode: Decode | None = None
) -> Record:
    """The record of a sample that was answered, scored; an error if it cannot be scored.

    Args:
        task: it belongs to.
        sample: that was asked.
        trace: of the run.
        decode: of the model's depth tokenizer, to see whether its depth maps say what it answers.
    """
    boxes = [call.box_xyxy_px for call in trace.calls if call.box_xyxy_px is not None]
    regions = {}
    try:
        if sample.box is not None and boxes:
            regions["region_shown"] = float(is_shown(boxes, sample.box))
            regions["region_iou"] = best_iou(boxes, sample.box)
        per_sample = task.score.per_sample(trace.answer, sample)
        scores = {name: float(value) for name, value in per_sample.items()}
        if (support := map_supports_answer(trace, sample, decode)) is not None:
            scores["map_supports_answer"] = support
    except DataError as exc:
        return failed_record(task, sample, "row", str(exc))
    except Exception as exc:
        return _failed_run(task, sample, exc)
    return Record(
        **_of_sample(task, sample),
        question=trace.question,
        prediction=trace.answer,
        scores={**scores, **regions},
        trace=trace.to_dict(),
    )


def _failed_run(task: Task, sample: Sample, exc: Exception) -> Record:
    kind = "image" if isinstance(exc, ImageError) else "run"
    return failed_record(task, sample, kind, str(as_vpt_error(exc)))


def failed_record(task: Task, sample: Sample | BadRow, kind: str, message: str) -> Record:
    """The record of a sample that has no answer.

    Args:
        task: it belongs to.
        sample: or the row of which none could be made.
        kind: one of :data:`vpt.evaluation.records.ERRORS`.
        message: what is wrong.
    """
    error = {"kind": kind, "message": message}
    if isinstance(sample, BadRow):
        return Record(task.split, task.condition.name, sample.id, question="", error=error)
    return Record(**_of_sample(task, sample), question=sample.question, error=error)


def _of_sample(task: Task, sample: Sample) -> dict[str, Any]:
    return {
        "split": task.split,
        "condition": task.condition.name,
        "id": sample.id,
        "answers": sample.answers,
        "group": sample.group,
        "box": sample.box,
        "images": tuple(image.name for image in sample.images),
    }
