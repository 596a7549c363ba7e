"""What fails in the main process fails in all, so that none waits for ever; on two processes that talk over gloo."""

import os
import socket

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_simprune.dino.checkpoint import NotSavedError
from hf_simprune.dino.main_process import on_main


def act(kind: str):
    if kind == "returns":
        return {"answer": 42}
    raise {"ours": NotSavedError("checkpoint-3 could not be written"), "another": KeyError("name")}[kind]


def work(rank: int, port: int, results) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(True)
    accelerator, found = Accelerator(cpu=True), []
    for kind in ("returns", "ours", "another"):
        try:
            found.append(on_main(accelerator, lambda kind=kind: act(kind)))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    results.put((rank, accelerator.num_processes, found))
    dist.destroy_process_group()


def test_results_and_errors_reach_every_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # the libraries are imported already
    results = context.Queue()
    processes = [context.Process(target=work, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    ours = ("NotSavedError", "checkpoint-3 could not be written")
    assert found[0] == (0, 2, [{"answer": 42}, ours, ("KeyError", "'name'")])
    assert found[1] == (1, 2, [{"answer": 42}, ours, ("RuntimeError", "KeyError: 'name'")])


def test_a_single_process_just_acts():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    assert on_main(accelerator, lambda: act("returns")) == {"answer": 42}
    with pytest.raises(NotSavedError):
        on_main(accelerator, lambda: act("ours"))
