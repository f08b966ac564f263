"""What the grammar of perception tokens costs per token, for each kind of content on and off.

Each contestant chooses the tokens of a script one by one from logits as wide as Qwen2-VL's: state,
rule, rule on the logits, likeliest token. The baseline does all but the grammar. All take turns in
every round; ratios, to a model that knows calls only, are within a round. Then the same for
transformers' ``generate``, where the logits processor is shown the whole stream at each token:
short and long streams are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_models import SIZES, build, picture
from reporting import announce, save
from single_pass_tables import print_table, spread
from tiny_model import byte_tokenizer

from vpt.model.building import add_perception_tokens
from vpt.model.generation import PerceptionLogitsProcessor, apply_rule_
from vpt.protocol.grammar import PerceptionGrammar, TurnState
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    NO_CONTENT,
    RELEASED_GRID_SIZE,
    ContentTokens,
    Vocabulary,
    depth_tokens,
    pixel_tokens,
)
from vpt.runtime import Runtime

WIDTH = 152_064  # of Qwen2-VL's logits
TEXT_ID = 72
STREAM_LENGTHS = (100, 1000)
CALLS_ONLY = "text, a model of calls only"


@dataclass(frozen=True)
class Contestant:
    """A script of tokens under a grammar.

    Attributes:
        grammar: ``None`` for none.
        permitted: what may be called and written.
        ids: of the tokens; those of one kind of content again and again.
    """

    grammar: PerceptionGrammar | None
    permitted: tuple[str, ...]
    ids: tuple[int, ...]


def make_vocabulary(content: ContentTokens) -> Vocabulary:
    """All branches and this content, as wide as Qwen2-VL's."""
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, BRANCH_TOKENS, RELEASED_GRID_SIZE, content)
    made = Vocabulary.from_tokenizer(tokenizer, BRANCH_TOKENS, RELEASED_GRID_SIZE, content)
    return replace(made, size=WIDTH - 100)


def make_contestants(num_tokens: int) -> dict[str, Contestant]:
    """Scripts of ``num_tokens`` tokens, the baseline first."""
    plain = PerceptionGrammar(make_vocabulary(NO_CONTENT))
    ids = plain.vocabulary.ids
    region = [ids[token] for token in ("<|region_token_start|>", "<|x_2|>", "<|y_1|>")]
    region += [ids[token] for token in ("<|x_5|>", "<|y_4|>", "<|region_token_end|>")]

    def script(unit: Sequence[int]) -> tuple[int, ...]:
        return tuple((list(unit) * (num_tokens // len(unit) + 1))[:num_tokens])

    text, calls = script([TEXT_ID]), plain.vocabulary.branches
    found = {
        "no grammar": Contestant(None, (), text),
        CALLS_ONLY: Contestant(plain, calls, text),
        "regions, a model of calls only": Contestant(plain, calls, script(region)),
    }
    for kinds in (("depth",), ("boxes",), ("depth", "boxes")):
        grammar = PerceptionGrammar(make_vocabulary(ContentTokens(kinds)))
        everything = (*calls, *kinds)
        name = " and ".join(kinds)
        found[f"text, {name} on"] = Contestant(grammar, everything, text)
        found[f"text, {name} forbidden"] = Contestant(grammar, (), text)
    ids = grammar.vocabulary.ids
    start, end, *codes = (ids[token] for token in depth_tokens())
    pixels = [ids[token] for token in pixel_tokens()]
    found["depth maps"] = Contestant(grammar, everything, script([start, *codes[:100], end]))
    sides = [side for n in range(0, 160, 7) for side in (n, n + 9, n + 140, n + 99)]
    found["boxes"] = Contestant(grammar, everything, script([pixels[side] for side in sides]))
    return found


def choose_all(one: Contestant, logits: torch.Tensor) -> None:
    """Choose each token of the script; what is chosen is left aside."""
    state, buffer = TurnState(), torch.empty_like(logits)
    for token_id in one.ids:
        buffer.copy_(logits)
        if one.grammar is not None:
            apply_rule_(one.grammar.rule(state, one.permitted), buffer)
            state = one.grammar.advance(state, token_id)
            if state.name == "after_region":
                state = TurnState()  # the turn ends
        int(buffer.argmax())


def process_all(one: Contestant, scores: torch.Tensor) -> None:
    """The same through the logits processor, which sees the whole stream at each token."""
    assert one.grammar is not None
    processor = PerceptionLogitsProcessor(one.grammar, 0, one.permitted)
    stream = torch.tensor([one.ids])
    for length in range(len(one.ids)):
        processor(stream[:, :length], scores)


def time_us(act: Callable[[], None], num_tokens: int) -> float:
    """CPU time per token in microseconds."""
    started = time.process_time()
    act()
    return (time.process_time() - started) * 1e6 / num_tokens


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds per token of every contestant and round."""
    logits = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    contestants = make_contestants(args.tokens)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for one in contestants.values():
        choose_all(replace(one, ids=one.ids[:120]), logits)  # rules are made
    for _ in range(args.repeats):
        for name, one in contestants.items():
            times[name].append(time_us(lambda one=one: choose_all(one, logits), args.tokens))
    scores, streams = logits[None, :2048].clone(), {}
    for length in STREAM_LENGTHS:
        maps = replace(make_contestants(length)["depth maps"])
        maps.grammar.vocabulary = replace(maps.grammar.vocabulary, size=2048)  # type: ignore[union-attr]
        streams[length] = [
            time_us(lambda maps=maps: process_all(maps, scores), length)
            for _ in range(args.repeats)
        ]
    return {"us_per_token": times, "generate_us_per_token": streams, "step_us": step_us(args)}


def step_us(args: argparse.Namespace) -> float:
    """CPU time of a whole decoding step of a small model without a grammar, for comparison."""
    model, processor = build(SIZES[args.size], torch.device("cpu"), torch.float32)
    runtime, image = Runtime(model, processor), picture(SIZES[args.size].image_wh)
    took = []
    for num_tokens in (1, 1, 33):  # the first run encodes the picture
        started = time.process_time()
        options = {"constrain": False, "perception": "none", "max_new_tokens": num_tokens}
        answer = runtime.ask(image, "What?", **options)
        took.append((time.process_time() - started, len(answer.trace.tokens)))
    (_, _), (first, _), (whole, num_written) = took
    return (whole - first) * 1e6 / max(num_written - 1, 1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=408, help="per script")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model compared with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args(argv)
    if min(args.tokens, args.repeats, args.threads) < 1:
        parser.error("numbers must be at least 1")
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    report = {**announce(args), **measure(args)}
    times = report["us_per_token"]
    base, calls_only = times["no grammar"], times[CALLS_ONLY]
    rows = []
    for name, one in times.items():
        added = [value - b for value, b in zip(one, base, strict=True)]
        ratios = [value / b for value, b in zip(one, calls_only, strict=True)]
        share = f"{100 * statistics.median(added) / report['step_us']:.2f}"
        rows.append([name, spread(one), spread(added), spread(ratios, 2), share])
    print(f"{args.tokens} tokens each, {args.repeats} rounds; median [least-greatest], CPU time")
    header = ["", "us per token", "us added", "times calls only", f"% of a step ({args.size})"]
    print_table(header, rows)
    rows = [[f"{n} tokens", spread(us)] for n, us in report["generate_us_per_token"].items()]
    print_table(["generate's logits processor", "us per token"], rows)
    report["ratio"] = {
        name: statistics.median(value / b for value, b in zip(one, calls_only, strict=True))
        for name, one in times.items()
    }
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
