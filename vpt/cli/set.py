"""``vpt set``: how the model in a folder is trained next and sees, where no YAML key can say it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vpt.cli.model import quieten
from vpt.cli.output import print_err, print_out, write_file
from vpt.cli.parser import Command, branch_names, number, whole_number
from vpt.errors import CheckpointError, PromptError
from vpt.files import replacing_files, write_whole
from vpt.protocol.tokens import BRANCH_TOKENS, branches_named

if TYPE_CHECKING:
    from vpt.model.modeling import VPTForConditionalGeneration

MASKS = ("none", "question", "question+image")
"""What may be hidden from the final pass; the index is ``para_mask_id``."""

_TOKEN_PX = 28
_NAMES = {
    "alignment": "alignment",
    "freeze_stems": "stems",
    "para_mask_id": "mask",
    "para_mask_ratio": "mask-ratio",
}


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`training_settings` reads."""
    training = parser.add_argument_group("training")
    training.add_argument(
        "--alignment",
        choices=("on", "off"),
        help="on: re-encoded features are not steered by the model, as in the first stage",
    )
    training.add_argument(
        "--stems",
        choices=("frozen", "trained"),
        help="frozen: of the projectors only what steers is trained; for steps so large that they "
        "would undo the alignment",
    )
    training.add_argument(
        "--mask",
        choices=MASKS,
        help="what is hidden from the model in training once it has called, so that the answer "
        "has to come from the call",
    )
    training.add_argument(
        "--mask-ratio",
        type=number(0, 1),
        metavar="R",
        help="share of the samples in which it is hidden, 0 to 1",
    )


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the configuration that the arguments change."""
    settings: dict[str, Any] = {}
    if args.alignment is not None:
        settings["alignment"] = args.alignment == "on"
    if args.stems is not None:
        settings["freeze_stems"] = args.stems == "frozen"
    if args.mask is not None:
        settings["para_mask_id"] = MASKS.index(args.mask)
    if args.mask_ratio is not None:
        settings["para_mask_ratio"] = args.mask_ratio
    return settings


def check_training_settings(settings: dict[str, Any], *, has_ratio: bool) -> None:
    """Refuse what would be without effect.

    Args:
        settings: ``alignment``, ``freeze_stems`` and ``para_mask_id`` as they will be.
        has_ratio: whether ``--mask-ratio`` is given.

    Raises:
        PromptError: saying what is missing.
    """
    if settings["alignment"] and settings["para_mask_id"]:
        raise PromptError("nothing is masked in alignment; add --mask none, or --alignment off")
    if settings["alignment"] and settings.get("freeze_stems"):
        raise PromptError("alignment trains the stems; add --stems trained, or --alignment off")
    if has_ratio and not settings["para_mask_id"]:
        raise PromptError("--mask-ratio needs a mask; add --mask question or question+image")


class _OldName(argparse.Action):
    """An option under its former name, which works for one release."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        new = "--" + self.dest.replace("_", "-")
        print_err(
            f"{option_string} is called {new} now; the old name will go with the next release"
        )
        setattr(namespace, self.dest, values)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a VPT model, as saved")
    add_training_arguments(parser)
    parser.add_argument(
        "--max-pixels",
        type=whole_number(_TOKEN_PX**2),
        metavar="N",
        help="pixels that a picture or a crop is shrunk to, at most; 28x28 are one token",
    )
    parser.add_argument(
        "--reset-conditioning",
        type=branch_names,
        metavar="NAMES",
        help="draw the conditioning layers of these branches again, from small weights, e.g. "
        "dino,sam; for branches whose features the conditioning drowns",
    )
    parser.add_argument(
        "--fresh-steering",
        dest="reset_conditioning",
        action=_OldName,
        type=branch_names,
        help=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="S", help="of those weights (default: 0)"
    )


def _set(args: argparse.Namespace) -> None:
    """Check, write, and say what changed."""
    settings = training_settings(args)
    if not settings and args.max_pixels is None and args.reset_conditioning is None:
        raise PromptError(
            "there is nothing to set; give --alignment, --stems, --mask, --mask-ratio, "
            "--max-pixels or --reset-conditioning"
        )
    if not args.folder.is_dir():
        raise CheckpointError(f"there is no model folder {args.folder}; expected one on this disk")
    quieten(args)
    _check_folder(str(args.folder))
    steered = _steered_branches(args.folder, args.reset_conditioning)
    if settings:
        _set_training(args, settings)
    if args.max_pixels is not None:
        _set_max_pixels(args.folder, args.max_pixels)
    if steered:
        _refresh_steering(args.folder, steered, args.seed)


def _check_folder(folder: str) -> None:
    """Refuse to change what is no whole model: its settings and its tokenizer have to fit."""
    from vpt.model.config import load_config
    from vpt.model.processing import VPTProcessor

    load_config(folder)
    VPTProcessor.from_pretrained(folder)


def _set_training(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    from vpt.model.config import load_config

    config = load_config(str(args.folder))
    old = {name: getattr(config, name) for name in _NAMES}
    new = {**old, **settings}
    check_training_settings(new, has_ratio=args.mask_ratio is not None)
    type(config).from_dict({**config.to_dict(), **settings})  # checks itself
    write_file(lambda folder: _write(folder, settings, type(config)), args.folder)
    for name in settings:
        kept = new[name] == old[name]
        said = ", as it was" if kept else f" -> {_word(name, new[name])}"
        print_out(f"{_NAMES[name]:<11} {_word(name, old[name])}{said}")


def _set_max_pixels(folder: Path, max_pixels: int) -> None:
    from vpt.model.hub import read_json
    from vpt.model.processing import build_image_processor

    file = folder / "preprocessor_config.json"
    processor = build_image_processor(read_json(file))
    old = processor.size["longest_edge"]  # the names are transformers'; both are pixels in all
    smallest = min(processor.size["shortest_edge"], max_pixels)
    processor.size = {"shortest_edge": smallest, "longest_edge": max_pixels}

    def save(folder: Path) -> None:
        with replacing_files(folder) as draft:
            processor.save_pretrained(draft)

    write_file(save, folder)
    kept = ", as it was" if old == max_pixels else f" -> {max_pixels}"
    print_out(f"{'max-pixels':<11} {old}{kept}")


def _steered_branches(folder: Path, names: Sequence[str] | None) -> tuple[str, ...]:
    """Branches whose steering is to begin anew; found out before anything is written."""
    if names is None:
        return ()
    from vpt.model.config import load_config

    encoders = load_config(str(folder)).vision_encoder_ls
    if not names:
        raise PromptError("--reset-conditioning: expected names of branches, as in dino,sam")
    if missing := [name for name in names if name not in encoders]:
        known = ", ".join(encoders) or "none"
        raise PromptError(
            f"--reset-conditioning: no branch {missing[0]} in {folder}; it has: {known}"
        )
    return branches_named(names)


def _refresh_steering(folder: Path, branches: Sequence[str], seed: int) -> None:
    import torch

    from vpt.model.checkpoint import read_model

    model = read_model(str(folder))
    torch.manual_seed(seed)
    for name in branches:
        model.projector(name).reset_steering()
        print_out(f"{'steering':<11} of {BRANCH_TOKENS[name].encoder}, anew")
    write_file(partial(_replace_weights, model), folder)


def _replace_weights(model: VPTForConditionalGeneration, folder: Path) -> None:
    """Replace the weights alone; config.json stays as it was written."""
    from vpt.model.hub import WEIGHTS, other_weights

    with TemporaryDirectory(dir=folder, prefix=".draft-") as name, replacing_files(folder) as draft:
        model.save_pretrained(name)
        for file in (file for pattern in WEIGHTS for file in Path(name).glob(pattern)):
            file.replace(draft / file.name)
        stale = other_weights(folder, draft)
    for file in stale:
        file.unlink()


def _write(folder: Path, settings: dict[str, Any], config_class: type) -> None:
    """Write the settings, and what LLaMA-Factory needs to find the code of a released folder."""
    from vpt.model.hub import read_json
    from vpt.model.shim import auto_map, write_processor_entry, write_shim

    file = folder / "config.json"
    content = {**read_json(file), **settings, "auto_map": auto_map(config_class)}
    write_whole(json.dumps(content, indent=2) + "\n", file)
    write_processor_entry(folder)
    write_shim(folder)


def _word(name: str, value: Any) -> str:
    if name == "para_mask_id":
        return MASKS[value]
    if name == "freeze_stems":
        return "frozen" if value else "trained"
    return {True: "on", False: "off"}[value] if name == "alignment" else str(value)


COMMAND = Command(
    help="say how a model is trained next",
    description=(
        "Set what LLaMA-Factory's YAML has no key for, in a model folder.\n"
        "--alignment and --max-pixels also hold when the model is asked; --reset-conditioning\n"
        "changes weights."
    ),
    examples="example:\n  vpt set ./my-model --alignment off --mask question --mask-ratio 0.5",
    add_arguments=_add_arguments,
    run=_set,
)
