"""Has a judge score the free-form answers of a run, beside the scores they have."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.judge import JudgeItem, JudgeSettings, judge_all, summary
from evaluation.records import Record

SCORE = "judge"


def judge_records(
    records: Sequence[Record], settings: JudgeSettings, cache_file: Path
) -> tuple[list[Record], dict[str, Any]]:
    """Have answers judged.

    Args:
        records: of the splits that are to be judged.
        settings: of the judge.
        cache_file: of its replies; what is there is not asked again.

    Returns:
        The same records, those that the judge scored with :data:`SCORE` among their scores; and
        what ``results.json`` says of the judge: as :func:`evaluation.judge.summary`, and why
        answers stayed without a score, ``reasons``: reason -> number.

    Raises:
        PromptError: if the key or the ``openai`` package is missing.
        JudgeError: if the judge cannot do its work at all.
    """
    places = [i for i, record in enumerate(records) if record.error is None and record.answers]
    items = [
        JudgeItem(records[i].question, records[i].answers[0], records[i].prediction) for i in places
    ]
    with tqdm(total=len(items), desc="judge", disable=not sys.stderr.isatty()) as bar:
        judged = judge_all(items, settings, cache_file, lambda *_: bar.update())
    reasons: dict[str, int] = {}
    scored = list(records)
    for place, judgement in zip(places, judged, strict=True):
        if judgement.score is None:
            reasons[judgement.reason] = reasons.get(judgement.reason, 0) + 1
            continue
        scores = {**records[place].scores, SCORE: judgement.score}
        scored[place] = dataclasses.replace(records[place], scores=scores)
    return scored, {**summary(judged, settings), "reasons": reasons}
