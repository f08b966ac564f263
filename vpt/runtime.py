"""The front door: ask a model about images, one question or many."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Literal, ParamSpec, TypeVar, cast, overload

import torch
from tqdm import tqdm

from vpt.answer import Answer
from vpt.boxes import GridBox
from vpt.chat import Chat
from vpt.depth.tokenizer import DepthTokenizer
from vpt.detector import Detector, Proposer
from vpt.errors import CheckpointError, PromptError, ServiceError, VPTError, as_vpt_error
from vpt.images import DEFAULT_LIMITS, ImageLimits, LoadedImage, find_images, load_image
from vpt.inference.conversation import Conversation, Transcript
from vpt.inference.engine import Engine
from vpt.inference.events import ErrorEvent, Event, StopEvent
from vpt.inference.features import DEFAULT_CACHE_BYTES, Encoders, FeatureCache
from vpt.inference.prefixes import DEFAULT_PREFIX_BYTES
from vpt.inference.request import Message, Request, Sampling, check_number, lists_options, one_of
from vpt.inference.worker import Sink, Worker
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.processing import VPTProcessor
from vpt.protocol.messages import read_conversation
from vpt.protocol.tokens import GROUNDING, PLAIN, Vocabulary
from vpt.segmenter import Segmenter, Segments
from vpt.trace.records import Trace

DEFAULT_NUM_SEQS = 16

_NO_DETECTOR = (
    "the model can call for phrases, but may not: it was loaded without a detector (detector=...)"
)

P = ParamSpec("P")
R = TypeVar("R")

Requests = Iterable[Any] | str | os.PathLike[str]
"""Several requests, or with a question images."""


def _with_arguments_of(like: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a method the signature, and the list of arguments, of the one that it passes them to."""

    def decorate(method: Callable[..., R]) -> Callable[P, R]:
        doc, arguments = inspect.getdoc(method) or "", inspect.getdoc(like) or ""
        if "Args:" not in doc:
            arguments = arguments.partition("Args:")[2].partition("Raises:")[0]
            method.__doc__ = f"{doc}\n\nArgs:{arguments}".rstrip()
        returned = inspect.signature(method).return_annotation
        signature = inspect.signature(like).replace(return_annotation=returned)
        method.__dict__["__signature__"] = signature
        return cast("Callable[P, R]", method)

    return decorate


@dataclass(frozen=True)
class Snapshot:
    """An event of the request with this index, and the trace so far, which grows until the last.

    A request that was refused has no trace and no images.
    """

    index: int
    event: Event
    trace: Trace | None
    images: Sequence[LoadedImage] = field(default=(), repr=False)


class Runtime:
    """A loaded model, ready to be asked, from any number of threads.

    A thread of its own runs the model; requests are served in the order in which they come.

    Args:
        model: in evaluation mode.
        processor: of the model.
        name: path or id, for traces.
        feature_cache_bytes: memory for features of images seen before.
        limits: of input images.
        depth_tokenizer: decodes the depth maps that the model writes; ``None`` keeps their codes
            only.
        detector: finds the phrases of ``look_for`` and those that the model calls for: as for
            :class:`vpt.detector.Detector`. Without it the model may not call for phrases.
        segmenter: finds the objects of ``mask``: as for :class:`vpt.segmenter.Segmenter`.
        max_num_seqs: requests that run at once; others wait.
        max_model_len: tokens of one request with all its images, looks and answers; by default
            what the model's context allows, bounded by half of the memory for all requests.
        prefix_cache_bytes: memory for prompts seen before, which are not read again.
    """

    def __init__(
        self,
        model: VPTForConditionalGeneration,
        processor: VPTProcessor,
        *,
        name: str | os.PathLike[str] = "",
        feature_cache_bytes: int = DEFAULT_CACHE_BYTES,
        limits: ImageLimits = DEFAULT_LIMITS,
        depth_tokenizer: DepthTokenizer | None = None,
        detector: str | os.PathLike[str] | Proposer | None = None,
        segmenter: str | os.PathLike[str] | Segments | None = None,
        max_num_seqs: int = DEFAULT_NUM_SEQS,
        max_model_len: int | None = None,
        prefix_cache_bytes: int = DEFAULT_PREFIX_BYTES,
    ) -> None:
        self.model = model
        self.processor = processor
        self.name = str(name)
        self.limits = processor.image_limits = limits
        processor.image_resolution = model.config.image_resolution
        ends = model.generation_config.eos_token_id
        processor.check_fits(model.config, self.name or "given", ends)
        self.encoders = Encoders(model, processor, FeatureCache(feature_cache_bytes))
        self.vocabulary = Vocabulary.from_tokenizer(
            processor.tokenizer,
            model.config.branches,
            model.config.grid_size,
            model.config.content_tokens,
        )
        self.description: dict[str, Any] = {
            "name": self.name,
            "preprocess": {n: b.preprocess_config for n, b in model.branches.items()},
            "image_resolution": model.config.max_side(PLAIN),
        }
        self.intended_inputs = model.intended_inputs
        self.depth_tokenizer = depth_tokenizer
        if depth_tokenizer is not None:
            _check_depth_tokenizer(depth_tokenizer, self.vocabulary)
        self.detector = Detector(detector, self.device)
        self.segmenter = Segmenter(segmenter, self.device)
        self._warnings: tuple[str, ...] = ()
        if detector is None and GROUNDING in self.vocabulary.branches:
            self.vocabulary = self.vocabulary.without(GROUNDING)
            self._warnings = (_NO_DETECTOR,)
        self._settings = (
            check_number("max_num_seqs", max_num_seqs, int, 1),
            max_model_len and check_number("max_model_len", max_model_len, int, 1),
            prefix_cache_bytes,
        )
        self._lock, self._process = threading.Lock(), os.getpid()
        self._worker: Worker | None = None

    def __repr__(self) -> str:
        branches = ", ".join(self.vocabulary.branches)
        return f"Runtime({self.name!r}, branches=[{branches}], device={str(self.device)!r})"

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.get_input_embeddings().weight.device

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Save all that :func:`vpt.load` needs: model, processor and depth tokenizer.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        try:
            self.model.save_pretrained(save_directory)
            self.processor.save_pretrained(save_directory)
            if self.depth_tokenizer is not None:
                part = Path(save_directory, self.model.config.depth_tokenizer)
                if part.is_file():  # a released one, copied with the model
                    part.unlink()
                self.depth_tokenizer.save(part)
        except OSError as exc:
            reason = exc.strerror or exc
            raise CheckpointError(f"cannot save the model to {save_directory}: {reason}") from exc

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a VPT model",
    ) -> str:
        """Save to a repository of the Hugging Face hub, which is made if it does not exist.

        Args:
            repo_id: ``"owner/name"``.
            private: whether a new repository is; by default as the owner's settings say.
            token: with the right to write; by default that of ``hf auth login``.
            revision: branch.
            commit_message: of the commit.

        Returns:
            URL of the commit.

        Raises:
            ServiceError: if the hub cannot be reached, or refuses.
        """
        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                )
            except Exception as exc:  # of the hub, of its HTTP library, or of the network
                reason = str(exc).strip().split("\n")[0]
                raise ServiceError(
                    f"cannot push to {repo_id!r}: {reason}; check the name, the network, and that "
                    "the token (`hf auth login`) may write"
                ) from exc
        return commit.commit_url

    @property
    def worker(self) -> Worker:
        """The model's thread, with its engine; made when it is first needed, once per process."""
        if self._process != os.getpid():  # forked: without the thread, perhaps amid a round of it
            self._process, self._lock, self._worker = os.getpid(), threading.Lock(), None
        with self._lock:
            if self._worker is None:
                num_seqs, max_len, prefix_bytes = self._settings
                self._worker = Worker(
                    Engine(self.model, self.encoders, num_seqs, max_len, prefix_bytes=prefix_bytes)
                )
                weakref.finalize(self, self._worker.stop)
            return self._worker

    @property
    def engine(self) -> Engine:
        """The engine; use it directly only while no request runs."""
        return self.worker.engine

    def close(self) -> None:
        """End the model's thread, what still runs with an error; the next request restarts it."""
        if self._worker is not None:
            self.worker.stop()

    @lists_options
    def request(
        self,
        images: Any = None,
        question: str | None = None,
        messages: Any = None,
        *,
        perception: str = "auto",
        max_calls: int = 4,
        max_new_tokens: int = 256,
        constrain: bool = True,
        look_at: str | int = "first",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        region: GridBox | None = None,
        look_for: str | None = None,
        point: tuple[int, int] | None = None,
        max_boxes: int = 1,
        mask: bool = False,
        replace_looks: str | None = None,
        replace_content: str | None = None,
        history: Sequence[Message] = (),
    ) -> Request:
        """Check and complete a request.

        Args:
            images: one image or a list: of whatever :func:`vpt.images.load_image` reads (paths,
                bytes, PIL images, arrays, tensors, data URIs, URLs of permitted hosts), or has
                read. Empty for a question about nothing.
            question: plain text.
            messages: in place of both, and of ``system`` and ``history``: turns of user and
                assistant, the last a user's, perhaps after a system message, as for OpenAI or a
                chat template of transformers.
            perception: ``"auto"`` (the model chooses), ``"none"``, ``"crop"``, ``"grounding"`` (it
                names a phrase), ``"reencode"`` or a branch.
            max_calls: perception calls at most.
            max_new_tokens: tokens written at most.
            constrain: permit well-formed calls only; otherwise malformed calls are recorded and
                read as text.
            look_at: the image of a call: the ``"first"`` one, the ``"latest"``, which may be a
                crop, or an index.
            temperature: 0 takes the likeliest token.
            top_k: number of likeliest tokens to sample from; 0 for all.
            top_p: probability of the likeliest tokens to sample from; 1 for all.
            seed: of sampling.
            system: text of the system turn; ``None`` for the released one.
            region: cells of the grid that the first call names in place of the model's choice.
            look_for: a phrase such as ``"the blue tag"``: the first call looks where the detector
                finds it, which runs at once, before the request is served.
            point: ``(x, y)`` in pixels of the image, where the first call looks.
            max_boxes: boxes of the phrase to look at, best first.
            mask: dim what is not the object in a crop, by the segmenter.
            replace_content: ``"random"``, ``"repeat"``, ``"empty"`` or content, and
            replace_looks: ``"blank"`` or ``"random"``, for experiments: see
                :class:`vpt.inference.request.Request`.
            history: earlier turns, as text and images. :meth:`chat` also keeps the looks.

        Raises:
            CheckpointError: if the detector is needed and cannot be loaded.
            ImageError: if an image cannot be used.
            PromptError: if the question, or an option, is unknown, of another type or out of
                bounds, or cannot be used with this model.
        """
        if messages is not None:
            if not images is question is system is None or history:
                raise PromptError("pass messages alone, or images and question without them")
            system, turns = read_conversation(messages)
            images, question = turns[-1].images, turns[-1].text
            history = [
                Message(turn.role, turn.text, self.load_images(turn.images)) for turn in turns[:-1]
            ]
        request = Request(
            self.load_images(images),
            cast(str, question),  # which is checked there
            perception=perception,
            max_calls=max_calls,
            max_new_tokens=max_new_tokens,
            constrain=constrain,
            look_at=look_at,
            sampling=Sampling(temperature, top_k, top_p, seed),
            system=system,
            region=region,
            look_for=look_for,
            point=point,
            max_boxes=max_boxes,
            mask=mask,
            replace_looks=replace_looks,
            replace_content=replace_content,
            history=history,
        )
        return self.prepare(request)

    def load_images(self, images: Any) -> list[LoadedImage]:
        """Load one image or a list, as for :meth:`request`."""
        given = list(images) if isinstance(images, list | tuple) else [images]
        return [
            image if isinstance(image, LoadedImage) else load_image(image, limits=self.limits)
            for image in given
        ]

    def chat(self, images: Any = (), **options: Any) -> Chat:
        """Begin a conversation about these images; see :class:`vpt.chat.Chat`."""
        return Chat(self, self.load_images(images), options)

    @_with_arguments_of(request)
    def ask(self, *args: Any, **options: Any) -> Answer:
        """Ask one question, with arguments as for :meth:`request`.

        Raises:
            VPTError: if the request cannot be used, or its run fails; an error that is not of this
                package is the cause of a ``RunError``.
        """
        request = self.request(*args, **options)
        (answer,) = self.ask_many([request], batch_size=1, on_error="return")
        if isinstance(answer, VPTError):
            raise answer
        return replace(answer, images=[image.pixels for image in request.all_images])

    @_with_arguments_of(request)
    def stream(self, *args: Any, **options: Any) -> Iterator[Event]:
        """Ask one question and get events as they happen; the last is a ``StopEvent``.

        Closing the iterator ends the computation. Arguments and errors as for :meth:`ask`; the
        request is checked at once, before the first event is asked for.
        """
        return self._stream(self.request(*args, **options))

    def _stream(self, request: Request) -> Iterator[Event]:
        for _, event in self.stream_many([request], batch_size=1):
            if isinstance(event, ErrorEvent):
                raise event.error
            if isinstance(event, StopEvent):
                event.trace.keep_thumbnails(request.images)
            yield event

    @_with_arguments_of(request)
    def requests(self, images: Any, question: str, **options: Any) -> list[dict[str, Any]]:
        """Make one request per image, for :meth:`ask_many`.

        Args:
            images: a folder or glob pattern, see :func:`vpt.images.find_images`; or images, each as
                for :meth:`request`. Files are read when they are asked about.
            question: the same for all images; options as well, which :meth:`request` checks.

        Raises:
            ImageError: if the folder has no images, or no file fits the pattern.
            PromptError: if ``images`` is something else.
        """
        if isinstance(images, str | os.PathLike):
            images = find_images(images)
        elif not isinstance(images, Iterable) or isinstance(images, bytes):
            kind = type(images).__name__
            raise PromptError(f"expected a folder, a glob pattern or a list of images, not {kind}")
        return [{"images": image, "question": question, **options} for image in images]

    @overload
    def ask_many(
        self,
        requests: Requests,
        batch_size: int = 8,
        on_error: Literal["raise"] = "raise",
        *,
        question: str | None = None,
        show_progress: bool = False,
    ) -> list[Answer]: ...

    @overload
    def ask_many(
        self,
        requests: Requests,
        batch_size: int = 8,
        *,
        on_error: Literal["return"],
        question: str | None = None,
        show_progress: bool = False,
    ) -> list[Answer | VPTError]: ...

    def ask_many(
        self,
        requests: Requests,
        batch_size: int = 8,
        on_error: str = "raise",
        *,
        question: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Ask many questions; streams are decoded together, answers come back in order.

        A failure affects only its own request; all others are answered.

        Args:
            requests: made by :meth:`request`, or dicts of its arguments, which are made as room for
                them comes. With ``question``, images instead: a folder, a glob pattern or a list.
            batch_size: streams at once.
            on_error: ``"raise"`` raises the first error once all others are answered, ``"return"``
                returns each error in the place of its answer.
            question: asked about each image; :meth:`requests` takes further options.
            show_progress: show a progress bar on stderr.

        Returns:
            Answers with the images that their traces keep. ``answer.trace.images[0].source`` is the
            path of the image.

        Raises:
            ImageError: if a folder or pattern has no images.
            PromptError: if ``batch_size`` or ``on_error`` is out of bounds.
            VPTError: under ``"raise"``, naming the index of the first request that failed; its
                ``answers`` contains all answers and errors, in order.
        """
        one_of("on_error", on_error, ("raise", "return"))
        if question is not None:
            given: Iterable[Any] = self.requests(requests, question)
        elif isinstance(requests, str | os.PathLike):
            raise PromptError(f"pass question=, to be asked about each image of {str(requests)!r}")
        else:
            given = requests
        answers: dict[int, Answer | VPTError] = {}
        number = len(given) if isinstance(given, Sequence) else None
        with tqdm(total=number, unit="answer", disable=not show_progress) as bar:
            for one in self.watch_many(given, batch_size):
                if isinstance(one.event, StopEvent):
                    one.event.trace.keep_thumbnails(one.images)
                    answers[one.index] = Answer.from_trace(one.event.trace)
                elif isinstance(one.event, ErrorEvent):
                    answers[one.index] = one.event.error
                bar.update(len(answers) - bar.n)
        ordered = [answers[index] for index in sorted(answers)]
        if on_error == "raise":
            _raise_first(ordered)
        return ordered

    def stream_many(
        self, requests: Iterable[Request | dict[str, Any]], batch_size: int = 8
    ) -> Iterator[tuple[int, Event]]:
        """Like :meth:`ask_many`, but yields ``(index, event)`` as events happen.

        The last event of a request is a ``StopEvent``, or an ``ErrorEvent`` if it failed.
        """
        return _events(self.watch_many(requests, batch_size))

    def watch_many(
        self, requests: Iterable[Request | Conversation | dict[str, Any]], batch_size: int = 8
    ) -> Generator[Snapshot]:
        """Like :meth:`stream_many`, with the trace of each run as it grows."""
        batch_size = check_number("batch_size", batch_size, int, 1)
        if isinstance(requests, Sequence):
            batch_size = min(batch_size, max(len(requests), 1))
        return self._watch_many(requests, batch_size)

    def _watch_many(self, requests: Iterable[Any], batch_size: int) -> Generator[Snapshot]:
        worker = self.worker
        entries, running = enumerate(requests), dict[int, int]()
        runs: dict[int, tuple[Trace, Sequence[LoadedImage]]] = {}
        inbox: SimpleQueue[tuple[int, Event]] = SimpleQueue()

        def sink(index: int) -> Sink:
            return lambda event: inbox.put((index, event))

        try:
            while True:
                while len(running) < batch_size and (entry := next(entries, None)) is not None:
                    index, given = entry
                    try:
                        conversation = self._conversation(given)
                        request = conversation.request
                        runs[index] = conversation.recorder.trace, request.all_images
                        running[index] = worker.submit(
                            conversation.run(),
                            request.sampling,
                            sink(index),
                            keep=conversation.keep,
                        )
                    except Exception as exc:
                        yield Snapshot(
                            index, ErrorEvent(as_vpt_error(exc)), *runs.pop(index, (None, ()))
                        )
                if not running:
                    return
                index, event = inbox.get()
                if isinstance(event, StopEvent | ErrorEvent):
                    del running[index]
                    yield Snapshot(index, event, *runs.pop(index))
                else:
                    yield Snapshot(index, event, *runs[index])
        finally:
            if running:
                worker.cancel(*running.values())

    def _conversation(self, given: Any) -> Conversation:
        """The conversation that answers a request: the one that checked it, once."""
        request = given
        if isinstance(given, Conversation):
            return given
        if not isinstance(given, Request):
            if not isinstance(given, dict):
                kind = type(given).__name__
                raise PromptError(
                    "expected a Request or a dict of its arguments, or images with question=, "
                    f"not {kind}"
                )
            needed = () if "messages" in given else ("images", "question")
            if missing := [name for name in needed if name not in given]:
                raise PromptError(f"the request has no {missing[0]!r}")
            request = self.request(**given)
        return self.take(request)

    def prepare(self, request: Request, before: Transcript | None = None) -> Request:
        """Refuse what the model cannot do, alone or as the next question of a conversation.

        The conversation that is made to find out is kept, to answer the request.
        """
        object.__setattr__(request, "kept", self.converse(request, before))
        return request

    def take(self, request: Request, before: Transcript | None = None) -> Conversation:
        """The conversation of :meth:`prepare`, once; then a new one."""
        kept = request.__dict__.pop("kept", None)  # at once: by one thread only
        is_ours = isinstance(kept, Conversation) and kept.vocabulary is self.vocabulary
        return kept if is_ours and kept.before is before else self.converse(request, before)

    def converse(self, request: Request, before: Transcript | None = None) -> Conversation:
        """The conversation that answers a request, alone or as the next of an earlier one."""
        decode = None if self.depth_tokenizer is None else self.depth_tokenizer.decode
        meant = self.intended_inputs
        if request.mask:
            self.segmenter.load()  # here, not in the thread that serves all requests
        warnings = [*self._warnings, *(meant.warnings(request.images) if meant else ())]
        return Conversation(
            request,
            self.processor,
            self.vocabulary,
            decode,
            self.description,
            warnings,
            before,
            self.detector.propose,
            self.segmenter.segment,
        )


def _events(snapshots: Generator[Snapshot]) -> Iterator[tuple[int, Event]]:
    with closing(snapshots):
        for one in snapshots:
            yield one.index, one.event


def _raise_first(answers: Sequence[Answer | VPTError]) -> None:
    errors = {index: one for index, one in enumerate(answers) if isinstance(one, VPTError)}
    for index, first in errors.items():
        error = type(first)(
            f"request {index}: {first} ({len(errors)} of {len(answers)} requests failed; the "
            "others are in the attribute `answers` of this error)"
        )
        error.answers = answers
        raise error from first


def _check_depth_tokenizer(tokenizer: DepthTokenizer, vocabulary: Vocabulary) -> None:
    content, config = vocabulary.content, tokenizer.config
    if "depth" not in content.kinds:
        raise CheckpointError("there is a depth tokenizer, but this model writes no depth maps")
    if (content.num_codes, content.num_cells) != (config.num_codes, config.num_cells):
        raise CheckpointError(
            f"the depth tokenizer makes {config.num_cells} codes of {config.num_codes}; the model "
            f"writes {content.num_cells} of {content.num_codes}"
        )
