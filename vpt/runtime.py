"""The front door: load a model, ask it about images, one question or many."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpt.checkpoint import load_model
from vpt.controller import ContentEvent, Event, Request, StopEvent, converse
from vpt.decoding import Sampling
from vpt.depth.tokenizer import CONFIG, WEIGHTS, DepthTokenizer, load_depth_tokenizer
from vpt.engine import Engine
from vpt.errors import CheckpointError, PromptError, VPTError
from vpt.features import DEFAULT_CACHE_BYTES, Encoders, FeatureCache
from vpt.images import DEFAULT_LIMITS, ImageLimits, LoadedImage, load_image
from vpt.model_files import find_file
from vpt.modeling import VPTForConditionalGeneration
from vpt.processing import VPTProcessor
from vpt.scheduler import drive
from vpt.tokens import Vocabulary
from vpt.trace import Trace

_SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))
_REQUEST_FIELDS = tuple(
    field.name for field in dataclasses.fields(Request) if field.name not in ("images", "sampling")
)

EMBEDDED_MODEL = Path(__file__).parent / "embedded"
"""Folder of the model that ships with this package."""


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        text: the answer, without control tokens.
        stop_reason: ``"stop"``, ``"length"``, ``"max_calls"`` or ``"repeated_call"``.
        trace: the whole record.
    """

    text: str
    stop_reason: str
    trace: Trace

    @property
    def num_calls(self) -> int:
        """Perception calls that were executed."""
        return sum(call.outcome == "executed" for call in self.trace.calls)


class Runtime:
    """A loaded model, ready to be asked.

    Not safe for use from several threads at once: give each its own, or queue.

    Args:
        model: in evaluation mode.
        processor: of the model.
        name: where it came from; goes into traces.
        feature_cache_bytes: memory for features of images seen before.
        limits: of images taken in.
        depth_tokenizer: decodes the depth maps that the model writes; ``None`` keeps their codes
            only.

    Attributes:
        description: what traces say about the model: its name, and its branches' preprocessing.
    """

    def __init__(
        self,
        model: VPTForConditionalGeneration,
        processor: VPTProcessor,
        *,
        name: str = "",
        feature_cache_bytes: int = DEFAULT_CACHE_BYTES,
        limits: ImageLimits = DEFAULT_LIMITS,
        depth_tokenizer: DepthTokenizer | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self.limits = limits
        self.encoders = Encoders(model, processor, FeatureCache(feature_cache_bytes))
        self.vocabulary = Vocabulary.from_tokenizer(
            processor.tokenizer,
            model.config.branches,
            model.config.grid_size,
            model.config.content_tokens,
        )
        self.description: dict[str, Any] = {
            "name": name,
            "preprocess": {n: b.preprocess_config for n, b in model.branches.items()},
        }
        self.depth_tokenizer = depth_tokenizer
        if depth_tokenizer is not None:
            _check_depth_tokenizer(depth_tokenizer, self.vocabulary)
        self._engine: Engine | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_input_embeddings().weight.device

    def engine(self, num_slots: int = 1) -> Engine:
        """An engine with at least so many free slots.

        The last one made is kept. While another stream still holds it, a new one takes its
        place, so that questions may be asked in the middle of others.
        """
        if self._engine is None or self._engine.num_free_slots < num_slots:
            self._engine = None  # free the old buffers first, if nobody holds them
            self._engine = Engine(self.model, self.encoders, num_slots)
        return self._engine

    def request(self, images: Any, question: str, **options: Any) -> Request:
        """Check and complete a request.

        Args:
            images: one image or a list: paths, bytes, PIL images, arrays, or images loaded by
                :func:`vpt.images.load_image`. Empty for a question about nothing.
            question: plain text.
            **options: fields of :class:`vpt.controller.Request` and
                :class:`vpt.decoding.Sampling`.

        Raises:
            ImageError: if an image cannot be used.
            PromptError: if an option is unknown or out of bounds.
        """
        unknown = set(options) - set(_REQUEST_FIELDS) - set(_SAMPLING_FIELDS)
        if unknown:
            known = ", ".join(sorted({*_REQUEST_FIELDS[1:], *_SAMPLING_FIELDS}))
            raise PromptError(f"unknown option {sorted(unknown)[0]!r}; available: {known}")
        given = list(images) if isinstance(images, list | tuple) else [images]
        loaded = [
            image if isinstance(image, LoadedImage) else load_image(image, limits=self.limits)
            for image in given
        ]
        try:
            sampling = Sampling(**{k: v for k, v in options.items() if k in _SAMPLING_FIELDS})
        except ValueError as exc:
            raise PromptError(str(exc)) from exc
        rest = {k: v for k, v in options.items() if k not in _SAMPLING_FIELDS}
        return Request(images=loaded, question=question, sampling=sampling, **rest)

    def ask(self, images: Any, question: str, **options: Any) -> Answer:
        """Ask one question; arguments as for :meth:`request`."""
        return self.ask_many([self.request(images, question, **options)], batch_size=1)[0]

    def stream(self, images: Any, question: str, **options: Any) -> Iterator[Event]:
        """Ask one question and get events as they happen; the last is a ``StopEvent``.

        Closing the iterator ends the computation. Arguments as for :meth:`request`, which is
        checked at once, before the first event is asked for.
        """
        request = self.request(images, question, **options)
        return self._stream_many([request], 1, with_index=False)

    def ask_many(
        self, requests: Iterable[Request | dict[str, Any]], batch_size: int = 8
    ) -> list[Answer]:
        """Ask many questions; streams are decoded together, answers come back in order.

        Args:
            requests: made by :meth:`request`, or dicts of its arguments.
            batch_size: streams at once.

        Raises:
            PromptError: if ``batch_size`` is less than 1.
            VPTError: if a request cannot be used, naming its index. They are made as room for
                them comes; whoever wants the answers before it uses :meth:`stream_many`.
        """
        answers: dict[int, Answer] = {}
        for index, event in self.stream_many(requests, batch_size):
            if isinstance(event, StopEvent):
                trace = event.trace
                answers[index] = Answer(trace.answer, trace.stop_reason, trace)
        return [answers[index] for index in sorted(answers)]

    def stream_many(
        self, requests: Iterable[Request | dict[str, Any]], batch_size: int = 8
    ) -> Iterator[tuple[int, Event]]:
        """Like :meth:`ask_many`, giving ``(index, event)`` as things happen."""
        if batch_size < 1:
            raise PromptError(f"batch_size must be at least 1, not {batch_size}")
        if isinstance(requests, Sequence):
            batch_size = min(batch_size, max(len(requests), 1))
        return self._stream_many(self._make_requests(requests), batch_size)

    def _make_requests(self, requests: Iterable[Request | dict[str, Any]]) -> Iterator[Request]:
        for index, given in enumerate(requests):
            try:
                yield given if isinstance(given, Request) else self.request(**given)
            except VPTError as exc:
                raise type(exc)(f"request {index}: {exc}") from exc

    def _stream_many(
        self, requests: Iterable[Request], batch_size: int, with_index: bool = True
    ) -> Iterator[Any]:
        conversations = (
            (converse(request, self.processor, self.vocabulary), request.sampling)
            for request in requests
        )
        for index, event in drive(self.engine(batch_size), conversations, batch_size):
            if isinstance(event, StopEvent):
                event.trace.model = dict(self.description)
            elif isinstance(event, ContentEvent) and self.depth_tokenizer is not None:
                event.content.keep_depth_map(self.depth_tokenizer.decode)
            yield (index, event) if with_index else event


def load(
    path_or_id: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    feature_cache_bytes: int = DEFAULT_CACHE_BYTES,
    limits: ImageLimits = DEFAULT_LIMITS,
    image_resolution: int | None = None,
    depth_tokenizer: str | os.PathLike[str] | None = None,
    **hub_kwargs: Any,
) -> Runtime:
    """Load a model and make a runtime of it.

    Args:
        path_or_id: a model folder or hub id, in the released format or our own; ``None`` for
            the small embedded model, see docs/embedded-model.md.
        device: ``"cpu"``, ``"cuda"``, ...; by default a GPU if there is one.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"``, ... or a torch dtype.
        feature_cache_bytes: memory for features of images seen before.
        limits: of images taken in.
        image_resolution: longer side to which images are shrunk before the model sees them, 0 for
            no limit; by default what the model's configuration says (released models: 512).
        depth_tokenizer: folder or file of what decodes the model's depth maps; by default the one
            in the model's folder, if there is one.
        **hub_kwargs: ``revision``, ``cache_dir``, ``token``.

    Raises:
        CheckpointError: if the model cannot be loaded.
    """
    name = "embedded" if path_or_id is None else path_or_id
    source = str(EMBEDDED_MODEL) if path_or_id is None else path_or_id
    model = load_model(source, device=device, dtype=dtype, **hub_kwargs)
    processor = VPTProcessor.from_pretrained(source, **hub_kwargs)
    if image_resolution is not None:
        model.config.image_resolution = image_resolution or None
    return Runtime(
        model,
        processor,
        name=name,
        feature_cache_bytes=feature_cache_bytes,
        limits=limits,
        depth_tokenizer=_load_depth_tokenizer(source, model, depth_tokenizer, hub_kwargs),
    )


def _load_depth_tokenizer(
    source: str,
    model: VPTForConditionalGeneration,
    given: str | os.PathLike[str] | None,
    hub: dict[str, Any],
) -> DepthTokenizer | None:
    """The one that is given, or that of the model's folder, or none.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if given is not None:
        return load_depth_tokenizer(given)
    if "depth" not in model.config.content_tokens.kinds:
        return None
    name = model.config.depth_tokenizer
    if Path(source, name).exists():
        return load_depth_tokenizer(Path(source, name))
    files = [find_file(source, f"{name}/{file}", **hub) for file in (CONFIG, WEIGHTS)]
    return None if files[0] is None else load_depth_tokenizer(files[0].parent)


def _check_depth_tokenizer(tokenizer: DepthTokenizer, vocabulary: Vocabulary) -> None:
    content, config = vocabulary.content, tokenizer.config
    if "depth" not in content.kinds:
        raise CheckpointError("there is a depth tokenizer, but this model writes no depth maps")
    if (content.num_codes, content.num_cells) != (config.num_codes, config.num_cells):
        raise CheckpointError(
            f"the depth tokenizer makes {config.num_cells} codes of {config.num_codes}; the model "
            f"writes {content.num_cells} of {content.num_codes}"
        )
