"""Entry point by which ``--model vpt`` of lmms-eval finds the class; light, unlike the class."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Name and class of the model, for the entry-point group ``lmms_eval.models``."""
    return ModelManifest("vpt", chat_class_path="vpt.evaluation.lmms_eval_model.VPT")
