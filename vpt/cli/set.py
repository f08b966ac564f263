"""``vpt set``: settings of a model folder for its next training, where YAML has no key for them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vpt.cli.model import quieten
from vpt.cli.output import print_err, print_out, write_file
from vpt.cli.parser import Command, add_path, add_value, branch_names, number, whole_number
from vpt.errors import CheckpointError, PromptError
from vpt.files import replace_atomically, write_atomic
from vpt.model.folder import check_model, read_json
from vpt.protocol.tokens import BRANCH_TOKENS, TOWER, branches_named

if TYPE_CHECKING:
    from vpt.model.config import VPTSettings
    from vpt.model.modeling import VPTForConditionalGeneration


@dataclass(frozen=True)
class _Setting:
    """An option of training, without its dashes, and the key of ``config.json`` that it sets.

    ``values`` maps words on the command line to values in the file; it is empty for a ratio.
    """

    option: str
    key: str
    help: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dest(self) -> str:
        return self.option.replace("-", "_")

    def word(self, value: Any) -> str:
        return next((word for word, one in self.values.items() if one == value), str(value))


_SETTINGS = (
    _Setting(
        "alignment",
        "alignment",
        "on: re-encoded features are not conditioned on control states, as in the first stage",
        {"on": True, "off": False},
    ),
    _Setting(
        "stems",
        "freeze_stems",
        "frozen: of the projectors only the conditioning layers are trained; for steps so large "
        "that they would undo the alignment",
        {"frozen": True, "trained": False},
    ),
    _Setting(
        "mask",
        "para_mask_id",
        "part of the prompt that is masked in training after a call, so that the answer depends "
        "on the result of the call",
        {"none": 0, "question": 1, "question+image": 2},
    ),
    _Setting("mask-ratio", "para_mask_ratio", "share of the samples with a mask, 0 to 1"),
)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`training_settings` reads."""
    training = parser.add_argument_group("training")
    for one in _SETTINGS:
        if one.values:
            training.add_argument(f"--{one.option}", choices=tuple(one.values), help=one.help)
        else:
            add_value(training, f"--{one.option}", "R", number(0, 1), one.help)


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the configuration that the arguments change."""
    given = [(one, getattr(args, one.dest)) for one in _SETTINGS]
    return {one.key: one.values.get(word, word) for one, word in given if word is not None}


def check_training_settings(settings: Mapping[str, Any], *, has_ratio: bool) -> None:
    """Refuse settings, as they will be, that would be without effect."""
    if settings["alignment"] and settings["para_mask_id"]:
        raise PromptError("nothing is masked in alignment; add --mask none, or --alignment off")
    if settings["alignment"] and settings.get("freeze_stems"):
        raise PromptError("alignment trains the stems; add --stems trained, or --alignment off")
    if has_ratio and not settings["para_mask_id"]:
        raise PromptError("--mask-ratio needs a mask; add --mask question or question+image")


def _former_name(text: str) -> tuple[str, ...]:
    print_err(
        "--fresh-steering is called --reset-conditioning now; the old name will go with the next "
        "release"
    )
    return branch_names(text)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "folder", "FOLDER", "a VPT model, as saved")
    add_training_arguments(parser)
    most = "maximum number of pixels of an image or crop; one token is 28x28, Qwen3-VL's 32x32"
    add_value(parser, "--max-pixels", "N", whole_number(1), most)
    own = "the same for what its own tower encodes again; by default that of --max-pixels"
    add_value(parser, "--own-tower-pixels", "N", whole_number(1), own)
    reset = (
        "initialise the conditioning layers of these branches again with small weights, e.g. "
        "dino,sam; for branches whose conditioning exceeds their features"
    )
    add_value(parser, "--reset-conditioning", "NAMES", branch_names, reset)
    parser.add_argument(
        "--fresh-steering", dest="reset_conditioning", type=_former_name, help=argparse.SUPPRESS
    )
    add_value(parser, "--seed", "S", whole_number(0), "seed of those weights", 0)


def _set(args: argparse.Namespace) -> None:
    """Check everything, write, and print what changed."""
    settings = training_settings(args)
    sizes = args.max_pixels, args.own_tower_pixels
    if not settings and sizes == (None, None) and args.reset_conditioning is None:
        raise PromptError(
            "there is nothing to set; give --alignment, --stems, --mask, --mask-ratio, "
            "--max-pixels, --own-tower-pixels or --reset-conditioning"
        )
    if not args.folder.is_dir():
        raise CheckpointError(f"there is no model folder {args.folder}; expected one on this disk")
    check_model(str(args.folder))
    quieten(args)
    from vpt.model.config import load_config
    from vpt.model.processing import VPTProcessor

    config = load_config(str(args.folder))
    VPTProcessor.from_pretrained(str(args.folder))  # refuses a tokenizer of another model
    reset = _branches_to_reset(args, config)
    for option, pixels in zip(("--max-pixels", "--own-tower-pixels"), sizes, strict=True):
        _check_pixels(option, pixels, config.vision_config)
    if args.own_tower_pixels is not None and TOWER not in config.branches:
        raise PromptError(f"--own-tower-pixels: {args.folder} does not re-encode by its own tower")
    if settings:
        _set_training(args, config, settings)
    if args.max_pixels is not None:
        _set_max_pixels(args.folder, args.max_pixels)
    if args.own_tower_pixels is not None:
        _set_own_tower_pixels(args.folder, config, args.own_tower_pixels)
    if reset:
        _reset_conditioning(args.folder, reset, args.seed)


def _branches_to_reset(args: argparse.Namespace, config: VPTSettings) -> tuple[str, ...]:
    names, encoders = args.reset_conditioning, config.vision_encoder_ls
    if names is None:
        return ()
    if not names:
        raise PromptError("--reset-conditioning: expected names of branches, as in dino,sam")
    if missing := [name for name in names if name not in encoders]:
        known = ", ".join(encoders) or "none"
        raise PromptError(
            f"--reset-conditioning: no branch {missing[0]} in {args.folder}; it has: {known}"
        )
    return branches_named(names)


def _check_pixels(option: str, pixels: int | None, vision: Any) -> None:
    side = vision.patch_size * vision.spatial_merge_size
    if pixels is not None and pixels < side**2:
        raise PromptError(
            f"{option} must be at least {side**2}, one token of this model ({side}x{side} "
            f"pixels), not {pixels}"
        )


def _set_training(args: argparse.Namespace, config: VPTSettings, settings: dict[str, Any]) -> None:
    old = {one.key: getattr(config, one.key) for one in _SETTINGS}
    check_training_settings({**old, **settings}, has_ratio=args.mask_ratio is not None)
    config_class: Any = type(config)
    config_class.from_dict({**config.to_dict(), **settings})  # checks itself
    write_file(lambda folder: _write_config(folder, settings, config_class), args.folder)
    for one in _SETTINGS:
        if one.key in settings:
            _print_change(one.option, one.word(old[one.key]), one.word(settings[one.key]))


def _print_change(option: str, old: str, new: str) -> None:
    print_out(f"{option:<11} {old}{', as it was' if new == old else f' -> {new}'}")


def _write_config(folder: Path, settings: dict[str, Any], config_class: type) -> None:
    """Write the settings, and what LLaMA-Factory needs to find the code of a released folder."""
    from vpt.model.hub import auto_map, write_processor_entry, write_shim

    file = folder / "config.json"
    content = {**read_json(file), **settings, "auto_map": auto_map(config_class)}
    write_atomic(json.dumps(content, indent=2) + "\n", file)
    write_processor_entry(folder)
    write_shim(folder)


def _set_max_pixels(folder: Path, max_pixels: int) -> None:
    processor = _image_processor(folder)
    old = processor.size
    processor.size = _with_most(old, max_pixels)

    def save(folder: Path) -> None:
        with replace_atomically(folder) as draft:
            processor.save_pretrained(draft)

    write_file(save, folder)
    _print_change("max-pixels", str(old["longest_edge"]), str(max_pixels))


def _set_own_tower_pixels(folder: Path, config: VPTSettings, max_pixels: int) -> None:
    first_look = _image_processor(folder).size
    old = config.branch_configs.get(TOWER, {}).get("preprocess", {}).get("size", first_look)
    own = {"preprocess": {"size": _with_most(first_look, max_pixels)}}
    settings = {"branch_configs": {**config.branch_configs, TOWER: own}}
    write_file(lambda folder: _write_config(folder, settings, type(config)), folder)
    _print_change("own-tower-pixels", str(old["longest_edge"]), str(max_pixels))


def _image_processor(folder: Path) -> Any:
    from vpt.model.processing import build_image_processor

    return build_image_processor(read_json(folder / "preprocessor_config.json"))


def _with_most(size: Mapping[str, int], max_pixels: int) -> dict[str, int]:
    """The size with another upper limit; the names are transformers', both are pixels in all."""
    return {"shortest_edge": min(size["shortest_edge"], max_pixels), "longest_edge": max_pixels}


def _reset_conditioning(folder: Path, branches: Sequence[str], seed: int) -> None:
    import torch

    from vpt.model.modeling import read_model

    model = read_model(str(folder))
    torch.manual_seed(seed)
    for name in branches:
        model.projector(name).reset_conditioning()
        print_out(f"conditioning of {BRANCH_TOKENS[name].encoder} reset")
    write_file(partial(_replace_weights, model), folder)


def _replace_weights(model: VPTForConditionalGeneration, folder: Path) -> None:
    """Replace the weights alone; config.json stays as it was written."""
    from vpt.model.hub import WEIGHTS, other_weights

    with (
        TemporaryDirectory(dir=folder, prefix=".draft-") as name,
        replace_atomically(folder) as draft,
    ):
        model.save_pretrained(name)
        for file in (file for pattern in WEIGHTS for file in Path(name).glob(pattern)):
            file.replace(draft / file.name)
        stale = other_weights(folder, draft)
    for file in stale:
        file.unlink()


COMMAND = Command(
    help="change the training settings of a model folder",
    description=(
        "Change settings of a model folder for which LLaMA-Factory's YAML has no key.\n"
        "--alignment and the numbers of pixels also hold when the model is asked;\n"
        "--reset-conditioning changes weights."
    ),
    examples="example:\n  vpt set ./my-model --alignment off --mask question --mask-ratio 0.5",
    add_arguments=_add_arguments,
    run=_set,
)
