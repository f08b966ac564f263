"""Accuracy is counted by kind of token, once each, control tokens left out."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_model import tiny_model

from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    DEPTH_START,
    REGION_END,
    REGION_START,
    TURN_END,
    ContentTokens,
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model()[1].tokenizer


@pytest.fixture
def accuracy(factory, tokenizer):
    from vpt.training.trainer import TokenClassAccuracy, token_classes

    return TokenClassAccuracy(token_classes(tokenizer))


def predictions(tokenizer, *rows):
    """Rows of ``(label, prediction)``; a label of ``None`` is ignored."""
    ids = tokenizer.get_vocab()
    width = max(map(len, rows)) + 1
    labels = np.full((len(rows), width), -100)
    predicted = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        for place, (label, guess) in enumerate(row):
            labels[number, place + 1] = -100 if label is None else ids[label]
            predicted[number, place] = ids[guess]
    return SimpleNamespace(predictions=predicted, label_ids=labels)


DINO = BRANCH_TOKENS["dino"]
CALLING = [(None, "a"), (DINO.start, DINO.start), (DINO.action, "a"), (DINO.end, "a")]
REGION = [
    (REGION_START, REGION_START),
    ("<|x_1|>", "<|x_1|>"),
    ("<|y_2|>", "<|y_3|>"),
    ("<|x_3|>", "<|x_3|>"),
    ("<|y_4|>", "<|y_4|>"),
    (REGION_END, REGION_END),
    (TURN_END, TURN_END),
]
TEXT = [("a", "a"), ("b", "a"), ("c", "c"), (TURN_END, "a")]


def test_each_kind_is_counted(accuracy, tokenizer):
    assert accuracy(predictions(tokenizer, CALLING, REGION, TEXT)) == {
        "accuracy": pytest.approx((1 / 2 + 6 / 7 + 2 / 4) / 3),
        "accuracy_text": 2 / 3,
        "num_text": 3,
        "accuracy_region": 1.0,
        "num_region": 2,
        "accuracy_coordinate": 0.75,
        "num_coordinate": 4,
        "accuracy_reencode": 0.5,
        "num_reencode": 2,
        "accuracy_turn_end": 0.5,
        "num_turn_end": 2,
    }


def test_depth_maps_and_boxes_are_kinds_of_their_own(factory):
    from vpt.training.trainer import TokenClassAccuracy, token_classes

    tokenizer = tiny_model((), content=ContentTokens(("depth", "boxes")))[1].tokenizer
    accuracy = TokenClassAccuracy(token_classes(tokenizer))
    content = [(DEPTH_START, DEPTH_START), ("<DEPTH_3>", "<DEPTH_4>"), ("<PIXEL_9>", "<PIXEL_9>")]
    result = accuracy(predictions(tokenizer, content))
    assert (result["accuracy_depth"], result["num_depth"]) == (0.5, 2)
    assert (result["accuracy_box"], result["num_box"]) == (1.0, 1)
    assert "num_reencode" not in result


def test_batches_add_up_and_the_next_evaluation_begins_anew(accuracy, tokenizer):
    whole = accuracy(predictions(tokenizer, CALLING, REGION, TEXT))
    assert accuracy(predictions(tokenizer, CALLING), compute_result=False) is None
    assert accuracy(predictions(tokenizer, REGION, TEXT)) == whole


def test_a_kind_that_did_not_occur_has_no_accuracy(accuracy, tokenizer):
    result = accuracy(predictions(tokenizer, TEXT))
    assert result["num_region"] == 0 and "accuracy_region" not in result


def test_rows_without_labels_count_for_nothing(accuracy, tokenizer):
    result = accuracy(predictions(tokenizer, [(None, "a")], TEXT))
    assert result["accuracy"] == 0.5
    assert "accuracy" not in accuracy(predictions(tokenizer, [(None, "a")]))


def test_ids_beyond_the_known_ones_are_text(accuracy):
    given = SimpleNamespace(predictions=np.array([[9999, 0]]), label_ids=np.array([[-100, 9999]]))
    assert accuracy(given)["accuracy_text"] == 1.0
