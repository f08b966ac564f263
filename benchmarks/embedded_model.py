"""Measure the embedded model on its held-out questions, and what its second looks are worth.

Run ``python benchmarks/embedded_model.py --model models/embedded/3-language --baseline
models/embedded/3-baseline --data data/embedded --out results``. Intervals are 95 % ones of Wilson.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

import vpt
from recipes.embedded.make import answering_row
from recipes.embedded.questions import Question
from vpt.boxes import GridBox, contains
from vpt.evaluation.intervals import wilson_interval
from vpt.images import load_image
from vpt.model.encoding import IGNORE_INDEX, RowEncoder, collate
from vpt.model.segments import SegmentReader
from vpt.runtime import Answer, Runtime

Entry = Mapping[str, Any]
GRID_SIZE = 8


def cell_of(entry: Entry, size_px: int = 448) -> GridBox:
    """The grid cell that holds the middle of the evidence."""
    x0, y0, x1, y1 = entry["box"]
    x, y = (int(v * GRID_SIZE / (2 * size_px)) for v in (x0 + x1, y0 + y1))
    return GridBox(x, y, x, y)


def ask_all(
    runtime: Runtime,
    entries: Sequence[Entry],
    folder: Path,
    batch_size: int,
    what: str,
    **options: Any,
) -> list[Answer]:
    """Answers to the entries, in order; ``options`` may hold functions of an entry."""
    requests = []
    for entry in entries:
        own = {key: value(entry) if callable(value) else value for key, value in options.items()}
        image = str(folder / entry["image"])
        requests.append({"images": image, "question": entry["question"], **own})
    settings = {"max_new_tokens": 24, "max_calls": 1}
    answers = runtime.ask_many(
        [{**settings, **request} for request in requests], batch_size=batch_size
    )
    return list(tqdm(answers, total=len(requests), desc=what, mininterval=5))


def is_right(entry: Entry, answer: Answer) -> bool:
    """Whether the answer is the expected word."""
    return answer.text.strip().lower() == str(entry["answer"])


def mode_taken(answer: Answer) -> str:
    """How the model looked: ``direct``, ``region``, ``clip``, ``dino`` or ``sam``."""
    names = {"crop": "region", "reencode": "clip"}
    calls = [call for call in answer.trace.calls if call.outcome == "executed"]
    return names.get(calls[0].branch, calls[0].branch) if calls else "direct"


def is_hit(entry: Entry, answer: Answer) -> bool:
    """Whether the first crop shows the whole evidence."""
    calls = [call for call in answer.trace.calls if call.box_xyxy_px is not None]
    return bool(calls) and contains(calls[0].box_xyxy_px, tuple(entry["box"]))


def accuracies(entries: Sequence[Entry], answers: Sequence[Answer]) -> dict[str, Any]:
    """Per mode and family, per mode, and overall: right, total, share, interval."""
    return tally(entries, [is_right(e, a) for e, a in zip(entries, answers, strict=True)])


def tally(entries: Sequence[Entry], are_right: Iterable[bool]) -> dict[str, Any]:
    """Likewise, of what is known to be right."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for entry, is_it in zip(entries, are_right, strict=True):
        mode, family = entry["mode"], entry["family"]
        for name in (f"{mode}-{family}", mode, "all"):
            total[name] += 1
            right[name] += is_it
    return {name: _share(right[name], total[name]) for name in sorted(total)}


def _share(right: int, total: int) -> dict[str, Any] | None:
    """``None`` if nothing was asked, as may be after ``--limit``."""
    if total == 0:
        return None
    interval = wilson_interval(right, total)
    return {
        "right": right,
        "total": total,
        "share": round(interval.mean, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
    }


def shuffled(runtime: Runtime, batch_size: int) -> Callable[[Tensor], Tensor]:
    """An intervention that hands each call the control state of the one before it."""
    held: list[Tensor] = []

    def swap(state: Tensor) -> Tensor:
        held.append(state.clone())
        return held.pop(0) if len(held) > 1 else torch.roll(state, 1)

    return swap


def answers_hidden(
    runtime: Runtime, entries: Sequence[Entry], folder: Path, batch_size: int, zeroed: bool
) -> list[bool]:
    """Whether re-encodings are answered rightly with the question hidden, as in training.

    The whole first turn is hidden from the answer, picture and question: what is asked is known
    by the control state alone.

    Args:
        runtime: of the model.
        entries: whose look is a re-encoding.
        folder: of their pictures.
        batch_size: rows at once.
        zeroed: whether the control states are taken away, too.
    """
    model, processor = runtime.model, runtime.processor
    encoder = RowEncoder(model.config, processor, lambda path: load_image(folder / path))
    last_state = SegmentReader.last_state

    def state(reader: SegmentReader, row: int) -> Tensor:
        own = last_state(reader, row)
        return torch.zeros_like(own) if zeroed else own

    masked = {"para_mask_id": 1, "para_mask_ratio": 1.0}
    before = {name: getattr(model.config, name) for name in masked}
    what = "question hidden, control state zeroed" if zeroed else "question hidden"
    found: list[bool] = []
    try:
        for name, value in masked.items():
            setattr(model.config, name, value)
        model.train()
        for first in tqdm(range(0, len(entries), batch_size), desc=what, mininterval=5):
            rows = [
                answering_row(
                    Question(entry["family"], entry["mode"], entry["question"], entry["answer"]),
                    entry["image"],
                )
                for entry in entries[first : first + batch_size]
            ]
            samples = [encoder.encode(row) for row in rows]
            batch = collate(samples, processor.tokenizer.pad_token_id)
            with patch.object(SegmentReader, "last_state", state):
                logits = model(**{name: v.to(runtime.device) for name, v in batch.items()}).logits
            found += [
                _last_answer_is_right(*one) for one in zip(logits, batch["labels"], strict=True)
            ]
    finally:
        model.eval()
        for name, value in before.items():
            setattr(model.config, name, value)
    return found


def _last_answer_is_right(logits: Tensor, labels: Tensor) -> bool:
    """Whether each token of the last turn is the likeliest, the ones before it given."""
    counted = labels.ne(IGNORE_INDEX).nonzero().flatten().tolist()
    first = max(place for place in counted if place - 1 not in counted)
    places = torch.arange(first, counted[-1] + 1)
    return bool((logits[places - 1].argmax(-1).cpu() == labels[places]).all())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every condition, each over all entries it makes sense for."""
    lines = (args.data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines][: args.limit]
    reencoded = [entry for entry in entries if entry["mode"] in ("clip", "dino", "sam")]
    regions = [entry for entry in entries if entry["mode"] == "region"]
    runtime = vpt.load(args.model, device=args.device)

    def run(runtime: Runtime, some: Sequence[Entry], what: str, **options: Any) -> list[Answer]:
        return ask_all(runtime, some, args.data, args.batch_size, what, **options)

    own = run(runtime, entries, "own calls")
    results: dict[str, Any] = {"own calls": accuracies(entries, own)}
    results["forbidden"] = accuracies(
        entries, run(runtime, entries, "forbidden", perception="none")
    )
    oracle = run(runtime, regions, "true region", region=cell_of)
    results["true region"] = accuracies(regions, oracle)
    far = run(runtime, regions, "wrong region", region=lambda entry: elsewhere(cell_of(entry)))
    results["wrong region"] = accuracies(regions, far)
    engine = runtime.engine
    for name, change in (
        ("control state zeroed", torch.zeros_like),
        ("control state shuffled", shuffled(runtime, args.batch_size)),
    ):
        engine.intervene = change
        results[name] = accuracies(reencoded, run(runtime, reencoded, name))
        assert runtime.engine is engine
    engine.intervene = None
    for zeroed in (False, True):
        name = "question hidden" + ", state zeroed" * zeroed
        right = answers_hidden(runtime, reencoded, args.data, args.batch_size, zeroed)
        results[name] = tally(reencoded, right)
    if args.baseline:
        baseline = vpt.load(args.baseline, device=args.device)
        answers = run(baseline, entries, "baseline", perception="none")
        results["baseline"] = accuracies(entries, answers)
    hits = [is_hit(e, a) for e, a in zip(entries, own, strict=True) if e["mode"] == "region"]
    chosen = [mode_taken(a) == e["mode"] for e, a in zip(entries, own, strict=True)]
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    for entry, answer in zip(entries, own, strict=True):
        confusion[entry["mode"]][mode_taken(answer)] += 1
    results["region hit"] = _share(sum(hits), len(hits))
    results["choice of mode"] = _share(sum(chosen), len(chosen))
    results["modes taken"] = {mode: dict(taken) for mode, taken in sorted(confusion.items())}
    return results


def elsewhere(cell: GridBox) -> GridBox:
    """A cell whose crop does not show what the crop of the given one shows."""
    x, y = (cell.x_min + 4) % GRID_SIZE, (cell.y_min + 4) % GRID_SIZE
    return GridBox(x, y, x, y)


def table(results: Mapping[str, Any]) -> str:
    """The accuracies as a Markdown table: a row per family, a column per condition."""
    columns = [name for name, value in results.items() if "all" in value or "region" in value]
    columns = [name for name in columns if isinstance(next(iter(results[name].values())), dict)]
    columns = [name for name in columns if name != "modes taken"]
    rows = list(results["own calls"])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            cell = results[column].get(row)
            cells.append(
                f"{cell['share']:.3f} [{cell['low']:.2f}, {cell['high']:.2f}]" if cell else "-"
            )
        total = results["own calls"][row]["total"]
        lines.append(f"| {row} ({total}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="folder; the embedded model if missing")
    parser.add_argument("--baseline", help="folder of the model trained without perception")
    parser.add_argument("--data", type=Path, default=Path("data/embedded"))
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with torch.inference_mode():
        results = measure(args)
    print(table(results))
    for name in ("region hit", "choice of mode"):
        if share := results[name]:
            print(f"{name}: {share['share']:.3f} [{share['low']:.2f}, {share['high']:.2f}]")
    print(f"modes taken: {results['modes taken']}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
