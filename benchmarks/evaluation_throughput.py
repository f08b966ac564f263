"""Samples per second of the evaluation, beside a plain loop over ``runtime.ask``.

Run as ``python benchmarks/evaluation_throughput.py data/embedded/heldout.jsonl`` after
``python -m recipes make-embedded``. Both read the same pictures and ask the same questions, and
the answers are compared. The evaluation also scores each answer, and has its record on disk before
it continues.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import announce, save
from single_pass_tables import print_table, spread

import vpt
from vpt.evaluation.evaluate import PlannedSplit, make_plan
from vpt.evaluation.records import LineFile
from vpt.evaluation.runner import Decoding, Task, find_conditions, run_tasks
from vpt.evaluation.scores.table import SCORES
from vpt.runtime import Runtime


def loop_over_ask(runtime: Runtime, planned: PlannedSplit) -> dict[str, str]:
    """What somebody would write first: one question after the other; id -> answer."""
    split, answers = planned.split, {}
    for sample in planned.samples:
        images = [image.open() for image in sample.images]
        options = {"max_new_tokens": split.max_new_tokens}
        answers[sample.id] = runtime.ask(images, split.prompt(sample), **options).text
    return answers


def run_evaluation(batch_size: int, runtime: Runtime, planned: PlannedSplit) -> dict[str, str]:
    """The evaluation's own way, scores and durable records included; id -> answer."""
    split = planned.split
    (condition,) = find_conditions(["auto"])
    task = Task(split.name, condition, split.prompt, SCORES[split.score], split.max_new_tokens)
    asked = [(task, sample) for sample in planned.samples]
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        file = LineFile(Path(folder) / "records.jsonl")
        for record in run_tasks(runtime, asked, Decoding(), batch_size):
            file.append(record.to_line())
            answers[record.id] = record.prediction or ""
        file.close()
    return answers


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of each contestant; all are run in every round."""
    plan = make_plan(splits=[args.split], conditions=["auto"], data=Path(), limit=args.limit)
    (planned,) = plan.splits
    contestants = {"loop over ask": loop_over_ask}
    for size in args.batch_sizes:
        contestants[f"evaluation, batch {size}"] = partial(run_evaluation, size)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    equal: dict[str, float] = {}
    for _ in range(args.repeats):
        expected: dict[str, str] = {}
        for name, run in contestants.items():
            runtime = vpt.load(args.model, device=args.device)  # fresh: no features at hand
            started = time.perf_counter()
            answers = run(runtime, planned)
            rates[name].append(len(answers) / (time.perf_counter() - started))
            expected = expected or answers
            same = sum(answers[id] == text for id, text in expected.items())
            equal[name] = min(equal.get(name, 1.0), same / len(expected))
    return {"num_samples": len(planned.samples), "samples_per_s": rates, "answers_equal": equal}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("split", help="a file, as `vpt eval --splits` takes it")
    parser.add_argument("--model", help="folder; the embedded model if missing")
    parser.add_argument("--limit", type=int, default=200, help="so many samples")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args(argv)
    if min(args.limit, args.repeats, args.threads, *args.batch_sizes) < 1:
        parser.error("numbers must be at least 1")
    torch.set_num_threads(args.threads)
    report = {**announce(args), **measure(args)}
    base = report["samples_per_s"]["loop over ask"]
    rows = []
    for name, rates in report["samples_per_s"].items():
        ratios = [rate / b for rate, b in zip(rates, base, strict=True)]
        same = f"{report['answers_equal'][name]:.3f}"
        rows.append([name, spread(rates), spread(ratios, 2), same])
    print(f"{report['num_samples']} samples; median [least-greatest] of {args.repeats}")
    print_table(["", "samples per second", "times the loop", "answers equal"], rows)
    report["ratio"] = {
        name: statistics.median(r / b for r, b in zip(rates, base, strict=True))
        for name, rates in report["samples_per_s"].items()
    }
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
