"""What one pass over one stream saves, measured: random weights, no downloads.

    python benchmarks/single_pass.py --size tiny small --json out.json

Contestants have the same weights and inputs, take turns (A B A B ...) after one warm-up each, and
must write the same tokens. Tables give medians and, in brackets, the least and the greatest.
Ratios are taken within a turn. Goals are judged by CPU time of the process on a CPU, where other
jobs disturb wall time, and by wall time on a GPU.

Random weights never stop by themselves here: control tokens are made faint, so that free text has
none, and the end of a turn is forbidden. A region call is held to one box of two corners.

Sizes ``tiny`` and ``small`` are for a CPU: about 20 s and 3.5 minutes on one thread. ``2b`` and
``7b`` have the shapes of Qwen2-VL with DINOv2-large and SAM ViT-L, built on the device; they are
for a GPU, and the authors, who had none, have not run them. How much the vision tower costs beside
the LLM bounds what a whole answer can gain, because both protocols pay for the first look.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from driving import drive
from peak_memory import peak_memory
from random_models import SIZES, Size, build, picture, plain_model
from reporting import announce, save, take_turns
from single_pass_tables import (
    KINDS,
    print_batching,
    print_extension,
    print_plain_answer,
    print_single_pass,
    print_table,
)
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer
from two_pass import TwoPassEngine

from vpt.images import LoadedImage
from vpt.inference.conversation import Conversation
from vpt.inference.engine import Engine
from vpt.inference.events import Append, CallEvent, Exchange, ResultEvent, StopEvent, TokenEvent
from vpt.inference.features import Encoders, FeatureCache
from vpt.inference.request import Request
from vpt.model.folder import BACKBONES
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.processing import ImagePiece, TokenPiece, VPTProcessor
from vpt.protocol.grammar import TokenRule
from vpt.protocol.tokens import (
    IMAGE_PAD,
    REGION_END,
    REGION_START,
    TURN_END,
    Vocabulary,
    branches_of_mode,
    invite,
)
from vpt.runtime import Runtime

QUESTION = "What stands on the hill behind the second house?"
CALL_LENGTHS = {"region": 7, "clip": 1, "dino": 1}  # tokens the model chooses to make a call
MIXED_MODES = ("none", "region", "clip", "dino")
EXTENSION_SIZES = (32, 64, 128, 256, 512)
CAPACITY = 4096  # tokens of a stream
GOAL_WHOLE_ANSWER = 3.0  # two passes / one pass, at least
GOAL_DECODING = 1.05  # ours / transformers' generate per token, at most


@dataclass(frozen=True)
class Bench:
    """What all measurements of one size share."""

    model: VPTForConditionalGeneration
    processor: VPTProcessor
    vocabulary: Vocabulary
    size: Size
    device: torch.device
    new_tokens: int
    repeats: int

    @property
    def is_exact(self) -> bool:
        """Whether different ways to compute must write the same tokens."""
        return self.model.dtype == torch.float32

    def now(self) -> tuple[float, float]:
        """Wall and CPU time in milliseconds, once the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3, time.process_time() * 1e3

    def check_equal(self, what: str, one: Sequence[Any], other: Sequence[Any]) -> bool:
        """Compare tokens; a difference in float32 ends the benchmark."""
        if (equal := list(one) == list(other)) or not self.is_exact:
            return equal
        differ = [(a, b) for a, b in zip(one, other, strict=False) if a != b]
        raise SystemExit(f"{what}: the contestants wrote different tokens, first {differ[:1]}")


def hold_to_length(
    conversation: Exchange, vocabulary: Vocabulary, first: int | None = None
) -> Exchange:
    """Narrow a conversation's rules: one region of two corners, and no end of the answer.

    ``first`` is the token that the model is made to begin with.
    """
    turn_end = vocabulary.ids[TURN_END]
    region = {vocabulary.ids[REGION_START], vocabulary.ids[REGION_END]}
    step = None
    while True:
        try:
            item = conversation.send(step)
        except StopIteration:
            return
        if isinstance(item, Append) and (rule := item.rule) is not None:
            if rule.only is None:
                rule = dataclasses.replace(rule, banned=(*rule.banned, turn_end))
            elif len(rule.only) > 1:
                rule = dataclasses.replace(rule, only=tuple(set(rule.only) - region))
            if first is not None:
                rule, first = TokenRule(only=(first,)), None
            item = dataclasses.replace(item, rule=rule)
        step = yield item


@dataclass
class Run:
    """One answer by one contestant; times are ``(wall, cpu)`` in milliseconds."""

    token_ids: list[int]
    first_token: tuple[float, float]
    after_call: tuple[float, float] | None
    per_token: tuple[float, float]
    total: tuple[float, float]


def _since(start: tuple[float, float], end: tuple[float, float], parts: int = 1) -> Any:
    return tuple((e - s) / parts for s, e in zip(start, end, strict=True))


def run_answer(bench: Bench, engine: Any, request: Request, opener: int | None = None) -> Run:
    """Let the controller answer one request; every token is timed as its event comes out.

    With ``opener`` the model begins with a call.
    """
    start = bench.now()
    conversation = Conversation(request, bench.processor, bench.vocabulary).run()
    conversation = hold_to_length(conversation, bench.vocabulary, opener)
    marks: list[tuple[float, float]] = []
    ids: list[int] = []
    called, first = None, 0  # when the call stood complete; index of the first token after it
    for _, event in drive(engine, [(conversation, request.sampling)], 1):
        if isinstance(event, TokenEvent):
            marks.append(bench.now())
            ids.append(event.token.id)
        elif isinstance(event, CallEvent):
            called = bench.now()
        elif isinstance(event, ResultEvent):
            first = len(marks)
        elif isinstance(event, StopEvent):
            end, reason = bench.now(), event.trace.stop_reason
    if reason != "length" or len(ids) != request.max_new_tokens:
        raise SystemExit(f"a run ended by {reason!r} after {len(ids)} tokens; expected a full one")
    return Run(
        ids,
        _since(start, marks[0]),
        None if called is None else _since(called, marks[first]),
        _since(marks[first], marks[-1], len(marks) - 1 - first),
        _since(start, end),
    )


@dataclass
class KVCopies:
    """Counts the bytes of keys and values in deep copies of a cache.

    Not counted: ``torch.cat`` inside ``DynamicCache``, by which each of its updates makes new
    tensors. The slot cache has fixed buffers, and no prefixes are kept here, so ours copies none.
    """

    num_bytes: int = 0

    def watch(self) -> Any:
        """Count during a ``with`` block."""
        original = copy.deepcopy

        def deepcopy(value: Any, memo: Any = None) -> Any:
            if isinstance(value, DynamicCache):
                self.num_bytes += sum(la.keys.nbytes + la.values.nbytes for la in value.layers)
            return original(value, memo)

        return mock.patch.object(copy, "deepcopy", deepcopy)


def engine_of(bench: Bench, num_slots: int = 1) -> Engine:
    """An engine that keeps no prefixes: each repeat costs what the first one costs."""
    encoders = Encoders(bench.model, bench.processor)
    return Engine(bench.model, encoders, num_slots, CAPACITY, prefix_bytes=0)


def measure_single_pass(bench: Bench, mode: str) -> dict[str, Any]:
    """A whole answer with one perception call, by one pass and by the released protocol."""
    image = picture(bench.size.image_wh)
    request = Request(
        images=[image],
        question=invite(QUESTION, mode),
        max_calls=1,
        max_new_tokens=bench.new_tokens + CALL_LENGTHS[mode],
    )
    (branch,) = branches_of_mode(mode, bench.vocabulary.branches)
    opener = bench.vocabulary.opener(branch)
    engine = engine_of(bench)
    facts: dict[str, dict[str, Any]] = {"single_pass": {}, "two_pass": {}}

    def run(name: str, watch: bool = False) -> Run:
        one = engine if name == "single_pass" else TwoPassEngine(bench.model, bench.processor)
        engine.encoders.cache = FeatureCache()  # the first look costs what it costs
        before = (one.num_tokens_run, one.num_forwards, one.encoders.num_encoded)
        copies = KVCopies()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
            held = torch.cuda.memory_allocated(bench.device)
        if watch:
            with copies.watch():
                result = run_answer(bench, one, request, opener)
            facts[name]["kv_bytes_copied"] = copies.num_bytes
        else:
            result = run_answer(bench, one, request, opener)
        after = (one.num_tokens_run, one.num_forwards, one.encoders.num_encoded)
        counts = [a - b for a, b in zip(after, before, strict=True)]
        names = ("llm_tokens", "llm_forwards", "encoder_runs")
        facts[name].update(zip(names, counts, strict=True))
        if bench.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(bench.device) - held
            own = engine.cache.num_bytes if one is engine else 0  # is there before the run
            facts[name]["peak_memory_bytes"] = peak + own
        return result

    def run_afresh(name: str) -> None:
        two_pass = TwoPassEngine(bench.model, bench.processor)
        one = two_pass if name == "two_pass" else engine_of(bench)
        run_answer(bench, one, request, opener)

    names = tuple(facts)
    if bench.device.type == "cpu":
        for name in names:
            facts[name]["peak_memory_bytes"] = peak_memory(lambda n=name: run_afresh(n))
    warm = {name: run(name, watch=True) for name in names}
    runs = take_turns({name: lambda n=name: run(n) for name in names}, bench.repeats)
    all_ids = [r.token_ids for name in names for r in [warm[name], *runs[name]]]
    equal = all(bench.check_equal(mode, all_ids[0], ids) for ids in all_ids)
    measures = ("first_token", "after_call", "per_token", "total")
    return {
        "tokens_equal": equal,
        "num_tokens": len(all_ids[0]),
        "contestants": {
            name: {**facts[name], "ms": _times(runs[name], measures)} for name in names
        },
        "ratios": {m: _ratios(runs["two_pass"], runs["single_pass"], m) for m in measures},
        "llm_tokens_ratio": facts["two_pass"]["llm_tokens"] / facts["single_pass"]["llm_tokens"],
    }


class _Marks(BaseStreamer):
    """Times and keeps the tokens that ``generate`` hands out; the first is the prompt."""

    def __init__(self, now: Callable[[], tuple[float, float]]) -> None:
        self.now = now
        self.marks: list[tuple[float, float]] = []
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.marks.append(self.now())
        self.ids.append(int(value.flatten()[-1]))

    def end(self) -> None:
        """Nothing is left to hand out."""


def measure_plain_answer(bench: Bench) -> dict[str, Any]:
    """An answer without perception, by the controller and by ``generate``.

    Both start from picture and question. A token is timed when it is known on the CPU: ours as
    its event comes out, that of ``generate`` as its streamer gets it. Time per token is between
    the first and the last one.
    """
    image = picture(bench.size.image_wh)
    request = Request(
        images=[image],
        question=QUESTION,
        perception="none",
        max_new_tokens=bench.new_tokens,
        constrain=False,
    )
    plain = plain_model(bench.model)
    engine = engine_of(bench)
    contestants = {
        "ours": lambda: run_answer(bench, _fresh(engine), request),
        "generate": lambda: _run_generate(bench, plain, image),
        "generate, static cache": lambda: _run_generate(bench, plain, image, "static"),
    }
    warm = take_turns(contestants, 1)
    runs = take_turns(contestants, bench.repeats)
    all_ids = [r.token_ids for group in (warm, runs) for name in group for r in group[name]]
    equal = all(bench.check_equal("plain answer", all_ids[0], ids) for ids in all_ids)
    measures = ("first_token", "per_token", "total")
    return {
        "tokens_equal": equal,
        "num_tokens": len(all_ids[0]),
        "contestants": {name: {"ms": _times(runs[name], measures)} for name in contestants},
        "ratios": {m: _ratios(runs["ours"], runs["generate"], m) for m in measures},
        "static_ratios": {
            m: _ratios(runs["ours"], runs["generate, static cache"], m) for m in measures
        },
    }


def _fresh(engine: Engine) -> Engine:
    engine.encoders.cache = FeatureCache()
    return engine


def _run_generate(bench: Bench, plain: Any, image: LoadedImage, cache: str | None = None) -> Run:
    start = bench.now()
    pixel_values, grid_thw = bench.processor.preprocess_images([image])
    num_places = int(grid_thw[0].prod()) // bench.processor.image_processor.merge_size**2
    image_id = bench.vocabulary.ids[IMAGE_PAD]
    ids: list[int] = []
    for piece in bench.processor.prompt(QUESTION, [image]):
        ids += [image_id] * num_places if isinstance(piece, ImagePiece) else piece.ids
    input_ids = torch.tensor([ids], device=bench.device)
    streamer = _Marks(bench.now)
    plain.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=pixel_values.to(bench.device, bench.model.dtype),
        image_grid_thw=grid_thw.to(bench.device),
        mm_token_type_ids=(input_ids == image_id).int(),
        generation_config=GenerationConfig(
            max_new_tokens=bench.new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        ),
        streamer=streamer,
    )
    end = bench.now()
    marks, written = streamer.marks[1:], streamer.ids[1:]
    if len(written) != bench.new_tokens:
        raise SystemExit(f"generate wrote {len(written)} tokens instead of {bench.new_tokens}")
    per_token = _since(marks[0], marks[-1], len(marks) - 1)
    return Run(written, _since(start, marks[0]), None, per_token, _since(start, end))


def measure_batching(bench: Bench, batch_size: int) -> dict[str, Any]:
    """Requests of mixed modes on different pictures, many streams at once and one by one."""
    runtime = Runtime(
        bench.model,
        bench.processor,
        max_num_seqs=batch_size,
        max_model_len=CAPACITY,
        prefix_cache_bytes=0,
    )
    requests = [
        runtime.request(
            picture(bench.size.image_wh, seed=number),
            QUESTION,
            perception=MIXED_MODES[number % len(MIXED_MODES)],
            max_calls=1,
            max_new_tokens=bench.new_tokens + max(CALL_LENGTHS.values()),
        )
        for number in range(batch_size)
    ]

    def run(size: int) -> Run:
        runtime.encoders.cache = FeatureCache()
        start = bench.now()
        answers = runtime.ask_many(requests, batch_size=size)
        total = _since(start, bench.now())
        ids = [[token.id for token in answer.trace.tokens] for answer in answers]
        num_tokens = sum(len(one) for one in ids)
        return Run(ids, total, None, tuple(t / num_tokens for t in total), total)  # type: ignore[arg-type]

    contestants = {"one by one": lambda: run(1), f"batch of {batch_size}": lambda: run(batch_size)}
    warm = take_turns(contestants, 1)
    runs = take_turns(contestants, bench.repeats)
    all_ids = [r.token_ids for group in (warm, runs) for name in group for r in group[name]]
    equal = all(bench.check_equal("batching", all_ids[0], ids) for ids in all_ids)
    single, batched = runs.values()
    return {
        "tokens_equal": equal,
        "num_requests": batch_size,
        "num_tokens": sum(len(one) for one in all_ids[0]),
        "contestants": {name: {"ms": _times(runs[name], ("total",))} for name in contestants},
        "ratios": {"total": _ratios(single, batched, "total")},
    }


@torch.inference_mode()
def measure_extension(bench: Bench) -> dict[str, Any]:
    """Appending tokens behind a prompt, against running prompt and tokens anew."""
    engine = engine_of(bench)
    prompt = bench.processor.prompt(QUESTION, [picture(bench.size.image_wh)])
    base = engine.open()
    engine.extend(base, prompt)  # the picture's features are kept from now on
    engine.close(base)
    generator = torch.Generator().manual_seed(0)
    rows: dict[int, dict[str, Any]] = {}
    for size in EXTENSION_SIZES:
        ids = tuple(torch.randint(0, 200, (size,), generator=generator).tolist())

        def append(ids: tuple[int, ...] = ids) -> Any:
            stream = engine.open()
            engine.extend(stream, prompt)
            start = bench.now()
            engine.extend(stream, [TokenPiece(ids)])
            took = _since(start, bench.now())
            engine.close(stream)
            return took

        def rerun(ids: tuple[int, ...] = ids) -> Any:
            stream = engine.open()
            start = bench.now()
            engine.extend(stream, [*prompt, TokenPiece(ids)])
            took = _since(start, bench.now())
            engine.close(stream)
            return took

        contestants = {"append": append, "rerun": rerun}
        take_turns(contestants, 1)
        rows[size] = {
            name: {kind: [took[i] for took in times] for i, kind in enumerate(KINDS)}
            for name, times in take_turns(contestants, bench.repeats).items()
        }
    fits = {}
    for kind in KINDS:
        medians = [statistics.median(rows[size]["append"][kind]) for size in EXTENSION_SIZES]
        slope, intercept = np.polyfit(EXTENSION_SIZES, medians, 1)
        fits[kind] = {"ms_per_token": float(slope), "ms_at_zero": float(intercept)}
    return {"prompt_tokens": base.length, "ms": rows, "fit": fits}


def _times(runs: Sequence[Run], measures: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Raw repeats: measure -> ``wall`` and ``cpu`` -> milliseconds."""
    return {
        measure: {kind: [getattr(run, measure)[i] for run in runs] for i, kind in enumerate(KINDS)}
        for measure in measures
    }


def _ratios(above: Sequence[Run], below: Sequence[Run], measure: str) -> dict[str, list[float]]:
    """Ratios within each turn, by wall and by CPU time."""
    pairs = [(getattr(a, measure), getattr(b, measure)) for a, b in zip(above, below, strict=True)]
    return {kind: [a[i] / b[i] for a, b in pairs] for i, kind in enumerate(KINDS)}


def judge(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Compare what was measured with the goals, by wall or CPU time."""
    goals = []
    for mode, section in result["single_pass"].items():
        ratio = statistics.median(section["ratios"]["total"][kind])
        name = f"whole answer, {mode} call: two passes / one pass >= {GOAL_WHOLE_ANSWER}"
        goals.append({"goal": name, "ratio": ratio, "met": ratio >= GOAL_WHOLE_ANSWER})
    ratio = statistics.median(result["plain_answer"]["ratios"]["per_token"][kind])
    name = f"decoding: ours / transformers' generate <= {GOAL_DECODING}"
    goals.append({"goal": name, "ratio": ratio, "met": ratio <= GOAL_DECODING})
    return goals


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one size, printed as they come."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    size = SIZES[name]
    model, processor = build(size, device, dtype, args.backbone)
    config = model.config
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, config.branches, config.grid_size)
    bench = Bench(model, processor, vocabulary, size, device, args.new_tokens, args.repeats)
    parts = {"llm": model.model.language_model, "tower": model.model.visual, **model.branches}
    parameters = {k: sum(p.numel() for p in part.parameters()) for k, part in parts.items()}
    counts = ", ".join(f"{part} {count / 1e6:.2f}" for part, count in parameters.items())
    print(f"== {name}: million parameters: {counts}; picture {size.image_wh} px ==\n")
    kind = "cpu" if device.type == "cpu" else "wall"
    result: dict[str, Any] = {"parameters": parameters, "judged_by": kind}
    result["single_pass"] = {mode: measure_single_pass(bench, mode) for mode in CALL_LENGTHS}
    print_single_pass(result["single_pass"])
    result["plain_answer"] = measure_plain_answer(bench)
    print_plain_answer(result["plain_answer"])
    result["batching"] = {size: measure_batching(bench, size) for size in args.batch_size}
    for section in result["batching"].values():
        print_batching(section)
    result["extension"] = measure_extension(bench)
    print_extension(result["extension"], kind)
    result["goals"] = judge(result, kind)
    rows = [
        [g["goal"], f"{g['ratio']:.2f}", "met" if g["met"] else "not met"] for g in result["goals"]
    ]
    print_table([f"Goals, by {kind} time", "measured", ""], rows)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--backbone", choices=list(BACKBONES), default="qwen2_vl")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--new-tokens", type=int, default=16, help="of an answer, after the call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here, raw repeats included")
    args = parser.parse_args(argv)
    if min(args.new_tokens - 1, args.repeats, *args.batch_size, args.threads) < 1:
        parser.error("--new-tokens must be at least 2, the other numbers at least 1")
    torch.set_num_threads(args.threads)
    about = announce(args)
    sizes = {name: measure(name, args) for name in args.size}
    report = {**about, "sizes": sizes}
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
