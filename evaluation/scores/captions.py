"""How much of a reference text a caption or description repeats.

The counting is left to two well-kept libraries, rouge-score and sacrebleu. They are optional and
imported when first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from vpt.errors import DataError, PromptError
from vpt.evaluation.scores.references import best_over, checked_references


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, best of the references; in [0, 1].

    rouge-score without stemming. It knows words of a-z and 0-9 only: a text without any scores 0.

    Source: Lin, "ROUGE", 2004.

    Raises:
        DataError: if there is no reference.
        PromptError: if rouge-score is not installed.
    """
    scorer = _load("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return best_over(references, lambda text: float(scorer.score(text, prediction)["rougeL"][2]))


def chrf(prediction: str, references: Sequence[str]) -> float:
    """Sentence chrF (character n-grams up to 6, recall counted double), best reference; in [0, 1].

    Source: Popović, "chrF", WMT 2015, as sacrebleu has it (there 0 to 100).

    Raises:
        DataError: if there is no reference.
        PromptError: if sacrebleu is not installed.
    """
    texts = list(checked_references(references))
    return float(_load("sacrebleu").sentence_chrf(prediction, texts).score) / 100


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a whole split, sacrebleu's defaults (13a tokens, case counts); in [0, 1].

    It is no mean over samples: n-grams and lengths are added up first.

    Source: Papineni et al., ACL 2002; Post, "A Call for Clarity in Reporting BLEU Scores", 2018.

    Args:
        predictions: one per sample.
        references: those of each sample; their numbers may differ.

    Raises:
        DataError: if there is no sample, one has no reference, or the two differ in length.
        PromptError: if sacrebleu is not installed.
    """
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"expected references for each of at least one prediction, got {len(predictions)} "
            f"predictions and {len(references)} sets of references"
        )
    most = max(len(checked_references(texts)) for texts in references)
    # sacrebleu wants the first references of all samples, then the second ones, None for gaps.
    streams = [
        [texts[place] if place < len(texts) else None for texts in references]
        for place in range(most)
    ]
    # Rounding can lift a perfect score a hair above 100.
    return min(float(_load("sacrebleu").corpus_bleu(list(predictions), streams).score) / 100, 1.0)


def _load(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise PromptError(
            f"caption scores need the package of {module!r}, which is not installed; "
            'run pip install -e ".[eval]"'
        ) from exc
