"""What can be wrong with a row: every kind of finding, with its words."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One thing that is wrong with a row.

    Attributes:
        kind: key of :data:`FINDINGS`.
        detail: what, and where in the row.
    """

    kind: str
    detail: str


FINDINGS = {
    "not-loadable": "what the loader of LLaMA-Factory refuses; training would stop there",
    "broken-row": "no row: expected messages with role and content, and lists of image paths",
    "turn-order": "turns that are not user and assistant by turns, the assistant last",
    "empty-turn": "a turn without words",
    "unknown-token": "a control token that no VPT model with this grid knows",
    "misplaced-token": "a control token where only text and placeholders may be",
    "malformed-call": "perception tokens that make no call",
    "words-after-call": "something behind a call; in a run the turn ends there",
    "call-without-image": "a call that no image answers in the turn behind it",
    "image-without-call": "a re-encoded image or a crop for which nothing called",
    "placeholder-count": "placeholders in the text and images of the row differ in number",
    "unread-column": "images in a column that no VPT model reads",
    "missing-image": "an image file that is not there; paths are relative to --images",
    "unreadable-image": "an image file that cannot be used",
    "crop-outside": "a crop suffix that is empty, or reaches out of the image",
    "crop-mismatch": "a crop that is not the one that the runtime cuts for the region",
    "missing-branch": "a call or re-encoded image of a branch that the model lacks",
    "bad-depth-map": "depth tokens that are not a map of exactly 100 known codes",
    "bad-box": "pixel tokens that are no boxes: not four each, out of range, or reversed",
    "answer-mismatch": "an answer that disagrees with the note of the row",
    "bad-note": "a note that is damaged, or contradicts itself",
    "epoch-order": "an epoch behind a later one; the order of the file is the curriculum",
    "missing-content": "tokens of depth maps or boxes that the model's tokenizer lacks",
    "too-long": "more tokens than --cutoff-len; training would cut the row",
    "duplicate-row": "the same messages and images as a row before it",
}
"""Kinds of findings, in the order of the report, with what each means."""
