"""Greedy evaluation of a policy, with its own calls and with calls forbidden, and its gallery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from vpt.answer import Answer
from vpt.evaluation.intervals import difference_interval, mean_interval
from vpt.files import write_atomic
from vpt.policy.rewards import Outcome
from vpt.view.timeline import timeline_html
from vpt.view.wording import html_environment

Ask = Callable[[Sequence[Any], Mapping[str, Any]], list[Outcome]]
"""Answers samples under options of a request."""

GREEDY = {"temperature": 0.0}
BLIND = {"temperature": 0.0, "perception": "none"}


def evaluate(ask: Ask, samples: Sequence[Any]) -> tuple[dict[str, Any], list[Outcome]]:
    """Ask samples with and without calls.

    Returns:
        Figures, intervals of 95 % among them, and the outcomes with own calls.
    """
    own, blind = ask(samples, GREEDY), ask(samples, BLIND)
    scores, without = [one.score for one in own], [one.score for one in blind]
    gain = difference_interval(scores, without)
    figures = {
        "score": asdict(mean_interval(scores)),
        "blind_score": asdict(mean_interval(without)),
        "gain": asdict(gain),
        **{name: value for name, value in behaviour(own).items() if name != "score"},
    }
    return figures, own


def behaviour(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means that show how a policy earns its reward."""
    num = len(outcomes)
    branches = Counter(c.branch for o in outcomes for c in o.trace.calls if c.outcome == "executed")
    known = [one for one in outcomes if one.blind_score is not None]
    figures = {
        "score": fmean(one.score for one in outcomes),
        "called": sum(one.num_calls > 0 for one in outcomes) / num,
        "num_calls": sum(one.num_calls for one in outcomes) / num,
        "num_tokens": sum(one.trace.counts.generated_tokens for one in outcomes) / num,
        "malformed": sum(bool(one.trace.malformed) for one in outcomes) / num,
        "cut": sum(one.is_cut for one in outcomes) / num,
        **{f"calls_{name}": count / num for name, count in sorted(branches.items())},
    }
    if known:
        figures["gain"] = fmean(one.score - (one.blind_score or 0.0) for one in known)
    return figures


def write_gallery(outcomes: Sequence[Outcome], file: Path, title: str) -> None:
    """Write answers as one HTML page: picture, token stream, score."""
    cards = []
    for one in outcomes:
        one.trace.keep_thumbnails([ref.open() for ref in one.sample.images])
        answer = Answer.from_trace(one.trace)
        cards.append((answer._repr_html_(), timeline_html(one.trace), one))
    page = html_environment("vpt.policy").get_template("gallery.html")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page.render(title=title, cards=cards), file)
