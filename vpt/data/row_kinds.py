"""Kinds of rows, by what the model does in them before it answers."""

from __future__ import annotations

from vpt.protocol.tokens import ENCODER_TO_BRANCH

ROW_KINDS = ("region", *ENCODER_TO_BRANCH, "direct")
"""It sees a region closer, has the image re-encoded by an encoder, or neither."""
