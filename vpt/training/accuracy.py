"""Next-token accuracy by kind of token, reported where LLaMA-Factory reports one number."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from llamafactory.train.sft import metric

from vpt.model.encoding import IGNORE_INDEX
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    REGION_END,
    REGION_START,
    TURN_END,
    content_value,
    is_content,
    is_coordinate,
)
from vpt.training.tested import replace_in_workflow

CLASSES = ("text", "region", "coordinate", "reencode", "depth", "box", "turn_end", "control")
"""Kinds of tokens. Control tokens are forced, so no accuracy is reported of them."""


class TokenClassAccuracy:
    """Takes the place of LLaMA-Factory's ``ComputeAccuracy``.

    Reports ``accuracy``, as LLaMA-Factory does the mean over rows, and for each kind of token
    ``accuracy_KIND`` over all tokens of the kind, and their number ``num_KIND``. Of a kind that did
    not occur there is no accuracy, and nothing of a kind that the model does not have.

    Args:
        class_of_id: token id -> index in :data:`CLASSES`; ids that are not there are text.
    """

    def __init__(self, class_of_id: Mapping[int, int]) -> None:
        self.class_of_id = np.zeros(max(class_of_id, default=0) + 1, dtype=np.int64)
        for token_id, number in class_of_id.items():
            self.class_of_id[token_id] = number
        self.reported = sorted({CLASSES.index("text"), *class_of_id.values()} - {_CONTROL})
        self._reset()

    def _reset(self) -> None:
        self.rows: list[float] = []
        self.num_right = np.zeros(len(CLASSES), dtype=np.int64)
        self.num_all = np.zeros(len(CLASSES), dtype=np.int64)

    def __call__(
        self, eval_preds: Any, compute_result: bool = True
    ) -> dict[str, float | int] | None:
        """Count predictions.

        Args:
            eval_preds: ``predictions`` ``[B, S]``, the likeliest next token at each place, and
                ``label_ids`` ``[B, S]``, -100 where ignored.
            compute_result: whether all batches are in.

        Returns:
            The metrics of all that was counted, which then begins anew; ``None`` before that.
        """
        predicted = np.asarray(_on_cpu(eval_preds.predictions))[:, :-1]
        labels = np.asarray(_on_cpu(eval_preds.label_ids))[:, 1:]
        for row_predicted, row_labels in zip(predicted, labels, strict=True):
            counted = row_labels != IGNORE_INDEX
            kinds = self._classes(row_labels[counted])
            right = (row_predicted[counted] == row_labels[counted])[kinds != _CONTROL]
            kinds = kinds[kinds != _CONTROL]
            if len(kinds):
                self.rows.append(float(right.mean()))
            self.num_all += np.bincount(kinds, minlength=len(CLASSES))
            self.num_right += np.bincount(kinds[right], minlength=len(CLASSES))
        return self._result() if compute_result else None

    def _classes(self, ids: Any) -> Any:
        known = ids < len(self.class_of_id)
        return np.where(known, self.class_of_id[np.where(known, ids, 0)], 0)

    def _result(self) -> dict[str, float | int]:
        result: dict[str, float | int] = {}
        if self.rows:
            result["accuracy"] = float(np.mean(self.rows))
        for number in self.reported:
            name = CLASSES[number]
            if self.num_all[number]:
                result[f"accuracy_{name}"] = float(self.num_right[number] / self.num_all[number])
            result[f"num_{name}"] = int(self.num_all[number])
        self._reset()
        return result


_CONTROL = CLASSES.index("control")


def _on_cpu(values: Any) -> Any:
    return values.cpu() if hasattr(values, "cpu") else values


def token_classes(tokenizer: Any) -> dict[int, int]:
    """Index in :data:`CLASSES` of every token of a tokenizer that is not text."""
    names = {TURN_END: "turn_end", REGION_START: "region", REGION_END: "region"}
    for row in BRANCH_TOKENS.values():
        names |= {row.start: "reencode", row.end: "reencode", row.action: "control"}
    vocabulary = tokenizer.get_vocab()
    names |= {token: "coordinate" for token in vocabulary if is_coordinate(token)}
    for token in filter(is_content, vocabulary):
        names[token] = "depth" if content_value(token, "boxes") is None else "box"
    return {vocabulary[t]: CLASSES.index(name) for t, name in names.items() if t in vocabulary}


def install_accuracy(tokenizer: Any) -> None:
    """Make ``compute_accuracy: true`` report by kind of token.

    Raises:
        TrainingError: if it does not use that name as the tested version does.
    """
    replace_in_workflow(
        "ComputeAccuracy",
        metric.ComputeAccuracy,
        partial(TokenClassAccuracy, token_classes(tokenizer)),
        lambda one: isinstance(one, partial) and one.func is TokenClassAccuracy,
    )
