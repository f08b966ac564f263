"""The runtime as a model of lmms-eval, which answers the requests of tasks in batches."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn
from zlib import crc32

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from vpt.errors import PromptError, VPTError, as_vpt_error
from vpt.inference.events import ErrorEvent, StopEvent
from vpt.inference.request import Request, Sampling
from vpt.loading import load
from vpt.protocol.tokens import branches_of_mode
from vpt.trace.records import Trace

_HONOURED = ("do_sample", "max_new_tokens", "seed", "temperature", "top_k", "top_p", "until")
_NEUTRAL: dict[str, tuple[Any, ...]] = {"num_beams": (1, None), "repetition_penalty": (1, None)}
_IGNORED = ("image_aspect_ratio", "skip_special_tokens")  # of LLaVA's; of decoding control tokens

# lmms-eval's default of ``until``, which separated the examples of a base model: it would cut the
# reasoning of a chat model. Its own Qwen2.5-VL drops it, too.
_EXAMPLE_DELIMITER = "\n\n"


class VPT(lmms):
    """A model that may look again, as lmms-eval asks it.

    The arguments are what ``--model_args`` takes, ``--batch_size`` and ``--device``.

    Args:
        model: a model folder or hub id; ``None`` for the small embedded one.
        perception: one of ``vpt.protocol.tokens.PERCEPTION_MODES``.
        device: ``"cpu"``, ``"cuda"``, ...; by default a GPU if there is one.
        dtype: as for :func:`vpt.loading.load`.
        image_resolution: longer side to which images are shrunk, 0 for no limit; by default
            what the model's configuration says.
        batch_size: questions at once.
        max_calls: perception calls per question at most.
        max_new_tokens: tokens per answer at most, also where a task allows more.
        constrain: whether the grammar forbids malformed calls.
        look_at: which image a call concerns, ``"first"`` or ``"latest"``.
        seed: of sampling, where a task samples.

    Raises:
        ValueError: for a batch size that is not a number.
        NotImplementedError: under a launcher of several processes.
        CheckpointError: if the model cannot be loaded.
        PromptError: if it cannot look as ``perception`` says.
    """

    is_simple = False

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        perception: str = Request.perception,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        image_resolution: int | None = None,
        batch_size: int | str = 8,
        max_calls: int = Request.max_calls,
        max_new_tokens: int | None = None,
        constrain: bool = Request.constrain,
        look_at: str | int = Request.look_at,
        seed: int = Sampling.seed,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise NotImplementedError(
                "model 'vpt' runs in one process; for several GPUs use `vpt eval --workers N`"
            )
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a number, not {batch_size!r}")
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        hub: dict[str, Any] = {} if revision is None else {"revision": str(revision)}
        self.runtime = load(
            model, device=device, dtype=dtype, image_resolution=image_resolution, **hub
        )
        branches_of_mode(perception, self.runtime.vocabulary.branches)
        self._options: dict[str, Any] = {"perception": perception, "max_calls": max_calls}
        self._options |= {"constrain": constrain, "look_at": look_at}
        self._times_asked: Counter[tuple[str, str, int]] = Counter()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests of all tasks, in order; a new one starts as soon as another ends.

        The first request that cannot be used or fails is raised, with its task and document, after
        all others are answered and in the cache.
        """
        results: dict[int, GenerationResult] = {}
        errors: dict[int, VPTError] = {}
        asked: list[int] = []  # places in ``requests``, without those that cannot be asked
        numbers: Counter[str] = Counter()
        started = time.perf_counter()
        batch_size = min(self.batch_size, max(len(requests), 1))
        stream = self.runtime.stream_many(self._make_requests(requests, asked, errors), batch_size)
        with tqdm(total=len(requests), desc="Model Responding") as bar:
            for index, event in stream:
                if isinstance(event, StopEvent):
                    results[asked[index]] = self._finish(requests[asked[index]], event.trace)
                    numbers.update(_numbers_of(event.trace))
                elif isinstance(event, ErrorEvent):
                    errors[asked[index]] = event.error
                bar.update(len(results) + len(errors) - bar.n)
        if results:
            _log(numbers, len(results), time.perf_counter() - started)
        if errors:
            raise _first_error(requests, errors)
        return [results[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Not supported: the model may look again before it answers."""
        raise NotImplementedError(
            "model 'vpt' generates answers and gives no log-likelihoods; "
            "choose a task with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Not supported: the runtime takes one question at a time."""
        raise NotImplementedError(
            "model 'vpt' answers one question and holds no conversation; "
            "choose a task with output_type generate_until"
        )

    def clean(self) -> None:
        """Give the model's memory back; lmms-eval asks for it before it scores."""
        if hasattr(self, "runtime"):
            del self.runtime
        super().clean()

    def _make_requests(
        self, instances: Sequence[Instance], asked: list[int], errors: dict[int, VPTError]
    ) -> Iterator[Request]:
        """Yield requests; add the index of each to ``asked``, other errors to ``errors``."""
        for index, instance in enumerate(instances):
            try:
                request = self._make_request(instance)
            except Exception as exc:
                errors[index] = as_vpt_error(exc)
            else:
                asked.append(index)
                yield request

    def _make_request(self, instance: Instance) -> Request:
        _, doc_to_messages, gen_kwargs, doc_id, task, split = instance.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        images, question, system = fold_messages(messages)
        options = {**self._options, **self._decoding(gen_kwargs, (task, split, doc_id))}
        if system is not None:
            options["system"] = system
        return self.runtime.request(images, question, **options)

    def _decoding(
        self, gen_kwargs: Mapping[str, Any], document: tuple[str, str, int]
    ) -> dict[str, Any]:
        """Options of a request: what the task says, within our limit; each repeat its seed."""
        options = decoding_options(gen_kwargs)
        if self.max_new_tokens is not None:
            allowed = options.get("max_new_tokens", self.max_new_tokens)
            options["max_new_tokens"] = min(allowed, self.max_new_tokens)
        self._times_asked[document] += 1
        seed = options.get("seed", self.seed)
        words = (seed, *document, self._times_asked[document])
        return {**options, "seed": crc32(" ".join(map(str, words)).encode())}

    def _finish(self, instance: Instance, trace: Trace) -> GenerationResult:
        context, _, gen_kwargs, *_ = instance.args
        text = cut(trace.answer, stop_words(gen_kwargs))
        self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
        counts = trace.counts
        return GenerationResult(text, TokenCounts(counts.prompt_tokens, counts.generated_tokens))


def _first_error(instances: Sequence[Instance], errors: Mapping[int, VPTError]) -> VPTError:
    """The first of the errors, with its task and document, and how many there are."""
    index, error = min(errors.items())
    *_, doc_id, task, _ = instances[index].args
    named = type(error)(
        f"task {task!r}, document {doc_id}: {error} "
        f"({len(errors)} of {len(instances)} requests failed)"
    )
    named.__cause__ = error
    return named


def fold_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], str, str | None]:
    """Images, question and system turn of messages; not of video, sound or several user turns.

    Where text precedes an image, ``<image 1>`` marks the place of the first image, and so on.
    """
    turns = ChatMessages(messages=list(messages)).messages
    asked = [turn for turn in turns if turn.role != "system"]
    if [turn.role for turn in asked] != ["user"]:
        roles = ", ".join(turn.role for turn in turns)
        raise PromptError(f"expected one user turn, got {roles}; conversations are not supported")
    system = [
        part.text
        for turn in turns
        if turn.role == "system"
        for part in _checked(turn.content, "a system turn", "text")
    ]
    content = _checked(asked[0].content, "a question", "text", "image")
    kinds = [part.type for part in content]
    is_mixed = kinds != sorted(kinds)  # "image" sorts before "text"
    images: list[Any] = []
    words: list[str] = []
    for part in content:
        if part.type == "text":
            words.append(part.text)
            continue
        images.append(part.url)
        if is_mixed:
            words.append(f"<image {len(images)}>")
    return images, "\n".join(words), "\n".join(system) if system else None


def _checked(content: Sequence[Any], where: str, *permitted: str) -> Sequence[Any]:
    for part in content:
        if part.type not in permitted:
            raise PromptError(
                f"{where} holds {part.type}, model 'vpt' takes {' and '.join(permitted)} there"
            )
    return content


def decoding_options(gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a request from a task's generation settings; ``None`` counts as not given.

    Tokens are sampled if ``do_sample`` is true, or, where it is missing, if the temperature is
    above 0. A setting that would change the answer and is not supported is a ``PromptError``.
    """
    for name, value in gen_kwargs.items():
        if name not in (*_HONOURED, *_IGNORED) and value not in _NEUTRAL.get(name, ()):
            raise PromptError(
                f"generation setting {name}={value!r} is not supported; "
                f"available: {', '.join(_HONOURED)}"
            )
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    options = {name: value for name, value in given.items() if name in ("max_new_tokens", "seed")}
    temperature = float(given.get("temperature", given.get("do_sample", False)))
    # As in transformers, no probability at all leaves the likeliest token.
    if given.get("do_sample", True) and temperature > 0 and given.get("top_p") != 0:
        options |= {name: value for name, value in given.items() if name in ("top_k", "top_p")}
        options["temperature"] = temperature
    return options


def stop_words(gen_kwargs: Mapping[str, Any]) -> list[str]:
    """Texts at which an answer ends, from the generation settings of a task."""
    until = gen_kwargs.get("until") or []
    words = [until] if isinstance(until, str) else until
    return [word for word in words if word and word != _EXAMPLE_DELIMITER]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the words, stripped."""
    for word in until:
        text = text.partition(word)[0]
    return text.strip()


def _numbers_of(trace: Trace) -> dict[str, int]:
    return {
        "tokens": trace.counts.generated_tokens,
        "calls": sum(call.outcome == "executed" for call in trace.calls),
        "cut_off": int(trace.stop_reason == "length"),
    }


def _log(numbers: Mapping[str, int], num_answers: int, elapsed_s: float) -> None:
    """Add speed, calls and the share of truncated answers to lmms-eval's results."""
    log_metrics(
        total_elapsed_time=elapsed_s,
        total_gen_tokens=numbers["tokens"],
        avg_speed=numbers["tokens"] / elapsed_s,
        additional_metrics={
            "total_requests": num_answers,
            "calls_per_answer": numbers["calls"] / num_answers,
            "share_cut_off": numbers["cut_off"] / num_answers,
        },
    )
