# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: safetensors and JSON only, whole or not there, with checksums, resumed to the last digit.

`checkpoint-<step>/` holds `student.safetensors`, `teacher.safetensors`, `optimizer.safetensors` (moments by parameter
name, and the objective's centres), `trainer_state.json` and `manifest.json` (length and SHA-256 of the others). No
random state is stored: every random number of a run is a function of the seed, the epoch, the example and the step.
"""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic import REPLACED, STORAGE_ERRORS, new_folder, reason, remove_folder, standing
from ..errors import InputError
from .engine import DinoEngine
from .manifest import MANIFEST, find_damage, write_manifest
from .sharding import dealt_out_like, full_tensors, load_full_tensors
from .trainer_state import wrong_field


# the tensors of each file, by its name
Contents = Mapping[str, Mapping[str, Tensor]]

STATE_FILE = "trainer_state.json"
STUDENT, TEACHER, OPTIMIZER = (f"{part}.safetensors" for part in ("student", "teacher", "optimizer"))
_NAME = re.compile(rf"(?:{re.escape(REPLACED)})?checkpoint-(0|[1-9][0-9]*)")


class NotSavedError(RuntimeError):
    """A checkpoint could not be written. The message says why and which one is the last good one."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    # one that was being replaced when the program was killed may only stand under its second name
    steps = {int(m[1]) for path in output_dir.iterdir() if (m := _NAME.fullmatch(path.name)) and path.is_dir()}
    return [standing(output_dir / f"checkpoint-{step}") for step in sorted(steps)]


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest, for a message; None where there is none or the folder cannot be read either."""
    with suppress(OSError):
        return next(reversed(list_checkpoints(output_dir)), None)
    return None


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
    path = path if path.exists() else standing(path)
    if not any((path / name).is_file() for name in (STATE_FILE, MANIFEST)):
        raise InputError(
            f"--resume_from_checkpoint {resume_from}: not a checkpoint folder (no {STATE_FILE} in it); "
            "give a checkpoint-<step> folder, or latest"
        )
    return path


def check_files(checkpoint: Path) -> None:
    """Compare all files of a checkpoint with its checksums.

    Raises:
        InputError: a file is damaged. The message names it, and the newest earlier checkpoint that is not.
    """
    damage = _damage(checkpoint)
    if damage is None:
        return
    step = _step(checkpoint)
    earlier = [path for path in list_checkpoints(checkpoint.parent) if step is None or _number(path) < step]
    intact = next((path for path in reversed(earlier) if _damage(path) is None), None)
    offer = "no earlier checkpoint is intact: put back a copy of that file if there is one, or train in another folder"
    if intact is not None:
        offer = f"the newest intact one before it is {intact.name}: use --resume_from_checkpoint {intact}"
    raise InputError(f"--resume_from_checkpoint {checkpoint}: it is damaged, {damage}; {offer}")


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to `abandoned-checkpoint-…`, so that `latest` never means one of them.

    A run that goes on from an earlier checkpoint takes another course; returns the new names.
    """
    moved = []
    for path in list_checkpoints(output_dir):
        if _number(path) > step:
            target = output_dir / f"abandoned-checkpoint-{_number(path)}"
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `trainer_state.json`.

    Raises:
        InputError: it cannot be read, or holds something else than a trainer's state.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        raise InputError(f"--resume_from_checkpoint {checkpoint}: {STATE_FILE} cannot be read") from None
    wrong = wrong_field(state)
    if wrong is not None:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: {STATE_FILE} is no state of a training ({wrong} is missing or is "
            "not what it should be); resume from another checkpoint"
        )
    return state


def save_checkpoint(output_dir: Path, engine: DinoEngine, state: dict[str, Any], keep: int | None = None) -> Path:
    """Write `checkpoint-<state["step"]>` in a single process and keep the newest `keep`.

    Raises:
        NotSavedError: it could not be written; earlier ones are as they were.
    """
    path = write_checkpoint(output_dir, checkpoint_tensors(engine), state)
    rotate_checkpoints(output_dir, path, keep)
    return path


def checkpoint_tensors(engine: DinoEngine) -> Contents:
    """What each file of a checkpoint holds, on the CPU; empty elsewhere than in the main process. Call it in all."""
    found = {
        STUDENT: full_tensors(engine.dual.student),
        TEACHER: full_tensors(engine.dual.teacher),
        OPTIMIZER: full_tensors(optimizer_tensors(engine) | engine.objective.state),
    }
    main = engine.accelerator.is_main_process
    return {name: _owned(tensors) for name, tensors in found.items()} if main else {}


def write_checkpoint(output_dir: Path, tensors: Contents, state: dict[str, Any]) -> Path:
    """Write `checkpoint-<state["step"]>`; it appears under its name only when complete and on the disk.

    Raises:
        NotSavedError: it could not be written; earlier ones are as they were.
    """
    target = output_dir / f"checkpoint-{state['step']}"
    try:
        # the same step may be saved twice, for example by Ctrl-C right after a periodic save
        with new_folder(target) as partial:
            for name, content in tensors.items():
                save_file(dict(content), partial / name)
            (partial / STATE_FILE).write_text(json.dumps(state, indent=2))
            write_manifest(partial)
    except STORAGE_ERRORS as error:
        good = last_checkpoint(output_dir)
        last = "no earlier one is left, so that only --overwrite_output_dir starts again"
        if good is not None:
            last = f"the last good one is {good}, from which --resume_from_checkpoint latest goes on"
        raise NotSavedError(f"{target.name} could not be written ({reason(error)}); {last}") from error
    return target


def rotate_checkpoints(output_dir: Path, newest: Path, keep: int | None) -> str | None:
    """Remove all but the newest `keep` checkpoints, never `newest`; returns a warning if one could not be removed."""
    for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
        if old != newest:
            try:
                remove_folder(old)
            except OSError as error:
                return f"warning: {old} could not be removed ({reason(error)}): the disk may fill up"
    return None


def load_checkpoint(checkpoint: Path, engine: DinoEngine) -> dict[str, Any]:
    """Put student, teacher, optimiser, centres and scaler back; returns the trainer's state.

    All files are looked at before anything is changed; `check_files` has compared their content.

    Raises:
        InputError: a file cannot be read, or the checkpoint belongs to another architecture or objective.
    """
    state = read_state(checkpoint)
    modules = {STUDENT: engine.dual.student, TEACHER: engine.dual.teacher}
    for name, module in modules.items():
        _check_architecture(checkpoint, module.state_dict(), _shapes(checkpoint / name))
    _check_optimizer(checkpoint, engine, _shapes(checkpoint / OPTIMIZER))
    device = engine.accelerator.device
    # a process of several on the CPU is given "cpu:0", which safetensors does not know
    read_to = "cpu" if engine.sharded or device.type == "cpu" else str(device)
    for name, module in modules.items():
        load_full_tensors(module, _read(checkpoint / name, read_to))
    # copied, as tensors that were read lie in the file's own pages: it could not be given back to the disk
    tensors = {name: tensor.clone() for name, tensor in _read(checkpoint / OPTIMIZER, read_to).items()}
    engine.objective.state = {name: tensors.pop(name).to(device) for name in list(tensors) if _is_objectives(name)}
    load_optimizer_tensors(engine, tensors)
    if engine.accelerator.scaler is not None and state.get("scaler"):
        engine.accelerator.scaler.load_state_dict(state["scaler"])
    return state


def saved_networks(checkpoint: Path, engine: DinoEngine) -> AbstractContextManager[None]:
    """Within it this process alone can use `engine.networks`, as they are in a checkpoint just written."""
    return engine.networks_from(lambda branch: _read(checkpoint / f"{branch}.safetensors", "cpu"))


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
                found = moments[name].items()
                optimizer.state[parameter] = {key: dealt_out_like(value, parameter) for key, value in found}


def _step(checkpoint: Path) -> int | None:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def _number(listed: Path) -> int:
    """The step of one of `list_checkpoints`."""
    step = _step(listed)
    assert step is not None
    return step


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files."""
    return find_damage(checkpoint, (STUDENT, TEACHER, OPTIMIZER, STATE_FILE))


def _is_objectives(name: str) -> bool:
    """Whether a tensor of the optimiser's file is the objective's: moments are named <parameter>.<moment>."""
    return "." not in name


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors in a file, without reading them; a file that was cut short is found out."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(_unreadable(path, error)) from None


def _read(path: Path, device: str) -> dict[str, Tensor]:
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise InputError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: Exception) -> str:
    return f"--resume_from_checkpoint {path.parent}: {path.name} cannot be read: {reason(error)}"


def _check_architecture(checkpoint: Path, wanted: dict[str, Tensor], found: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        here = tuple(wanted[name].shape) if name in wanted else "absent"
        there = found.get(name, "absent")
        if here != there:
            raise InputError(
                f"--resume_from_checkpoint {checkpoint}: it holds another architecture ({name} is {there} there and "
                f"{here} in this run); resume with the options it was started with, see training/run.json"
            )


def _check_optimizer(checkpoint: Path, engine: DinoEngine, found: dict[str, tuple[int, ...]]) -> None:
    objectives = {name: shape for name, shape in found.items() if _is_objectives(name)}
    if objectives != {name: tuple(tensor.shape) for name, tensor in engine.objective.state.items()}:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: it was written with another --objective or --centering; resume "
            "with the options it was started with, see training/run.json"
        )
    shapes = {
        name: tuple(parameter.shape)
        for group in engine.optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for name in found.keys() - objectives.keys():
        parameter = name.rpartition(".")[0]
        if parameter not in shapes or found[name] not in ((), shapes[parameter]):
            raise InputError(
                f"--resume_from_checkpoint {checkpoint}: {OPTIMIZER} holds {name} of shape {found[name]}, which "
                "belongs to no parameter of this run"
            )


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
