"""``vpt train-policy``: a model learns when to look, by rewards for its own answers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from vpt.cli.model import quieten
from vpt.cli.output import print_err, print_out
from vpt.cli.parser import Command, add_path

_SHOWN = ("reward", "score", "gain", "called", "num_tokens", "cut", "entropy", "step_s")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "config", "CONFIG.yaml", "settings: see docs/policy-training.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings in place of the file's"
    )


def _run(args: argparse.Namespace) -> None:
    quieten(args)
    from vpt.policy.settings import load_settings

    settings = load_settings(args.config, args.overrides)
    from vpt.policy.trainer import PolicyTrainer

    trainer = PolicyTrainer(settings)
    is_main = trainer.processes.is_main
    if trainer.step and is_main:
        print_err(f"resuming after step {trainer.step} of {settings.max_steps}")
    for figures in trainer.run():
        if is_main:
            print_out(_line(figures, settings.max_steps))
    if is_main:
        print_err(f"saved the model in {settings.output_dir}")


def _line(figures: Mapping[str, Any], max_steps: int) -> str:
    shown = figures.get("eval", figures)
    parts = [f"step {figures['step']}/{max_steps}"]
    for name in ("score", "blind_score", "gain", "called") if "eval" in figures else _SHOWN:
        value = shown.get(name)
        if isinstance(value, Mapping):
            parts.append(f"{name} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
        elif value is not None:
            parts.append(f"{name} {value:.3f}")
    return ("held out: " if "eval" in figures else "") + " ".join(parts)


COMMAND = Command(
    help="train when and where to look, by rewards",
    description=(
        "Train a model by rewards for its own answers (GRPO): it answers each question several\n"
        "times, looks where it chooses to, and learns from the better answers. A run that was\n"
        "stopped resumes from its last checkpoint when the command is repeated."
    ),
    examples=(
        "examples:\n"
        "  vpt train-policy configs/policy/embedded.yaml\n"
        "  vpt train-policy configs/policy/embedded.yaml max_steps=500 output_dir=saves/short\n"
        "  torchrun --nproc-per-node 2 -m vpt train-policy configs/policy/embedded.yaml"
    ),
    add_arguments=_add_arguments,
    run=_run,
)
