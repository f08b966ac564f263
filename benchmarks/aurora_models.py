"""Measure small models that write depth maps or boxes before they answer, and one that does not.

Run ``python benchmarks/aurora_models.py count --data data/aurora/count-heldout
--model models/aurora/count --direct models/aurora/count-direct``, or ``depth`` likewise with the
depth tokenizer; ``maps`` and ``boxes`` ask for the content alone. The first model is asked to
write down the steps, unless ``--plain``, the second to answer at once. Intervals are 95 % ones: of
Wilson for shares, of the bootstrap over pictures for the difference.
``--picture`` draws what the first questions made the model write, beside what is there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from aurora_pictures import draw_boxes, draw_maps, true_maps, written_boxes
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

import vpt
from vpt.boxes import iou
from vpt.data import content_rows
from vpt.depth.maps import answer_from_map, depth_at
from vpt.depth.tokenizer import DepthTokenizer, load_depth_tokenizer
from vpt.evaluation.intervals import Interval, difference_interval, wilson_interval
from vpt.runtime import Answer, Runtime

Entry = Mapping[str, Any]
_MAX_NEW_TOKENS = 320
_POINT_BOX = re.compile("([A-E])" + 4 * r"<PIXEL_(\d+)>")


def read_entries(folder: Path, limit: int | None) -> list[dict[str, Any]]:
    """Questions, each with its ``answer``."""
    questions, answers = (
        [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
        for name in ("questions.jsonl", "answers.jsonl")
    )
    by_id = {answer["question_id"]: answer["text"] for answer in answers}
    entries = [{**question, "answer": by_id[question["question_id"]]} for question in questions]
    return entries[:limit]


def ask_for_content(task: str, entry: Entry) -> Entry:
    """The question for the map of the unmarked photo, or for the boxes, in place of another."""
    if task == "maps":
        return {**entry, "image": entry["photo"], "text": content_rows.MAP_QUESTION}
    things = entry["text"].removeprefix("How many ").removesuffix(" are in the image?")
    return {**entry, "text": content_rows.ask_where(things)}


def ask_all(
    runtime: Runtime,
    entries: Sequence[Entry],
    folder: Path,
    suffix: str,
    batch_size: int,
    max_calls: int,
) -> list[Answer]:
    """Answers in order; content is permitted, and so many calls of branches."""
    requests = [
        {
            "images": str(folder / entry["image"]),
            "question": f"{entry['text']} {suffix}".strip(),
            "max_new_tokens": _MAX_NEW_TOKENS,
            "max_calls": max_calls,
        }
        for entry in entries
    ]
    answers = runtime.ask_many(requests, batch_size=batch_size)
    return list(tqdm(answers, total=len(requests), desc=runtime.description["name"], mininterval=5))


def right_depth(entry: Entry, answer: Answer) -> bool:
    """Whether the letter that the answer ends with is the expected one."""
    return f"({content_rows.read_letter(answer.text)})" == entry["answer"]


def right_count(entry: Entry, answer: Answer) -> bool:
    """Whether the number that the answer ends with is the expected one."""
    return str(content_rows.read_count(answer.text)) == entry["answer"]


def _written_places(answer: str) -> dict[str, tuple[int, int]]:
    """Points of an answer in steps, on the 336 grid; of those written as boxes, the middle."""
    boxes = {name: list(map(int, pixels)) for name, *pixels in _POINT_BOX.findall(answer)}
    middles = {name: ((x0 + x1) // 2, (y0 + y1) // 2) for name, (x0, y0, x1, y1) in boxes.items()}
    return middles or content_rows.read_places(answer)


def depth_facts(
    entries: Sequence[Entry], answers: Sequence[Answer], folder: Path, tokenizer: DepthTokenizer
) -> dict[str, str]:
    """What the written maps and places are worth."""
    whole, on_map, supported, off, in_order = [], [], [], [], []
    errors: list[tuple[float, float]] = []
    for entry, answer in zip(entries, answers, strict=True):
        codes = answer.trace.map_codes
        whole.append(codes is not None)
        places = _written_places(answer.trace.turns[-1])
        true = {point["letter"]: (point["x"], point["y"]) for point in entry["points"]}
        off += [np.hypot(*np.subtract(places[name], true[name])) for name in true if name in places]
        if codes:
            written = tokenizer.decode(codes)
            depth, best = true_maps(entry, folder, tokenizer)
            errors.append((np.abs(written - depth).mean(), np.abs(best - depth).mean()))
            for one, other in combinations(entry["points"], 2):
                at_one, at_other = (depth_at(written, p["x"], p["y"]) for p in (one, other))
                in_order.append((at_one > at_other) == (one["depth"] > other["depth"]))
            read = answer_from_map(written, true)
            on_map.append(f"({read.nearest})" == entry["answer"])
            supported.append(read.nearest == content_rows.read_letter(answer.text))
    return {
        "wrote a whole map": share(whole),
        "pairs of points in order on the written map": share(in_order),
        "the written map shows the right point": share(on_map),
        "the written map supports the answer": share(supported),
        "mean error of the written map, of its true codes": "{:.3f}, {:.3f}".format(
            *np.mean(errors, axis=0)
        )
        if errors
        else "-",
        "median error of a point's place, of 336": f"{np.median(off):.1f}" if off else "-",
    }


def count_facts(entries: Sequence[Entry], answers: Sequence[Answer]) -> dict[str, str]:
    """What the written boxes are worth."""
    as_many, found, num_true, num_written = [], 0, 0, 0
    for entry, answer in zip(entries, answers, strict=True):
        boxes = written_boxes(answer)
        num_true += len(entry["boxes"])
        if not boxes:
            continue
        num_written += len(boxes)
        as_many.append(len(boxes) == content_rows.read_count(answer.text))
        overlap = np.array([[iou(box, tuple(true)) for true in entry["boxes"]] for box in boxes])
        pairs = linear_sum_assignment(overlap >= 0.5, maximize=True)
        found += int((overlap[pairs] >= 0.5).sum())
    if not as_many:
        return {"the answer is the number of written boxes": "-"}
    return {
        "the answer is the number of written boxes": share(as_many),
        "true boxes that were written (IoU 0.5)": f"{found / num_true:.3f} of {num_true}",
        "written boxes that are true (IoU 0.5)": f"{found / num_written:.3f} of {num_written}",
        "F1 of boxes (IoU 0.5)": f"{2 * found / (num_true + num_written):.3f}",
    }


def share(values: Sequence[bool]) -> str:
    """Share of ``True`` with its interval."""
    if not values:
        return "-"
    return f"{say(wilson_interval(int(sum(values)), len(values)))} of {len(values)}"


def say(interval: Interval) -> str:
    """Mean and ends."""
    return f"{interval.mean:.3f} [{interval.low:.2f}, {interval.high:.2f}]"


_ANSWERED: dict[str, tuple[str, Callable[[Entry, Answer], bool]]] = {
    "depth": (content_rows.ASK_POINT_STEPS, right_depth),
    "count": (content_rows.ASK_COUNT_STEPS, right_count),
}
"""Task -> what asks for its steps, and whether an answer is right."""


def main() -> None:
    """Ask, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("task", choices=("depth", "count", "maps", "boxes"))
    parser.add_argument("--data", type=Path, required=True, help="folder with questions.jsonl")
    parser.add_argument("--model", required=True, help="writes maps or boxes")
    parser.add_argument("--direct", help="trained to answer at once")
    parser.add_argument("--depth-tokenizer", type=Path, help="for depth")
    parser.add_argument("--picture", type=Path, help="draw the first questions: .png or .jpg")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-calls", type=int, default=0, help="calls of branches (default: 0)")
    parser.add_argument("--plain", action="store_true", help="do not ask for the steps")
    args = parser.parse_args()
    if not (args.data / "questions.jsonl").is_file():
        parser.error(f"--data: there is no {args.data / 'questions.jsonl'}; make it with vpt data")
    if args.picture and args.task == "depth" and not args.depth_tokenizer:
        parser.error("--picture of depth maps needs --depth-tokenizer")
    if args.picture and not args.picture.parent.is_dir():
        parser.error(f"--picture: there is no folder {args.picture.parent}")
    if args.picture and args.picture.suffix.lower() not in (".png", ".jpg"):
        parser.error(f"--picture: expected a name that ends in .png or .jpg, got {args.picture}")
    entries = read_entries(args.data, args.limit)
    suffix, is_right = _ANSWERED.get(args.task, ("", None))
    if is_right is None:
        entries = [ask_for_content(args.task, entry) for entry in entries]
    how = args.batch_size, args.max_calls
    runtime = vpt.load(args.model, device="cpu")
    steps = ask_all(runtime, entries, args.data, "" if args.plain else suffix, *how)
    rows: dict[str, str] = {}
    if is_right is not None:
        right = [*map(is_right, entries, steps)]
        rows["through its own content"] = share(right)
    if is_right is not None and args.direct:
        direct = ask_all(vpt.load(args.direct, device="cpu"), entries, args.data, "", *how)
        right_at_once = [*map(is_right, entries, direct)]
        rows["from direct labels"] = share(right_at_once)
        rows["difference"] = say(difference_interval(right, right_at_once))
    if args.task in ("count", "boxes"):
        rows |= count_facts(entries, steps)
        if args.picture:
            draw_boxes(entries, steps, args.data).save(args.picture)
    elif args.depth_tokenizer:
        tokenizer = load_depth_tokenizer(args.depth_tokenizer)
        rows |= depth_facts(entries, steps, args.data, tokenizer)
        if args.picture:
            draw_maps(entries, steps, args.data, tokenizer).save(args.picture)
    if is_right is not None:
        chance = [1 / (len(e["points"]) if args.task == "depth" else 8) for e in entries]
        rows["a guess"] = f"{np.mean(chance):.3f}"
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
