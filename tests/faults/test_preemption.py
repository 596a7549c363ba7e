"""SIGTERM, as schedulers send it before they take a machine: to the training process, to its group, to `torchrun`."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from ..tiny_run import RECIPE, environment, words
from .warm_runs import (
    WITH_WORKERS,
    assert_equal_runs,
    checkpoints,
    last_lines,
    wait_for_steps,
    wait_until_none_is_left,
)


def last_completed_step(folder: Path) -> int:
    """The run's only checkpoint, which loads and is that of the last step in metrics.jsonl."""
    (step,) = checkpoints(folder)
    logged = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(logged) == step
    for file in (folder / f"checkpoint-{step}").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert all(tensors.get_tensor(name) is not None for name in tensors.keys())
    return step


def training_process(folder: Path) -> int:
    return json.loads((folder / "training" / "run.json").read_text())["pid"]


WAYS = ("process", "group", "process, again within a second", "group, then process")


def send(way: str, folder: Path, session: int) -> None:
    pid = training_process(folder)
    assert pid == session
    os.killpg(session, signal.SIGTERM) if way.startswith("group") else os.kill(pid, signal.SIGTERM)
    if way in WAYS[2:]:
        time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("ways", [WAYS[1:2], pytest.param(2 * WAYS, marks=pytest.mark.faults)], ids=["one", "all"])
def test_sigterm_leaves_a_checkpoint_of_the_last_step_and_no_process(
    warm, images, undisturbed, ways, tmp_path, trials
):
    options = {**WITH_WORKERS, "dataset_name_or_path": images}
    chance = random.Random(7)
    for number, way in enumerate(ways):
        folder, log = tmp_path / f"run-{number}", tmp_path / f"run-{number}.log"
        pid = warm.start(log, output_dir=folder, **options)
        wait_for_steps(folder, chance.randrange(1, 10))
        send(way, folder, pid)
        assert warm.wait(pid, 120) == 130, (way, last_lines(log))
        wait_until_none_is_left(pid)
        step = last_completed_step(folder)
        assert f"interrupted after step {step}" in log.read_text() and "Traceback" not in log.read_text()
        assert warm.run(log, output_dir=folder, resume_from_checkpoint="latest", **options) == 0, last_lines(log)
        assert_equal_runs(undisturbed, folder)
    trials("SIGTERM to the training process or its group, resumed bit-equal", len(ways))


def processes_with(mark: str) -> list[int]:
    """Processes, in whatever session, whose environment holds a mark; a launcher starts sessions of its own."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if mark.encode() in (folder / "environ").read_bytes() and state != "Z":
                    found.append(int(folder.name))
            except OSError:
                continue  # it has just ended, or is another user's
    return found


def torchrun(folder: Path, mark: str, **options) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    line = words(output_dir=folder, **{**WITH_WORKERS, "per_device_train_batch_size": 4, **options})
    return subprocess.Popen(
        [*launch, str(RECIPE), *line],
        env=environment(HF_HUB_OFFLINE="1", FAULT_MARK=mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.faults
@pytest.mark.parametrize("to_group", [False, True], ids=["parent", "group"])
def test_sigterm_to_torchrun_does_too(images, to_group, tmp_path, trials):
    folder, mark = tmp_path / "run", f"mark-{tmp_path}"
    launcher = torchrun(folder, mark, dataset_name_or_path=images)
    try:
        wait_for_steps(folder, 4, launcher)
        os.killpg(launcher.pid, signal.SIGTERM) if to_group else os.kill(launcher.pid, signal.SIGTERM)
        output, _ = launcher.communicate(timeout=300)
        assert launcher.returncode != 0
        step = last_completed_step(folder)
        assert re.findall(r"interrupted after step (\d+)", output) == [str(step)]
        deadline = time.monotonic() + 60
        while left := processes_with(mark):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        for pid in processes_with(mark):
            os.kill(pid, signal.SIGKILL)
    trials(f"SIGTERM to {'the group of ' if to_group else ''}torchrun with two processes of two workers", 1)
