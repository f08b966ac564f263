"""Samples per second of ``vpt eval --perception tool-value``, with kept prefixes and without.

    python benchmarks/tool_value.py data/embedded/heldout.jsonl --before ../vpt-before

Each contestant is a process of its own; they take turns. ``--before`` names a checkout of an
earlier version, which asks the same samples. Time is CPU time of the asking alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import announce, save, take_turns
from single_pass_tables import print_table, spread


def ask(args: argparse.Namespace) -> None:
    """Print seconds and answers of one contestant, with whatever version is imported."""
    import torch

    import vpt
    from vpt.evaluation.evaluate import make_plan
    from vpt.evaluation.runner import Decoding, LocalAsker, Task, Work
    from vpt.evaluation.scores.table import SCORES

    torch.set_num_threads(args.threads)
    names = ["tool-value"]
    plan = make_plan(splits=[args.split], conditions=names, data=Path(), limit=args.limit)
    (planned,) = plan.splits
    split, score = planned.split, SCORES[planned.split.score]
    work = [
        Work(Task(split.name, how, split.prompt, score, split.max_new_tokens), planned.samples)
        for how in plan.conditions
    ]
    options = {} if args.prefix_bytes is None else {"prefix_cache_bytes": args.prefix_bytes}
    asker = LocalAsker(vpt.load(args.model, device=args.device, **options))
    started = time.process_time()
    records = list(asker.ask(work, Decoding(), args.batch_size))
    seconds = time.process_time() - started
    answers = {" ".join(record.key): record.prediction for record in records}
    print(json.dumps({"seconds": seconds, "answers": answers}))


def run_child(args: argparse.Namespace, prefix_bytes: int | None, root: Path) -> dict[str, Any]:
    """Seconds and answers of one contestant; ``root`` is the checkout it imports."""
    options = {
        "limit": args.limit,
        "batch-size": args.batch_size,
        "threads": args.threads,
        "device": args.device,
        "model": args.model,
        "prefix-bytes": prefix_bytes,
    }
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    done = subprocess.run(
        [sys.executable, __file__, args.split, "--child", *words],
        env={**os.environ, "PYTHONPATH": str(root.resolve())},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("split", help="a file, as `vpt eval --splits` takes it")
    parser.add_argument("--before", type=Path, help="checkout of an earlier version")
    parser.add_argument("--model", help="folder; the embedded model if missing")
    parser.add_argument("--limit", type=int, default=100, help="so many samples")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--prefix-bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        ask(args)
        return {}
    report, here = announce(args), Path(__file__).parents[1]
    contestants = {
        "prefixes kept": lambda: run_child(args, 2**29, here),
        "no prefixes": lambda: run_child(args, 0, here),
    }
    if args.before is not None:
        contestants["before"] = lambda: run_child(args, None, args.before)
    runs = take_turns(contestants, args.repeats)
    kept, rows = runs["prefixes kept"], []
    for name, of in runs.items():
        rates = [len(one["answers"]) / one["seconds"] for one in of]
        gains = [b["seconds"] / a["seconds"] for a, b in zip(kept, of, strict=True)]
        equal = sum(a == of[0]["answers"].get(key) for key, a in kept[0]["answers"].items())
        total = len(of[0]["answers"])
        rows.append([name, spread(rates), spread(gains, 2), f"{equal} of {total}"])
        report[name] = {"samples_per_s": rates, "gain": gains, "equal": equal, "total": total}
    print_table(["", "samples per second", "gain of prefixes kept", "answers equal"], rows)
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
