"""Two processes of one training, as torchrun would start them."""

import os
import socket

import torch
import torch.distributed as dist


def _run(rank, port, function, arguments, results):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    results[rank] = function(*arguments)
    dist.destroy_process_group()


def run_in_two(function, *arguments):
    """By rank, what a function of a module returns in each process; it makes the group itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_run, (port, function, arguments, results), nprocs=2)
        return dict(results)
