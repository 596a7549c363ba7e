# SPDX-License-Identifier: Apache-2.0
"""Training of a comparison: each run in a process of its own, several at a time if wanted, all of them resumable."""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from _comparison import ROOT, Run, without_place
from transformers import AutoConfig

from hf_simprune.dino.checkpoint import list_checkpoints
from hf_simprune.dino.geometry import geometry
from hf_simprune.dino.reduction_choice import chosen_reducer
from hf_simprune.dino.runlog import read_metrics
from hf_simprune.errors import InputError
from hf_simprune.evaluation.profile import BackboneSpec, HeadSpec, step_flop_ratio


RECIPE = ROOT / "recipes" / "train_dino.py"
INTERRUPTED = 130


def is_finished(run: Run) -> bool:
    """Whether its folder holds the whole run."""
    state = _state(run)
    return state is not None and state["finished"]


def check_same(run: Run) -> None:
    """Raises InputError where the folder holds a run of other settings."""
    written = run.folder / "training" / "arguments.yaml"
    if not written.is_file():
        return
    there = yaml.safe_load(written.read_text())
    there["dataset_name_or_path"] = Path(there["dataset_name_or_path"]).name
    for name, value in without_place(run.args).items():
        if name in there and name not in ("output_dir", "resume_from_checkpoint", "overwrite_output_dir"):
            if there[name] != value:
                raise InputError(
                    f"{run.folder}: trained there with {name} {there[name]}, now it is {value}; give another "
                    "--output_dir, or remove that folder"
                )


def train_all(runs: Sequence[Run], workers: int) -> list[Run]:
    """Train what has not finished; returns the runs that failed. Ctrl-C and SIGTERM stop all, each with a checkpoint.

    A run that fails stops no other: the table has what there is.
    """
    for run in runs:
        check_same(run)
    left = [run for run in runs if not is_finished(run)]
    print(f"{len(runs)} runs, {len(left)} to do, {workers} at a time", flush=True)
    failed: list[Run] = []
    crew = _Crew()
    pool = ThreadPoolExecutor(workers)
    try:
        for run, good in zip(left, pool.map(crew.train, left)):
            if not good:
                failed.append(run)
    except BaseException:
        crew.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


class _Crew:
    """The processes that train now."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen] = set()
        self.stopped = False

    def train(self, run: Run) -> bool:
        """Start or go on; whether the run finished."""
        command = start_command(run)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        started = time.time()
        with open(run.folder.parent / f"{run.name}.log", "a") as log:
            with self.lock:
                if self.stopped:
                    return False
                print("$", " ".join(command[3:]), flush=True)
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
                self.processes.add(process)
            status = process.wait()
        with self.lock:
            self.processes.discard(process)
        done = is_finished(run)
        if done or status == INTERRUPTED:
            word = "finished" if done else "interrupted"
        else:
            said = Path(log.name).read_text(errors="replace").split("\n")[-2:]
            word = f"FAILED with status {status} ({' '.join(said).strip()})"
        print(f"{run.name}: {word} after {time.time() - started:.0f} s, see {run.name}.log", flush=True)
        return done

    def stop(self) -> None:
        """Ask every process to save and end, and wait for it."""
        with self.lock:
            self.stopped = True
            running = list(self.processes)
            for process in running:
                process.terminate()
        for process in running:
            process.wait()


def start_command(run: Run) -> list[str]:
    """What trains the run, or goes on with it, in a process that notes its memory and time."""
    usage = run.folder.parent / f"{run.name}.usage.jsonl"
    command = [sys.executable, str(Path(__file__).with_name("_train.py")), str(usage), str(RECIPE), *run.argv]
    if list_checkpoints(run.folder):
        return [*command, "--resume_from_checkpoint", "latest"]
    return [*command, "--overwrite_output_dir", "true"] if _state(run) is not None else command


def measured(run: Run) -> dict[str, Any]:
    """Of a finished run: images a second (median of what it logged after the first time), peak bytes, seconds.

    Of a run that was trained outside of the comparison only the first is known.
    """
    records = [r for r in read_metrics(run.folder / "metrics.jsonl") if "images_per_second" in r]
    speeds = [record["images_per_second"] for record in records]
    found = {"images_per_second": statistics.median(speeds[1:] or speeds)}  # the last step is always logged
    noted = run.folder.parent / f"{run.name}.usage.jsonl"
    if not noted.is_file():
        return found | {"peak_bytes": None}
    usage = [json.loads(line) for line in noted.read_text().splitlines()]
    return found | {
        "peak_bytes": max(line["peak_bytes"] for line in usage),
        "device": usage[-1]["device"],
        "cpu_seconds": sum(line["cpu_seconds"] for line in usage),
        "wall_seconds": sum(line["wall_seconds"] for line in usage),
        "starts": len(usage),
    }


def flop_share(run: Run) -> float | None:
    """FLOPs of one of its training steps over those of the dense step, counted from shapes; None for other losses
    than DINO's, which the count does not know."""
    if run.args.objective != "dino":
        return None
    sizes = geometry(run.args)
    reducer = None if sizes.setting is None else chosen_reducer(run.args, sizes.setting)
    if reducer is None:
        return 1.0
    spec = BackboneSpec.from_config(AutoConfig.from_pretrained(run.folder / "training" / "initial"))
    out_dim = _state(run)["settings"]["out_dim"]
    head = HeadSpec(run.args.head_hidden_dim, run.args.head_bottleneck_dim, out_dim)
    locals_ = run.args.local_crops_number
    return step_flop_ratio(
        spec,
        spec.num_patches(sizes.global_crop_size),
        reducer,
        num_local_patches=spec.num_patches(sizes.local_crop_size),
        num_local_crops=locals_,
        head=head,
    )


def _state(run: Run) -> dict[str, Any] | None:
    path = run.folder / "training" / "run.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
