"""Scores of predictions: pure functions, and the table of those that a split can name."""

from vpt.evaluation.scores.choices import (
    contains_answer,
    extract_choice,
    extract_yes_no,
    multiple_choice,
    pope,
    yes_no_accuracy,
)
from vpt.evaluation.scores.numbers import count_accuracy, extract_count, relaxed_accuracy
from vpt.evaluation.scores.regions import best_iou, is_shown, share_shown
from vpt.evaluation.scores.table import SCORES, Score
from vpt.evaluation.scores.texts import (
    anls,
    chrf,
    corpus_bleu,
    exact_match,
    normalize_text,
    normalize_vqa,
    rouge_l,
    vqa_accuracy,
)

__all__ = [
    "SCORES",
    "Score",
    "anls",
    "best_iou",
    "chrf",
    "contains_answer",
    "corpus_bleu",
    "count_accuracy",
    "exact_match",
    "extract_choice",
    "extract_count",
    "extract_yes_no",
    "is_shown",
    "multiple_choice",
    "normalize_text",
    "normalize_vqa",
    "pope",
    "relaxed_accuracy",
    "rouge_l",
    "share_shown",
    "vqa_accuracy",
    "yes_no_accuracy",
]
