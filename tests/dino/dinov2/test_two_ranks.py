"""A step on two ranks equals the same step in one process."""

import os
import socket

import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

from hf_simprune.dino.dinov2.objective import CENTERINGS, Dinov2Objective
from hf_simprune.dino.engine import Views

from ..conftest import tiny_schedules
from .tiny_dinov2 import masked_views, tiny_dinov2, tiny_dinov2_engine


def objective(centering):
    return Dinov2Objective(centering=centering)


def share(views: Views, rank: int) -> Views:
    """Two of the four images of every view."""

    def part(tensor):
        return tensor.unflatten(0, (-1, 4))[:, 2 * rank : 2 * rank + 2].flatten(0, 1)

    return Views(part(views.global_crops), part(views.local_crops), masks=part(views.masks))


def trained(engine, rank=None):
    results = []
    for step in (11, 12):
        views = masked_views(step, batch=4)
        if step == 12:  # one rank has no masked patch at all
            views.masks.unflatten(0, (2, 4))[:, :2] = False
        result = engine.step([views if rank is None else share(views, rank)], tiny_schedules().at(step))
        results.append((result.loss, result.teacher_entropy, *result.parts.values()))
    return torch.tensor(results, dtype=torch.float64)


def state_of(engine):
    return {**engine.dual.state_dict(), **engine.objective.state}


def _rank(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(True)
    for centering in CENTERINGS:
        engine = tiny_dinov2_engine(tiny_dinov2("simprune", 0.8), objective(centering))
        assert engine.accelerator.num_processes == 2
        torch.save((trained(engine, rank), state_of(engine)), f"{folder}/{centering}-{rank}.pt")
        engine.model = engine.dual
        engine.accelerator.free_memory()
    engine.accelerator.end_training()


def test_two_ranks_equal_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank, (str(tmp_path), port), nprocs=2, start_method="fork")
    AcceleratorState._reset_state(True)
    for centering in CENTERINGS:
        engine = tiny_dinov2_engine(tiny_dinov2("simprune", 0.8), objective(centering))
        expected, state = trained(engine), state_of(engine)
        for rank in (0, 1):
            results, found = torch.load(tmp_path / f"{centering}-{rank}.pt")
            assert (results - expected).abs().max() < 1e-9
            assert found.keys() == state.keys()
            for name, tensor in state.items():  # AdamW magnifies rounding of tiny gradients
                assert (found[name] - tensor).abs().max() < 1e-7, name
