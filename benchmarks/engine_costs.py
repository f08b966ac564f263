"""What the engine costs beside the arithmetic that it cannot avoid: random weights, no downloads.

    python benchmarks/engine_costs.py --size small --json out.json
    python benchmarks/engine_costs.py --size 2b 7b --device cuda --dtype bfloat16

Contestants share weights, take turns and must write the same tokens; ratios are taken within a
turn, of CPU time on a CPU and of wall time on a GPU. On a GPU a decoded token is also measured
without CUDA graphs. Whole answers, batches and transformers' ``generate`` are in
``single_pass.py``, which takes the same options.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peak_memory import peak_memory
from random_models import SIZES, build, picture
from reporting import announce, save, take_turns
from single_pass import Bench, engine_of
from single_pass_tables import print_table, spread
from torch.profiler import ProfilerActivity, profile

from vpt.inference.cache import SlotCache, SlotRun, attend_step
from vpt.inference.engine import Engine
from vpt.inference.events import TokenEvent
from vpt.inference.features import Encoders, FeatureCache
from vpt.inference.prefixes import PrefixStore
from vpt.inference.sampling import Choice
from vpt.inference.stream import Stream
from vpt.model.processing import FeaturePiece, TokenPiece
from vpt.protocol.grammar import TokenRule
from vpt.protocol.tokens import BRANCH_TOKENS, Vocabulary
from vpt.runtime import Runtime

PROMPT_TOKENS = 300
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
Times = dict[str, list[float]]


def clock(bench: Bench) -> float:
    """Milliseconds: of CPU time on a CPU, of wall time on a GPU."""
    return bench.now()[bench.device.type == "cpu"]


def timed(bench: Bench, work: Callable[[], Any], number: int = 1) -> float:
    """Milliseconds of one of ``number`` equal pieces of work."""
    start = clock(bench)
    for _ in range(number):
        work()
    return (clock(bench) - start) / number


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios within each turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def text(length: int) -> list[TokenPiece]:
    """A prompt of bytes."""
    return [TokenPiece(tuple(index % 200 for index in range(length)))]


def products(bench: Bench, batch: int) -> Callable[[], None]:
    """The matrix products of one decoding step, and nothing else."""
    layers = bench.model.model.language_model.layers
    linears = [m for la in layers for m in la.modules() if isinstance(m, torch.nn.Linear)]
    linears.append(bench.model.lm_head)
    weight = bench.model.lm_head.weight
    pairs = [(weight.new_ones(batch, one.in_features), one) for one in linears]

    def run() -> None:
        for rows, one in pairs:
            F.linear(rows, one.weight, one.bias)

    return run


@torch.inference_mode()
def measure_decoding(bench: Bench, batch: int) -> dict[str, Any]:
    """A decoded token of each of ``batch`` streams, against the bare matrix products."""
    engine = engine_of(bench, batch)
    choice = [Choice(TokenRule(banned=(1, 2, 3)))] * batch
    written: dict[str, list[int]] = {}

    def decode(name: str, captures: bool, watcher: Any = None) -> float:
        engine._step._captures = captures
        streams = [engine.open() for _ in range(batch)]
        for one in streams:
            engine.extend(one, text(PROMPT_TOKENS))
        ids, all_ids = [5] * batch, list[int]()
        start = clock(bench)
        with watcher or nullcontext():
            for _ in range(bench.new_tokens):
                ids = engine.decode(streams, ids, choice)
                all_ids += ids
        took = (clock(bench) - start) / bench.new_tokens
        for one in streams:
            engine.close(one)
        if captures and not engine._step._captures:
            raise SystemExit("the step could not be captured; see the log")
        written[name] = all_ids
        return took

    on_gpu = bench.device.type == "cuda"
    bare = products(bench, batch)
    contestants = {
        "ours": lambda: decode("ours", on_gpu),
        "matrix products": lambda: timed(bench, bare, bench.new_tokens),
    }
    if on_gpu:
        contestants["ours, eager"] = lambda: decode("ours, eager", False)
    take_turns(contestants, 1)
    profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    decode("ours, profiled", on_gpu, profiler)
    times = take_turns(contestants, bench.repeats)
    first, *others = written.values()
    equal = all(bench.check_equal("decoding", first, other) for other in others)
    layers = bench.model.model.language_model.layers
    num_bytes = sum(p.nbytes for p in layers.parameters()) + bench.model.lm_head.weight.nbytes
    limit = num_bytes / _copy_bandwidth(bench) * 1e3
    return {
        "ms": times,
        "tokens_equal": equal,
        "host_ns": _host_ns(profiler) / bench.new_tokens,
        "limit_ms": limit,
        "ratio": ratios(times["ours"], times["matrix products"]),
        "share_of_bandwidth": [limit / one for one in times["ours"]],
        "graph_gain": ratios(times["ours, eager"], times["ours"]) if on_gpu else None,
    }


def _host_ns(profiler: Any) -> float:
    """Host time that the profiler has counted, waiting for the device excepted."""
    events = profiler.key_averages()
    return sum(event.self_cpu_time_total for event in events if event.key not in WAITS) * 1e3


def _copy_bandwidth(bench: Bench) -> float:
    """Bytes read and written per second by the copy of a large tensor; the best of five."""
    source = torch.ones(2**28 if bench.device.type == "cuda" else 2**25, device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    took = min(timed(bench, lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / took * 1e3


def measure_prefill(bench: Bench, number: int, with_encoders: bool) -> dict[str, Any]:
    """``number`` prompts with different pictures and questions, together against one by one."""
    engine = engine_of(bench, number)
    prompts = [
        bench.processor.prompt(f"What is at {n}?", [picture(bench.size.image_wh, seed=n)])
        for n in range(number)
    ]
    chosen: dict[bool, list[int]] = {}

    def read(together: bool) -> float:
        if with_encoders:
            engine.encoders.cache = FeatureCache()
        streams = [engine.open() for _ in prompts]
        start, logits = clock(bench), []
        for group in [range(number)] if together else [[n] for n in range(number)]:
            encoded = engine.encode([prompts[n] for n in group])
            waiting = [
                engine.begin(streams[n], prompts[n], e) for n, e in zip(group, encoded, strict=True)
            ]
            while unread := [one for one in waiting if one.extension is None]:
                engine.prefill(unread)
            logits += [one.extension.logits for one in waiting if one.extension is not None]
        chosen[together] = engine.choose(logits, [Choice()] * number)
        took = clock(bench) - start
        for stream in streams:
            engine.close(stream)
        return took

    contestants = {"together": lambda: read(True), "one by one": lambda: read(False)}
    take_turns(contestants, 1)
    times = take_turns(contestants, bench.repeats)
    equal = bench.check_equal("prefill", chosen[True], chosen[False])
    gain = ratios(times["one by one"], times["together"])
    return {"ms": times, "tokens_equal": equal, "ratio": gain}


def measure_follow_up(bench: Bench) -> dict[str, Any]:
    """The second question of a chat, whose first had a call, against reading all of it again."""
    image = picture(bench.size.image_wh)
    runtimes = {
        name: Runtime(
            bench.model,
            bench.processor,
            max_num_seqs=1,
            max_model_len=4096,
            prefix_cache_bytes=num_bytes,
        )
        for name, num_bytes in (("follow-up", 2**29), ("all again", 0))
    }
    answers: dict[str, str] = {}

    def ask(name: str) -> tuple[float, float]:
        runtime = runtimes[name]
        runtime.engine.prefixes = PrefixStore(runtime.engine.prefixes.max_bytes)
        chat = runtime.chat([image], max_new_tokens=bench.new_tokens, max_calls=1)
        chat.ask("What stands on the hill?", perception="clip")
        if name == "all again":
            runtime.encoders.cache = FeatureCache()
        start, first = clock(bench), 0.0
        for event in chat.stream("And which colour has it?", perception="none"):
            if isinstance(event, TokenEvent) and not first:
                first = clock(bench) - start
        took = clock(bench) - start
        answers[name] = chat.answers[-1].text
        return first, took

    contestants = {name: lambda n=name: ask(n) for name in runtimes}
    take_turns(contestants, 1)
    runs = take_turns(contestants, bench.repeats)
    for runtime in runtimes.values():
        runtime.close()
    measures = ("first token", "whole answer")
    times = {m: {n: [one[i] for one in runs[n]] for n in runs} for i, m in enumerate(measures)}
    equal = bench.check_equal("follow-up", answers["follow-up"], answers["all again"])
    gain = {m: ratios(of["all again"], of["follow-up"]) for m, of in times.items()}
    return {"ms": times, "tokens_equal": equal, "ratio": gain}


@torch.inference_mode()
def measure_lengths(bench: Bench, lengths: Sequence[int]) -> dict[str, Any]:
    """A decoded token against the length of its stream, and what attention alone takes."""
    encoders = Encoders(bench.model, bench.processor)
    engine = Engine(bench.model, encoders, 1, lengths[-1] + 1024, prefix_bytes=0)
    stream, times = engine.open(), {"a token": list[float](), "attention alone": list[float]()}
    for length in lengths:
        engine.extend(stream, text(length - stream.length))
        rounds: Times = {name: [] for name in times}
        for _ in range(bench.repeats):
            step = timed(bench, lambda: engine.decode([stream], [5], [Choice()]), bench.new_tokens)
            rounds["a token"].append(step)
            rounds["attention alone"].append(_attention(bench, engine, stream))
        for name, values in rounds.items():
            times[name].append(statistics.median(values))
    fits = {name: np.polyfit(lengths, values, 1).tolist() for name, values in times.items()}
    return {"lengths": list(lengths), "ms": times, "ms_per_1000_tokens": _slopes(fits)}


def _attention(bench: Bench, engine: Engine, stream: Stream) -> float:
    config = bench.model.config.text_config
    heads, width = config.num_attention_heads, config.hidden_size
    query = bench.model.lm_head.weight.new_ones(1, heads, width // heads)
    run = SlotRun(slice(0, 1), slice(stream.slot, stream.slot + 1), stream.length, True)

    def attend() -> None:
        for layer in range(config.num_hidden_layers):
            attend_step(engine.cache, layer, query, [run], [None], 0.1)

    return timed(bench, attend, bench.new_tokens)


def _slopes(fits: dict[str, list[float]]) -> dict[str, float]:
    return {name: slope * 1e3 for name, (slope, _) in fits.items()}


def measure_calls(bench: Bench, number: int) -> dict[str, Any]:
    """The cost of each of ``number`` re-encodings in one stream; the features are at hand."""
    engine, row = engine_of(bench), BRANCH_TOKENS["reencode"]
    ids = bench.vocabulary.ids
    opening, closing_ = TokenPiece((ids[row.start],)), TokenPiece((ids[row.end],))
    action = TokenPiece((ids[row.action],))
    call = [opening, action, FeaturePiece("reencode", picture(bench.size.image_wh)), closing_]
    rounds = []
    for _ in range(bench.repeats + 1):
        stream = engine.open()
        engine.extend(stream, text(PROMPT_TOKENS))
        rounds.append(
            [timed(bench, lambda s=stream: engine.extend(s, call)) for _ in range(number)]
        )
        tokens = (stream.length - PROMPT_TOKENS) // number
        engine.close(stream)
    times = [statistics.median(of) for of in zip(*rounds[1:], strict=True)]
    slope, start = np.polyfit(range(number), times, 1).tolist()
    return {"tokens_per_call": tokens, "ms": times, "first_ms": start, "ms_per_earlier_call": slope}


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Bytes per token of stream: computed, and as resident memory rises with the length."""
    config = bench.model.config.text_config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = config.num_hidden_layers, config.num_key_value_heads, head_dim
    computed = SlotCache.bytes_per_token(*shape, bench.model.dtype.itemsize)

    def fill(length: int) -> None:
        encoders = Encoders(bench.model, bench.processor)
        engine = Engine(bench.model, encoders, 1, 4096, prefix_bytes=0)
        stream = engine.open()
        for _ in range(length // 32):  # small passes, so that the cache is what grows
            engine.extend(stream, text(32))

    peaks = [peak_memory(lambda n=n: fill(n)) for n in (512, 2048)]
    measured = None if None in peaks else (peaks[1] - peaks[0]) / 1536  # type: ignore[operator]
    return {"computed": computed, "measured": measured}


def report_memory(bench: Bench, args: argparse.Namespace) -> dict[str, Any] | None:
    """Table of :func:`measure_memory`, which a GPU has no use for."""
    if bench.device.type != "cpu":
        return None
    result = measure_memory(bench)
    print(f"  bytes per token of stream: {result['computed']}, measured {result['measured']}\n")
    return result


def report_decoding(bench: Bench, args: argparse.Namespace) -> dict[int, Any]:
    """Table of :func:`measure_decoding`."""
    results = {batch: measure_decoding(bench, batch) for batch in args.batch_size}
    header = ["ours, ms", "products, ms", "ratio", "of bandwidth", "graph", "host, us"]
    rows = []
    for batch, of in results.items():
        times = (spread(of["ms"][name], 2) for name in ("ours", "matrix products"))
        shares = (spread(of[name], 2) for name in ("ratio", "share_of_bandwidth"))
        graph = spread(of["graph_gain"], 2) if of["graph_gain"] else "not run"
        rows.append([f"batch {batch}", *times, *shares, graph, f"{of['host_ns'] / 1e3:.0f}"])
    print_table(["A decoded token", *header], rows)
    return results


def report_prefill(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Table of :func:`measure_prefill`."""
    kinds = {"LLM": False, "encoders and LLM": True}
    results = {name: measure_prefill(bench, args.prompts, kind) for name, kind in kinds.items()}
    _print_pairs(f"{args.prompts} prompts", results)
    return results


def report_follow_up(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Table of :func:`measure_follow_up`."""
    result = measure_follow_up(bench)
    rows = {m: {"ms": result["ms"][m], "ratio": result["ratio"][m]} for m in result["ms"]}
    _print_pairs("A follow-up question", rows)
    return result


def report_lengths(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Table of :func:`measure_lengths`."""
    result = measure_lengths(bench, args.lengths)
    columns = zip(*result["ms"].values(), strict=True)
    rows = [
        [str(length), *(f"{one:.2f}" for one in times)]
        for length, times in zip(args.lengths, columns, strict=True)
    ]
    slopes = [f"{slope:.3f}" for slope in result["ms_per_1000_tokens"].values()]
    header = (f"{name}, ms" for name in result["ms"])
    print_table(["Tokens in the stream", *header], [*rows, ["per 1,000 tokens", *slopes]])
    return result


def report_calls(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Line of :func:`measure_calls`."""
    result = measure_calls(bench, args.calls)
    times = " ".join(f"{one:.0f}" for one in result["ms"])
    print(f"  calls of {result['tokens_per_call']} tokens in one stream, ms: {times}")
    print(
        f"  fit: {result['first_ms']:.0f} + {result['ms_per_earlier_call']:.1f} per call before\n"
    )
    return result


PARTS = {
    "memory": report_memory,  # in a child process, before other threads exist
    "decoding": report_decoding,
    "prefill": report_prefill,
    "lengths": report_lengths,
    "calls": report_calls,
    "follow-up": report_follow_up,
}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The parts asked for of one size, printed as they come."""
    size, device = SIZES[name], torch.device(args.device)
    model, processor = build(size, device, getattr(torch, args.dtype))
    config = model.config
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, config.branches, config.grid_size)
    bench = Bench(model, processor, vocabulary, size, device, args.new_tokens, args.repeats)
    print(f"== {name}: median [least-greatest] of {args.repeats} ==\n")
    return {part: report(bench, args) for part, report in PARTS.items() if part in args.parts}


def _print_pairs(title: str, rows: dict[str, dict[str, Any]]) -> None:
    names = list(next(iter(rows.values()))["ms"])
    print_table(
        [title, *(f"{name}, ms" for name in names), "ratio"],
        [
            [n, *(spread(of["ms"][k]) for k in names), spread(of["ratio"], 2)]
            for n, of in rows.items()
        ],
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--new-tokens", type=int, default=16, help="of an answer or a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here, raw repeats included")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        print("no GPU: CUDA graphs, and the shapes of 2B and 7B models, are not run")
    report = {**announce(args), "sizes": {name: measure(name, args) for name in args.size}}
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
