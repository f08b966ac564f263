"""Has a judge score the free-form answers of a run, beside the scores they have."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vpt.evaluation.judge import JudgeItem, judge_all, summary
from vpt.evaluation.judge_settings import JudgeSettings
from vpt.evaluation.records import Record

SCORE = "judge"


def judge_records(
    records: Sequence[Record], settings: JudgeSettings, cache_file: Path
) -> tuple[list[Record], dict[str, Any], list[dict[str, str]]]:
    """Have answers judged.

    Args:
        records: of the splits that are to be judged.
        settings: of the judge.
        cache_file: of its replies; what is there is not asked again.

    Returns:
        The same records, those that the judge scored with :data:`SCORE` among their scores; what
        ``results.json`` says of the judge: as :func:`vpt.evaluation.judge.summary`, and why answers
        stayed without a score, ``reasons``: reason -> number; and those answers: ``split``,
        ``condition``, ``id`` and ``reason`` of each.

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
    unscored = []
    scored = list(records)
    for place, judgement in zip(places, judged, strict=True):
        if judgement.score is None:
            names = dict(zip(("split", "condition", "id"), records[place].key, strict=True))
            unscored.append({**names, "reason": judgement.reason})
            continue
        scores = {**records[place].scores, SCORE: judgement.score}
        scored[place] = dataclasses.replace(records[place], scores=scores)
    reasons = Counter(one["reason"] for one in unscored)
    return scored, {**summary(judged, settings), "reasons": dict(reasons)}, unscored
