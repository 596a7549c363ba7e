# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: safetensors and JSON only, written atomically, rotated, resumed to the last digit.

`checkpoint-<step>/` holds `student.safetensors`, `teacher.safetensors`, `optimizer.safetensors` (moments by parameter
name, and the objective's centres) and `trainer_state.json`. No random state is stored: every random number of a run is
a function of the seed, the epoch, the example and the step.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from .engine import DinoEngine


STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in output_dir.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def find_checkpoint(output_dir: Path, resume_from: str) -> Path:
    """The folder meant by `--resume_from_checkpoint`: `latest`, or a path.

    Raises:
        InputError: there is no complete checkpoint there.
    """
    if resume_from == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise InputError(f"--resume_from_checkpoint latest: no checkpoint-<step> folder in {output_dir}")
        return checkpoints[-1]
    path = Path(resume_from)
    if not (path / STATE_FILE).is_file():
        raise InputError(
            f"--resume_from_checkpoint {resume_from}: not a checkpoint folder (no {STATE_FILE} in it); "
            "give a checkpoint-<step> folder, or latest"
        )
    return path


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to `abandoned-checkpoint-…`, so that `latest` never means one of them.

    A run that goes on from an earlier checkpoint takes another course; returns the new names.
    """
    moved = []
    for path in list_checkpoints(output_dir):
        if int(path.name.partition("-")[2]) > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `trainer_state.json`."""
    return json.loads((checkpoint / STATE_FILE).read_text())


def save_checkpoint(output_dir: Path, engine: DinoEngine, state: dict[str, Any], keep: int | None = None) -> Path:
    """Write `checkpoint-<state["step"]>`; it appears under its name only when complete. Keep the newest `keep`."""
    target = output_dir / f"checkpoint-{state['step']}"
    partial = output_dir / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_owned(engine.dual.student.state_dict()), partial / "student.safetensors")
    save_file(_owned(engine.dual.teacher.state_dict()), partial / "teacher.safetensors")
    save_file(_owned(optimizer_tensors(engine) | engine.objective.state), partial / "optimizer.safetensors")
    (partial / STATE_FILE).write_text(json.dumps(state, indent=2))
    for file in partial.iterdir():
        _flush(file)
    if target.exists():  # the same step saved twice, for example by Ctrl-C right after a periodic save
        shutil.rmtree(target)
    os.replace(partial, target)
    _flush(output_dir)
    for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
        if old != target:
            shutil.rmtree(old)
    return target


def load_checkpoint(checkpoint: Path, engine: DinoEngine) -> dict[str, Any]:
    """Put student, teacher, optimiser, centres and scaler back; returns the trainer's state.

    Raises:
        InputError: the checkpoint belongs to another architecture.
    """
    device = str(engine.accelerator.device)
    for part in ("student", "teacher"):
        module = getattr(engine.dual, part)
        tensors = _read(checkpoint / f"{part}.safetensors", device)
        _check_architecture(checkpoint, module.state_dict(), tensors)
        module.load_state_dict(tensors)
    tensors = _read(checkpoint / "optimizer.safetensors", device)
    # moments are named <parameter>.<moment>, the objective's tensors have no dot
    found = {name: tensors.pop(name) for name in list(tensors) if "." not in name}
    if found.keys() != engine.objective.state.keys():
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: it was written with another --objective or --centering; resume "
            "with the options it was started with, see training/run.json"
        )
    engine.objective.state = found
    load_optimizer_tensors(engine, tensors)
    state = read_state(checkpoint)
    if engine.accelerator.scaler is not None and state.get("scaler"):
        engine.accelerator.scaler.load_state_dict(state["scaler"])
    return state


def optimizer_tensors(engine: DinoEngine) -> dict[str, Tensor]:
    """AdamW's state as `<parameter name>.<moment>`; parameters that were never stepped have none."""
    tensors = {}
    for group in engine.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in engine.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
    return tensors


def load_optimizer_tensors(engine: DinoEngine, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, moment = key.rsplit(".", 1)
        moments.setdefault(name, {})[moment] = value
    optimizer = engine.optimizer
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in moments:
                optimizer.state[parameter] = moments[name]


def _read(path: Path, device: str) -> dict[str, Tensor]:
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--resume_from_checkpoint {path.parent}: {path.name} cannot be read: {error}") from None


def _check_architecture(checkpoint: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    if {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in found.items()}:
        return
    for name in sorted(wanted.keys() | found.keys()):
        here = tuple(wanted[name].shape) if name in wanted else "absent"
        there = tuple(found[name].shape) if name in found else "absent"
        if here != there:
            raise InputError(
                f"--resume_from_checkpoint {checkpoint}: it holds another architecture ({name} is {there} there and "
                f"{here} in this run); resume with the options it was started with, see training/run.json"
            )


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
