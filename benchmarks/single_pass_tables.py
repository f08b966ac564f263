"""What ``single_pass.py`` measured, as tables on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

KINDS = ("wall", "cpu")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Write the median and, in brackets, the least and the greatest."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([row[0].ljust(widths[0]), *cells]))
    print()


def _time_rows(section: dict[str, Any], measures: dict[str, str]) -> Iterator[list[str]]:
    for name, contestant in section["contestants"].items():
        for kind in KINDS:
            times = (contestant["ms"][measure][kind] for measure in measures)
            yield [f"{name}, {kind}", *(spread(values) for values in times)]


def print_single_pass(sections: dict[str, dict[str, Any]]) -> None:
    """Table of measurement 1, with the copied cache (measurement 5)."""
    measures = {
        "first_token": "first token, ms",
        "after_call": "call to next token, ms",
        "per_token": "per token, ms",
        "total": "whole answer, ms",
    }
    for mode, section in sections.items():
        print(
            f"1. One {mode} call, {section['num_tokens']} tokens written, "
            f"tokens equal: {_yes(section['tokens_equal'])}"
        )
        rows = list(_time_rows(section, measures))
        for kind in KINDS:
            ratios = (spread(section["ratios"][measure][kind], 2) for measure in measures)
            rows.append([f"two_pass / single_pass, {kind}", *ratios])
        print_table(["", *measures.values()], rows)
        header = ["", "LLM tokens", "LLM passes", "images encoded", "KV copied, MB", "peak memory"]
        rows = []
        for name, c in section["contestants"].items():
            peak = c["peak_memory_bytes"]
            counts = (c["llm_tokens"], c["llm_forwards"], c["encoder_runs"])
            memory = "n/a" if peak is None else f"{peak / 1e6:.1f} MB over weights"
            rows.append([name, *map(str, counts), f"{c['kv_bytes_copied'] / 1e6:.1f}", memory])
        rows.append(["two_pass / single_pass", f"{section['llm_tokens_ratio']:.2f}", *[""] * 4])
        print_table(header, rows)


def print_plain_answer(section: dict[str, Any]) -> None:
    """Table of measurement 2."""
    measures = {
        "first_token": "first token, ms",
        "per_token": "per token, ms",
        "total": "whole answer, ms",
    }
    print(
        f"2. Plain answer, {section['num_tokens']} tokens, unconstrained, against transformers' "
        f"generate, tokens equal: {_yes(section['tokens_equal'])}"
    )
    rows = list(_time_rows(section, measures))
    for name, key in (("generate", "ratios"), ("static cache", "static_ratios")):
        for kind in KINDS:
            ratios = (spread(section[key][measure][kind], 3) for measure in measures)
            rows.append([f"ours / {name}, {kind}", *ratios])
    print_table(["", *measures.values()], rows)


def print_batching(section: dict[str, Any]) -> None:
    """Table of measurement 3."""
    print(
        f"3. {section['num_requests']} requests of mixed modes, {section['num_tokens']} tokens "
        f"written, tokens equal: {_yes(section['tokens_equal'])}"
    )
    rows = []
    for name, contestant in section["contestants"].items():
        for kind in KINDS:
            times = contestant["ms"]["total"][kind]
            rate = spread([section["num_tokens"] / t * 1e3 for t in times])
            rows.append([f"{name}, {kind}", spread(times), rate])
    for kind in KINDS:
        rows.append([f"gain, {kind}", spread(section["ratios"]["total"][kind], 2), ""])
    print_table(["", "all answers, ms", "tokens/s"], rows)


def print_extension(section: dict[str, Any], kind: str) -> None:
    """Table of measurement 4, by wall or CPU time."""
    print(f"4. Appending behind a prompt of {section['prompt_tokens']} tokens, {kind} time")
    rows = []
    for size, ms in section["ms"].items():
        append, rerun = ms["append"][kind], ms["rerun"][kind]
        per_token = spread([t / int(size) for t in append], 3)
        ratio = spread([r / a for r, a in zip(rerun, append, strict=True)], 2)
        rows.append([f"{size} tokens", spread(append), per_token, spread(rerun), ratio])
    print_table(["", "append, ms", "per token, ms", "all anew, ms", "anew / append"], rows)
    fit = section["fit"][kind]
    print(f"  fit: {fit['ms_at_zero']:.1f} ms + {fit['ms_per_token']:.3f} ms per token\n")


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
