"""What a prediction is worth: pure functions, and the table of those that a split can name."""

from vpt.evaluation.scores.captions import chrf, corpus_bleu, rouge_l
from vpt.evaluation.scores.choices import extract_choice, multiple_choice
from vpt.evaluation.scores.contains import contains_answer
from vpt.evaluation.scores.counting import count_accuracy, extract_count
from vpt.evaluation.scores.exact import exact_match, normalize_text
from vpt.evaluation.scores.levenshtein import anls
from vpt.evaluation.scores.region_hit import best_iou, is_shown, share_shown
from vpt.evaluation.scores.relaxed import relaxed_accuracy
from vpt.evaluation.scores.table import SCORES, Score
from vpt.evaluation.scores.vqa import vqa_accuracy
from vpt.evaluation.scores.vqa_normalization import normalize_vqa
from vpt.evaluation.scores.yes_no import extract_yes_no, pope, yes_no_accuracy

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
