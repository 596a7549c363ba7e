"""A trainer of 12 steps on random crops that takes a third of a second, in this process."""

import json
from pathlib import Path
from typing import Any

import torch

from hf_simprune.dino.trainer import DinoTrainer, LoopSettings
from hf_simprune.dino.window import Window

from ..dino.conftest import FixedViews, tiny_dual, tiny_engine, tiny_schedules
from ..tiny_run import TIMING


STEPS = 12
# A trainer's state, but for its step, before anything has happened.
STATE: dict[str, Any] = {
    "batches_seen": 0, "source": [{}], "skipped_in_a_row": 0, "bad_indices": [], "window": vars(Window()),
    "monitor": {"uniform_steps": 0, "one_prototype_steps": 0}, "scaler": None, "identity": {}, "unwritten_metrics": [],
}  # fmt: skip


class Killed(BaseException):
    """Ends a run where SIGKILL might: nothing catches it to save anything."""


class Happening(FixedViews):
    """Crops that call `happen(step)` before step `step`, counted from 1."""

    def __init__(self, happen, **options) -> None:
        super().__init__(**options)
        self.happen = happen

    def batches(self, start):
        for number, batch in enumerate(super().batches(start), start + 1):
            self.happen(number)
            yield batch


def build(folder: Path, happen=None, weights: int = 0, evaluate=None, **settings: Any) -> DinoTrainer:
    values = {"images_per_step": 3, "logging_steps": 1, "save_steps": 3, "disable_tqdm": True}
    engine = tiny_engine(tiny_dual("random", 0.6, dtype=torch.float32, drop_path_rate=0.3, seed=weights))
    source = Happening(happen or (lambda step: None), dtype=torch.float32)
    folder.mkdir(exist_ok=True)
    loop = LoopSettings(folder, **(values | settings))
    return DinoTrainer(engine, tiny_schedules(STEPS), source, loop, evaluate=evaluate)


def untimed(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl but for what the clock says; a line that is not whole is an error."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def tensors(trainer: DinoTrainer) -> dict[str, torch.Tensor]:
    """All that a step changes, as it is now."""
    engine = trainer.engine
    found = {name: tensor.clone() for name, tensor in engine.dual.state_dict().items()}
    found |= {f"objective.{name}": tensor.clone() for name, tensor in engine.objective.state.items()}
    for group in engine.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in engine.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = torch.as_tensor(value).clone()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
