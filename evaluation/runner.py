"""Ask the samples of a split under a condition; yield a record of each as it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

from vpt.boxes import region_to_show
from vpt.errors import DataError, ImageError, PromptError, RegionError, as_vpt_error
from vpt.evaluation.records import Record
from vpt.evaluation.samples import BadRow, ImageRef, Sample
from vpt.evaluation.scores.regions import Decode, best_iou, is_shown, map_supports_answer
from vpt.evaluation.scores.table import Score
from vpt.inference.content import REPLACED_CONTENT
from vpt.inference.events import ErrorEvent, StopEvent
from vpt.inference.request import Request, Sampling, check_options
from vpt.protocol.tokens import PERCEPTION_MODES, branches_of_mode, canonical_mode
from vpt.trace.records import Trace

if TYPE_CHECKING:
    from vpt.images import LoadedImage
    from vpt.runtime import Runtime


@dataclass(frozen=True)
class Condition:
    """Condition under which every sample of a split is asked.

    Attributes:
        options: of :class:`vpt.inference.request.Request`.
        true_region: whether the first call is the region around the sample's evidence.
        phrase: whether the first call is where a detector finds the sample's phrase, ``look_for``.
        true_content: whether the sample's true ``content`` is read in place of the written one.
        other_content: whether that of another sample is, see :func:`contents_of_others`.
    """

    name: str
    options: Mapping[str, Any]
    true_region: bool = False
    phrase: bool = False
    true_content: bool = False
    other_content: bool = False

    @property
    def finders(self) -> set[str]:
        """Which of ``detector`` and ``segmenter`` it needs."""
        needed = {"detector": self.phrase, "segmenter": self.options.get("mask", False)}
        return {name for name, is_needed in needed.items() if is_needed}

    def request_options(
        self,
        sample: Sample,
        size_wh: tuple[int, int],
        grid_size: int,
        content_of_other: str | None = None,
    ) -> dict[str, Any] | None:
        """Options for one sample, or ``None`` if it cannot be asked so; the size is in pixels."""
        for is_needed, option, value in (
            (self.phrase, "look_for", sample.facts.get("look_for")),
            (self.true_content, "replace_content", sample.facts.get("content")),
            (self.other_content, "replace_content", content_of_other),
        ):
            if is_needed:
                return None if value is None else {**self.options, option: value}
        if not self.true_region:
            return dict(self.options)
        if sample.box is None:
            return None
        with suppress(RegionError):
            region = region_to_show(sample.box, size_wh, grid_size=grid_size)
            return {**self.options, "region": region}
        return None


_CONTROLS = (
    # the model's own calls, which return a gray picture or a crop of a random place
    Condition("blank", {"perception": "auto", "replace_looks": "blank"}),
    Condition("random", {"perception": "auto", "replace_looks": "random"}),
    # the first call is the region of the evidence
    Condition("truth", {"perception": "auto"}, true_region=True),
    # the first call is where a detector finds the phrase of the row
    Condition("phrase", {"perception": "auto"}, phrase=True),
    # the model's own calls, whose crops a segmenter narrows to an object
    Condition("mask", {"perception": "auto", "mask": True}),
    # the model reads this in place of the depth maps and boxes that it writes
    *(
        Condition(f"content-{how}", {"perception": "auto", "replace_content": how})
        for how in REPLACED_CONTENT
    ),
    Condition("content-truth", {"perception": "auto"}, true_content=True),
    Condition("content-other", {"perception": "auto"}, other_content=True),
)
TOOL_VALUE = ("none", "auto", "blank", "random", "truth")
"""Conditions that together measure whether looking again helps."""

_KEPT_IMAGES = 8  # that stay open for the next condition of their sample


def find_conditions(names: Sequence[str]) -> list[Condition]:
    """Look conditions up by their names, each once; ``PromptError`` if one is unknown, or none."""
    known = {mode: Condition(mode, {"perception": mode}) for mode in PERCEPTION_MODES}
    known |= {control.name: control for control in _CONTROLS}
    if not names:
        raise PromptError(f"name at least one perception; available: {', '.join(known)}")
    for name in names:
        if canonical_mode(name) not in known:
            raise PromptError(f"unknown perception {name!r}; available: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(map(canonical_mode, names))]


@dataclass(frozen=True)
class Decoding:
    """Decoding settings, checked as in a ``Request``; another value is another run.

    Attributes:
        max_new_tokens: per answer, calls included; ``None`` for what the split says.
        seed: of sampling and of random crops.
    """

    max_new_tokens: int | None = None
    max_calls: int = Request.max_calls
    constrain: bool = Request.constrain
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    top_k: int = Sampling.top_k
    seed: int = Sampling.seed

    def __post_init__(self) -> None:
        check_options(self, optional=("max_new_tokens",))


@dataclass(frozen=True)
class Task:
    """A split (its name) under a condition.

    Attributes:
        prompt: makes the text put to the model.
        others: see :func:`contents_of_others`.
    """

    split: str
    condition: Condition
    prompt: Callable[[Sample], str]
    score: Score
    max_new_tokens: int
    others: Mapping[str, str] = field(default_factory=dict)


def contents_of_others(samples: Iterable[Sample | BadRow]) -> dict[str, str]:
    """Id of each sample with a ``content`` -> that of one about another picture, if there is one.

    It is the sample half the list away, or the next one after it.
    """
    known = [s for s in samples if isinstance(s, Sample) and s.facts.get("content")]
    others = {}
    for index, sample in enumerate(known):
        middle = index + len(known) // 2
        for number in range(middle, middle + len(known)):
            other = known[number % len(known)]
            if other.images != sample.images:
                others[sample.id] = str(other.facts["content"])
                break
    return others


@dataclass(frozen=True)
class Work:
    """A task, and the samples of its split that are still to be asked."""

    task: Task
    samples: tuple[Sample | BadRow, ...]


def by_sample(work: Iterable[Work]) -> list[tuple[Task, Sample | BadRow]]:
    """All tasks of a sample, then those of the next: they share the prompt, which is read once."""
    groups: dict[tuple[str, str], list[tuple[Task, Sample | BadRow]]] = {}
    for one in work:
        for sample in one.samples:
            groups.setdefault((one.task.split, sample.id), []).append((one.task, sample))
    return [pair for group in groups.values() for pair in group]


def run_tasks(
    runtime: Runtime,
    pairs: Iterable[tuple[Task, Sample | BadRow]],
    decoding: Decoding,
    batch_size: int = 8,
) -> Iterator[Record]:
    """Ask samples, each for a task; yield their records in the order in which they end.

    A sample that cannot be asked under the condition (no evidence for ``truth``) has no record.
    Rows and images that cannot be used, and runs that fail, have one with an error. ``pairs`` is
    iterated as slots of the batch become free.
    """
    asked: list[tuple[Task, Sample]] = []
    failed: list[Record] = []
    opened = lru_cache(maxsize=_KEPT_IMAGES)(ImageRef.open)
    decode = None if runtime.depth_tokenizer is None else runtime.depth_tokenizer.decode

    def requests() -> Iterator[Request]:
        for task, sample in pairs:
            if isinstance(sample, BadRow):
                failed.append(failed_record(task, sample, "row", sample.problem))
                continue
            try:
                images = [opened(image) for image in sample.images]
                request = _request(runtime, task, sample, images, decoding)
            except Exception as exc:
                failed.append(failed_run(task, sample, exc))
            else:
                if request is not None:
                    asked.append((task, sample))
                    yield request

    for index, event in runtime.stream_many(requests(), batch_size):
        while failed:
            yield failed.pop(0)
        if isinstance(event, StopEvent):
            yield finished_record(*asked[index], event.trace, decode)
        elif isinstance(event, ErrorEvent):
            yield failed_run(*asked[index], event.error)
    yield from failed


def _request(
    runtime: Runtime,
    task: Task,
    sample: Sample,
    images: Sequence[LoadedImage],
    decoding: Decoding,
) -> Request | None:
    options = options_of(task, sample, images, decoding, runtime.vocabulary.grid_size)
    return None if options is None else runtime.request(images, task.prompt(sample), **options)


def options_of(
    task: Task,
    sample: Sample,
    images: Sequence[LoadedImage],
    decoding: Decoding,
    grid_size: int,
) -> dict[str, Any] | None:
    """Options of the request for a sample; ``None`` if the condition does not fit it."""
    size_wh = images[0].size_wh if images else (0, 0)
    other = task.others.get(sample.id)
    condition = task.condition.request_options(sample, size_wh, grid_size, other)
    if condition is None:
        return None
    return {
        **dataclasses.asdict(decoding),
        "max_new_tokens": decoding.max_new_tokens or task.max_new_tokens,
        "seed": crc32(f"{decoding.seed} {sample.id}".encode()),
        **condition,
    }


def finished_record(
    task: Task, sample: Sample, trace: Trace, decode: Decode | None = None
) -> Record:
    """The record of an answered sample, scored; one with an error if it cannot be scored."""
    boxes = [call.box_xyxy_px for call in trace.calls if call.box_xyxy_px is not None]
    regions = {}
    try:
        is_blank = trace.settings.get("replace_looks") == "blank"  # its crops show nothing
        if sample.box is not None and boxes and not is_blank:
            regions["region_shown"] = float(is_shown(boxes, sample.box))
            regions["region_iou"] = best_iou(boxes, sample.box)
        per_sample = task.score.per_sample(trace.answer, sample)
        scores = {name: float(value) for name, value in per_sample.items()}
        if (support := map_supports_answer(trace, sample, decode)) is not None:
            scores["map_supports_answer"] = support
    except DataError as exc:
        return failed_record(task, sample, "row", str(exc))
    except Exception as exc:
        return failed_run(task, sample, exc)
    return Record(
        **_of_sample(task, sample),
        question=trace.question,
        prediction=trace.answer,
        scores={**scores, **regions},
        trace=trace.to_dict(),
    )


def failed_run(task: Task, sample: Sample, exc: Exception) -> Record:
    """The record of a sample whose image, or whose run, failed with an error."""
    kind = "image" if isinstance(exc, ImageError) else "run"
    return failed_record(task, sample, kind, str(as_vpt_error(exc)))


def failed_record(task: Task, sample: Sample | BadRow, kind: str, message: str) -> Record:
    """The record of a sample without an answer; ``kind`` is one of ``records.ERRORS``."""
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


class LocalAsker:
    """An :class:`vpt.evaluation.evaluate.Asker` over a runtime of this process."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def describe(self) -> Mapping[str, Any]:
        """See :class:`vpt.evaluation.evaluate.Asker`."""
        from vpt.evaluation.provenance import describe_model, describe_surroundings

        model = describe_model(self.runtime)
        runtime = self.runtime
        return {
            "model": model,
            "finders": {"detector": runtime.detector.name, "segmenter": runtime.segmenter.name},
            "surroundings": describe_surroundings(self.runtime),
        }

    def check(self, conditions: Sequence[Condition]) -> None:
        """See :class:`vpt.evaluation.evaluate.Asker`."""
        check_conditions(conditions, self.runtime.vocabulary.branches)
        for finder in set().union(*(condition.finders for condition in conditions)):
            getattr(self.runtime, finder).check()

    def ask(self, work: Sequence[Work], decoding: Decoding, batch_size: int) -> Iterator[Record]:
        """See :class:`vpt.evaluation.evaluate.Asker`; one sample after the other."""
        return run_tasks(self.runtime, by_sample(work), decoding, batch_size)


def check_conditions(conditions: Sequence[Condition], branches: Sequence[str]) -> None:
    """Raise ``PromptError`` unless a model with these branches can look as conditions require."""
    for condition in conditions:
        names_region = condition.true_region or condition.phrase
        mode = "crop" if names_region else condition.options["perception"]
        branches_of_mode(mode, branches)
