# SPDX-License-Identifier: Apache-2.0
"""Trackers that go on with the run they began, when the training is resumed."""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..atomic import reason, write_text
from ..errors import InputError
from .main_process import on_main


PROJECT = "hf-simprune"
# Trackers that are told which run to go on with. Tensorboard needs no name: its files lie in the run's own folder.
_RESUMABLE = ("tensorboard", "wandb", "trackio")


def start_trackers(
    accelerator: Accelerator,
    record: Path,
    config: Mapping[str, Any],
    run_name: str | None,
    folder_name: str,
    step: int,
) -> None:
    """Start the accelerator's trackers in the main process, in the runs that `record` names; call it in all processes.

    Args:
        record: JSON file with the identity of each tracker's run, written when it is new.
        config: the options, for trackers that begin a run.
        run_name: what the user calls the run, or None.
        folder_name: names the run where the user does not.
        step: the last step whose numbers count; 0 for a new run.

    Raises:
        InputError: a tracker cannot be started.
    """
    if accelerator.log_with:
        on_main(accelerator, lambda: _start(accelerator, record, config, run_name, folder_name, step))


def tracker_options(
    identities: Mapping[str, Mapping[str, str]], run_name: str | None, step: int
) -> dict[str, dict[str, Any]]:
    """What each tracker's own `init` is given, by tracker: the run to go on with, and from where."""
    options: dict[str, dict[str, Any]] = {}
    if step > 0 and "tensorboard" in identities:
        options["tensorboard"] = {"purge_step": step + 1}  # it then ignores what later steps had logged before
    for name in ("wandb", "trackio"):
        if name in identities:
            options[name] = {**identities[name], "resume": "allow"}
    if run_name is not None:
        options.setdefault("wandb", {})["name"] = run_name
    return options


def new_identity(tracker: str, run_name: str | None, folder_name: str) -> dict[str, str]:
    """What a tracker's run is known by: wandb gives it an id, trackio only a name, which must therefore be unique."""
    unique = secrets.token_hex(4)
    return {"wandb": {"id": unique}, "trackio": {"name": f"{run_name or folder_name}-{unique}"}}.get(tracker, {})


def end_trackers(trackers: Sequence[Any]) -> list[str]:
    """Finish all of them; returns a warning for each that could not be."""
    warnings = []
    for tracker in trackers:
        try:
            tracker.finish()
        except Exception as error:  # each tracker has errors of its own
            warnings.append(f"warning: {tracker.name} could not be closed ({reason(error)})")
    return warnings


def _start(
    accelerator: Accelerator,
    record: Path,
    config: Mapping[str, Any],
    run_name: str | None,
    folder_name: str,
    step: int,
) -> None:
    names = [str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with]
    try:
        known = json.loads(record.read_text()) if record.exists() and step > 0 else {}
        identities = {name: known.get(name) or new_identity(name, run_name, folder_name) for name in names}
        write_text(record, json.dumps(known | identities, indent=2) + "\n")
        for name in names:
            if step > 0 and name not in _RESUMABLE:
                accelerator.print(f"note: {name} begins another run; only {', '.join(_RESUMABLE)} go on with theirs")
        # the options are stored by the run that begins, and a second time they would be a second set
        begins = not set(names) <= known.keys()
        options = tracker_options(identities, run_name, step)
        accelerator.init_trackers(PROJECT, dict(config) if begins else None, options)
    except Exception as error:  # each tracker has errors of its own
        raise InputError(f"--report_to {','.join(names)}: it cannot be started: {reason(error)}") from error
