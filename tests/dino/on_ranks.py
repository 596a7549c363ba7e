"""Functions on several ranks of gloo, in processes forked from the test's own, so that nothing is imported again."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState


def on_ranks(world: int, function: Callable[..., None], *args: Any) -> None:
    """Run `function(rank, *args)` in `world` processes; raises what one of them raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    AcceleratorState._reset_state(True)
    mp.start_processes(_rank, (world, port, function, args), nprocs=world, start_method="fork")
    AcceleratorState._reset_state(True)


def join_ranks(rank: int, world: int, port: int) -> None:
    """Say in the environment, as a launcher does, which rank this process is."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise accelerate gives every rank all cores
    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)


def _rank(rank: int, world: int, port: int, function: Callable[..., None], args: tuple) -> None:
    join_ranks(rank, world, port)
    function(rank, *args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
