"""``vpt init``: a VPT model made from a Qwen2-VL one, or a VPT one given more tokens."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.model import DTYPES, quieten
from vpt.cli.output import check_out_folder, print_out, write_file
from vpt.cli.parser import (
    Command,
    add_flag,
    add_path,
    add_value,
    branch_names,
    comma_list,
    path_or_other,
    whole_number,
)
from vpt.cli.set import add_training_arguments, check_training_settings, training_settings
from vpt.errors import CheckpointError, PromptError
from vpt.model.folder import check_base, check_depth_tokenizer, model_type
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    CONTENT_TOKENS,
    GROUND_TOKENS,
    GROUNDING,
    NO_CONTENT,
    RELEASED_GRID_SIZE,
    ContentTokens,
    branches_named,
    encoder_names,
    perception_tokens,
)

if TYPE_CHECKING:
    from vpt.depth.tokenizer import DepthTokenizer
    from vpt.model.modeling import VPTForConditionalGeneration
    from vpt.model.processing import VPTProcessor

DEPTH_TOKENIZER = "depth_tokenizer"
"""Folder within that of a model."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=path_or_other,
        required=True,
        metavar="ID_OR_FOLDER",
        help="a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model to start from, or a VPT one to extend by "
        "--content or --grounding",
    )
    parser.add_argument(
        "--branches",
        type=branch_names,
        metavar="LIST",
        help=f"branches, out of {','.join(encoder_names())}; the region call is always included, "
        "so the list may be empty. Omit it where --base is a VPT model, which keeps its branches",
    )
    parser.add_argument(
        "--content",
        type=_content,
        default=NO_CONTENT,
        metavar="LIST",
        help=f"content that the model writes about an image, out of {','.join(CONTENT_TOKENS)}",
    )
    add_flag(parser, "--grounding", "let it call for phrases, which a detector finds in the image")
    decoder = "decoder of the depth maps that the model writes; copied into the folder"
    add_path(parser, "--depth-tokenizer", "DIR_OR_PTH", decoder)
    add_path(parser, "--out", "DIR", "folder to write", required=True)
    for row in BRANCH_TOKENS.values():
        if row.source is not None:
            about = f"{row.title} encoder (default: {row.source})"
            parser.add_argument(
                f"--{row.encoder}", type=path_or_other, metavar="ID_OR_PATH", help=about
            )
    cells = "cells per side of the region grid"
    add_value(parser, "--grid-size", "K", whole_number(1), cells, RELEASED_GRID_SIZE)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="data type of the weights")
    add_value(parser, "--seed", "S", whole_number(0), "seed of random weights", 0)
    add_training_arguments(parser)
    add_flag(parser, "--force", "write into a folder that has files")


def _content(text: str) -> ContentTokens:
    try:
        return ContentTokens(comma_list(text))
    except CheckpointError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _init(args: argparse.Namespace) -> None:
    """Check the arguments, build, save, and print what was made."""
    encoders = _checked_encoders(args)
    _check_base(args)
    settings = training_settings(args)
    check_training_settings(
        {"alignment": False, "para_mask_id": 0, **settings}, has_ratio=args.mask_ratio is not None
    )
    quieten(args)
    model, processor, tokens = _build(args, encoders, tokenizer := _read_depth_tokenizer(args))
    if tokenizer is not None:
        settings["depth_tokenizer"] = DEPTH_TOKENIZER
    for name, value in settings.items():
        setattr(model.config, name, value)
    write_file(model.save_pretrained, args.out)
    write_file(processor.save_pretrained, args.out)
    if tokenizer is not None:
        write_file(tokenizer.save, args.out / DEPTH_TOKENIZER)
    _print_summary(args, model, len(tokens), can_decode=tokenizer is not None)


def _print_summary(
    args: argparse.Namespace, model: VPTForConditionalGeneration, num_tokens: int, can_decode: bool
) -> None:
    num_all = sum(parameter.numel() for parameter in model.parameters())
    num_new = sum(parameter.numel() for parameter in model.projectors.parameters())
    print_out(f"made {args.out} from {args.base}")
    places = ["crop", GROUNDING] if args.grounding else ["crop"]
    print_out(f"  branches    {', '.join([*places, *model.config.vision_encoder_ls])}")
    if kinds := model.config.content_tokens.kinds:
        is_undecoded = "depth" in kinds and not can_decode
        note = "; no depth tokenizer, so maps are codes only" if is_undecoded else ""
        print_out(f"  content     {', '.join(kinds)}{note}")
    untrained = "" if args.branches is None else " untrained"
    print_out(f"  parameters  {num_all:,}, of which {num_new:,} in{untrained} projectors")
    print_out(f"  tokens      {num_tokens} for perception, untrained")
    print_out(f'ask it:  vpt ask --model {shlex.quote(str(args.out))} photo.jpg "What is this?"')


def _build(
    args: argparse.Namespace, encoders: dict[str, str], tokenizer: DepthTokenizer | None
) -> tuple[VPTForConditionalGeneration, VPTProcessor, list[str]]:
    """Model, processor, and the tokens that were added."""
    from vpt.model.building import add_tokens, build_from_base

    content = args.content
    if tokenizer is not None and "depth" in content.kinds:
        sizes = tokenizer.config
        content = replace(content, num_codes=sizes.num_codes, num_cells=sizes.num_cells)
    codebook = None if tokenizer is None else tokenizer.network.codebook.vectors
    options = {
        "codebook": codebook,
        "grounding": args.grounding,
        "dtype": args.dtype,
        "seed": args.seed,
    }
    if args.branches is None:
        phrase = GROUND_TOKENS if args.grounding else ()
        return *add_tokens(args.base, content, **options), [*content.tokens, *phrase]
    made = build_from_base(
        args.base,
        args.branches,
        encoders=encoders,
        grid_size=args.grid_size,
        content=content,
        **options,
    )
    special, ordinary = perception_tokens(
        branches_named(args.branches), args.grid_size, content, args.grounding
    )
    return *made, [*special, *ordinary]


def _read_depth_tokenizer(args: argparse.Namespace) -> DepthTokenizer | None:
    """The given tokenizer, or that in the folder of a VPT base; it is copied."""
    from vpt.depth.tokenizer import load_depth_tokenizer

    if args.depth_tokenizer is not None:
        return load_depth_tokenizer(args.depth_tokenizer)
    own = Path(args.base) / DEPTH_TOKENIZER
    return load_depth_tokenizer(own) if args.branches is None and own.is_dir() else None


def _check_base(args: argparse.Namespace) -> None:
    """Check, before torch is imported, what the folders on this disk hold."""
    if args.depth_tokenizer is not None:
        check_depth_tokenizer(args.depth_tokenizer)
    try:
        found = model_type(args.base)
    except CheckpointError as exc:
        raise CheckpointError(f"cannot load the base model {args.base}: {exc}") from exc
    if found is not None:
        check_base(found, args.base, is_extended=args.branches is None)


def _checked_encoders(args: argparse.Namespace) -> dict[str, str]:
    """Check folder and branches; return the encoders that are not the released ones."""
    check_out_folder(args.out)
    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise PromptError(
            f"--out: {args.out} is not empty; choose another folder, or --force to write into it"
        )
    if args.branches is None and not (args.content.kinds or args.grounding):
        raise PromptError(
            "give --branches to make a VPT model from a Qwen2-VL one, or --content or --grounding "
            "to add tokens to a VPT model"
        )
    if args.depth_tokenizer is not None and "depth" not in args.content.kinds:
        raise PromptError("--depth-tokenizer needs depth among --content")
    names = {branch: row.encoder for branch, row in BRANCH_TOKENS.items()}
    given = {branch: getattr(args, name, None) for branch, name in names.items()}
    encoders = {branch: source for branch, source in given.items() if source}
    for branch in encoders:
        if (name := names[branch]) not in (args.branches or ()):
            raise PromptError(f"--{name} is given, but {name} is not among --branches")
    return encoders


COMMAND = Command(
    help="make a VPT model from a Qwen-VL one",
    description=(
        "Make a VPT model from a Qwen2-VL, Qwen2.5-VL or Qwen3-VL one: add perception tokens,\n"
        "vision branches and projectors. Or add to a VPT model the tokens for depth maps, boxes\n"
        "and phrases.\n"
        "All additions are untrained."
    ),
    examples=(
        "examples:\n"
        "  vpt init --base Qwen/Qwen2-VL-2B-Instruct --branches clip,dino --out ./my-model\n"
        "  vpt init --base ./my-model --content depth,boxes --out ./my-depth-model"
    ),
    add_arguments=_add_arguments,
    run=_init,
)
