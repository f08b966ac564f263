"""What lockstep costs in a training step of two CPU processes under DDP; random weights.

    python benchmarks/lockstep.py --repeats 5 --json out.json

Forward and backward of the same model and batches, in turn: under plain DDP, and with the processes
in lockstep, as sharded weights need it. ``equal`` batches call for the same parts of the model in
both processes, ``unequal`` ones for features of DINOv2 in one process and for crops in the other.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from random_models import SIZES, build
from reporting import announce, save, take_turns
from training_rows import make_batch

MODES = ("DDP", "DDP in lockstep")
BATCHES = {"equal": ("dino", "dino"), "unequal": ("dino", "region")}


def measure(rank: int, port: int, args: argparse.Namespace, times: Any) -> None:
    """Time steps as one of two processes; the first one reports seconds by batch and mode."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    size = SIZES[args.size]
    model, processor = build(size, torch.device("cpu"), torch.float32)
    for part in (model.model.visual, model.branches):
        part.requires_grad_(False)
    wrapped = torch.nn.parallel.DistributedDataParallel(model.train(), find_unused_parameters=True)
    for name, kinds in BATCHES.items():
        inputs = make_batch(kinds[rank], model, processor, size.image_wh).inputs

        def step(mode: str, inputs: Any = inputs) -> float:
            model.trains_in_lockstep = mode != "DDP"
            model.zero_grad(set_to_none=True)
            dist.barrier()
            start = time.perf_counter()
            wrapped(**inputs).loss.backward()
            dist.barrier()
            return time.perf_counter() - start

        contestants = {mode: lambda mode=mode: step(mode) for mode in MODES}
        take_turns(contestants, 1)
        measured = take_turns(contestants, args.repeats)
        if rank == 0:
            times[name] = measured
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write everything here, raw repeats included")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    about = announce(argparse.Namespace(**vars(args), device="cpu"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        times = manager.dict()
        torch.multiprocessing.spawn(measure, (port, args, times), nprocs=2)
        report = {**about, "seconds": dict(times)}
    for name, by_mode in report["seconds"].items():
        pairs = zip(by_mode[MODES[1]], by_mode[MODES[0]], strict=True)
        ratios = sorted(lockstep / plain for lockstep, plain in pairs)
        plain = statistics.median(by_mode[MODES[0]])
        print(
            f"{name}: DDP {plain:.2f} s a step; in lockstep {statistics.median(ratios):.2f} times "
            f"that ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
