"""The models that exist for this package: those that its authors released, and the shipped one."""

from __future__ import annotations

from dataclasses import dataclass

_2B, _7B = "Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct"
_QUESTION = 'vpt ask photo.jpg "What does the sign say?"'


@dataclass(frozen=True)
class ModelRow:
    """A model, as `vpt --list-models` and the README list it.

    Attributes:
        name: id on the Hugging Face hub, or where it is in the package.
        kind: ``"prompted"`` models look again when asked to, ``"free choice"`` by themselves.
        weights: size in bfloat16; of the shipped model in float16.
        command: runs it.
    """

    name: str
    base: str
    branches: str
    kind: str
    parameters: str
    weights: str
    purpose: str
    command: str

    @property
    def cells(self) -> tuple[str, ...]:
        """Columns of the tables."""
        return self.name, self.base, self.branches, self.kind, self.parameters, self.weights


def _answering(name: str, base: str, branch: str, mode: str, sizes: tuple[str, str]) -> ModelRow:
    """A released model that answers; with ``mode`` a prompted one."""
    name = f"rp-yu/Qwen2-VL-{name}"
    kind, option = ("prompted", f" --perception {mode}") if mode else ("free choice", "")
    looks = {"": "decides by itself", "crop": "crops a region first"}
    purpose = f"questions about photos; {looks.get(mode, f'encodes the image again by {branch}')}"
    command = f"{_QUESTION} --model {name}{option}"
    return ModelRow(name, base, f"region, {branch}", kind, *sizes, purpose, command)


def _alignment(stem: str, branch: str) -> ModelRow:
    """A released model to start training from."""
    name = f"Qwen2-VL-2b-VPT-{stem}-Alignment"
    command = f"hf download rp-yu/{name} --local-dir saves/{name}"
    purpose = f"the start of training by configs/Qwen2-VL-2b-VPT-{stem}.yaml"
    cells = (f"rp-yu/{name}", _2B, branch, "projectors only", "2.75 B", "5.5 GB")
    return ModelRow(*cells, purpose, command)


MODELS = (
    _answering("2b-VPT-CLIP", _2B, "own tower", "crop", ("2.45 B", "4.9 GB")),
    _answering("2b-VPT-Det", _2B, "DINOv2", "dino", ("2.75 B", "5.5 GB")),
    _answering("2b-VPT-Det-NoPrompt", _2B, "DINOv2", "", ("2.75 B", "5.5 GB")),
    _answering("2b-VPT-Seg", _2B, "SAM", "sam", ("2.76 B", "5.5 GB")),
    _answering("7b-VPT-CLIP", _7B, "own tower", "crop", ("8.32 B", "16.6 GB")),
    _alignment("Det", "DINOv2"),
    _alignment("Seg", "SAM"),
    ModelRow(
        *("vpt/embedded", "from scratch", "all four", "free choice", "2.1 M", "9 MB"),
        "questions about drawn pictures such as those in examples, not photos; in the package",
        'vpt ask examples/tags.jpg "What number is on the blue one?"',
    ),
)
HEADINGS = ("model", "base", "branches", "kind", "parameters", "weights")
DEFAULT_DETECTOR = "IDEA-Research/grounding-dino-tiny"
"""Finds the phrases of ``look_for``."""

DEFAULT_SEGMENTER = "facebook/sam-vit-base"
"""Finds the objects of ``mask``."""

PHOTO_MODEL = MODELS[0].name
"""For photos, where another model cannot read them."""


def models_text() -> str:
    """The table, with a second and third line per model: its purpose and its command."""
    rows = [HEADINGS, *(row.cells for row in MODELS)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    blocks = [
        f"{line}\n    {m.purpose}\n    {m.command}"
        for line, m in zip(lines[1:], MODELS, strict=True)
    ]
    return "\n".join([lines[0], *blocks])
