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

from hf_simprune.errors import TrainingInterrupted

from ..tiny_run import RECIPE, environment, words
from .test_ranks import run_two
from .tiny_trainer import STEPS, build, untimed
from .warm_runs import (
    OFTEN,
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


@pytest.mark.parametrize("step", [2, *(pytest.param(n, marks=pytest.mark.faults) for n in (0, 4))])
def test_sigterm_in_a_long_evaluation_ends_the_run_at_once_and_resuming_makes_up_for_it(
    warm, images, evaluated, step, tmp_path, trials
):
    folder, log, begun = tmp_path / "run", tmp_path / "log", tmp_path / "begun"
    options = {**OFTEN, "dataset_name_or_path": images, "output_dir": folder}
    slow = {"step": step, "seconds": 1.0, "begun": str(begun)}  # for each of 40 images
    pid, deadline = warm.start(log, {"slow_knn": slow}, **options), time.monotonic() + 120
    while not begun.exists():
        assert time.monotonic() < deadline, last_lines(log)
        time.sleep(0.01)
    done = [number for number in (2, 4) if number <= step]
    assert checkpoints(folder) == done  # what was computed is safe before
    os.kill(pid, signal.SIGTERM)
    assert warm.wait(pid, 30) == 130, last_lines(log)  # and not after 40 seconds, when it would be done
    assert checkpoints(folder) == (done or [0]) and f"interrupted after step {step}" in log.read_text()
    assert warm.run(log, resume_from_checkpoint="latest", **options) == 0, last_lines(log)
    assert_equal_runs(evaluated, folder)
    trials("SIGTERM in an evaluation, resumed bit-equal", 1)


def accuracy(step, stopped):
    return None if stopped() else {"knn_accuracy": step / 100}


@pytest.fixture(scope="module")
def whole_log(tmp_path_factory):
    """Of a run in this process that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    build(folder, evaluate=accuracy, knn_every=3).train()
    return untimed(folder)


QUICK = [(0, False), (3, True), (STEPS, False)]
FULL = [pytest.param(at, not before, marks=pytest.mark.faults) for at, before in QUICK]


@pytest.mark.parametrize(("at", "before"), [*QUICK, *FULL])
def test_sigterm_at_an_evaluation_saves_its_step_and_the_resumed_runs_log_is_whole(
    tmp_path, whole_log, at, before, monkeypatch
):
    folder, asked = tmp_path / "run", []

    def terminated(step, stopped):
        asked.append(step)
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return accuracy(step, stopped)

    trainer = build(folder, evaluate=terminated, knn_every=3)
    due = trainer._evaluation_due

    def terminated_before():
        if trainer.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return due()

    if before:
        monkeypatch.setattr(trainer, "_evaluation_due", terminated_before)
    with pytest.raises(TrainingInterrupted, match=f"after step {at};"):
        trainer.train()
    assert (at in asked) is not before
    assert [line["step"] for line in untimed(folder) if "knn_accuracy" in line] == list(range(0, at, 3))
    resumed = build(folder, weights=9, evaluate=accuracy, knn_every=3)
    assert resumed.resume("latest").name == f"checkpoint-{at}"
    resumed.train()
    assert untimed(folder) == whole_log


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
    line = words(output_dir=folder, **options)
    return subprocess.Popen(
        [*launch, str(RECIPE), *line],
        env=environment(HF_HUB_OFFLINE="1", FAULT_MARK=mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def of_two(warm, images, tmp_path_factory) -> tuple[dict, Path]:
    """Options for two processes of two workers, and the folder of such a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("of-two")
    options = {**WITH_WORKERS, "per_device_train_batch_size": 4, "dataset_name_or_path": images}
    run_two(warm, folder / "log", output_dir=folder / "run", **options)
    return options, folder / "run"


@pytest.mark.faults
@pytest.mark.parametrize("to_group", [False, True], ids=["parent", "group"])
def test_sigterm_to_torchrun_does_too(warm, of_two, to_group, tmp_path, trials):
    folder, mark, (options, whole) = tmp_path / "run", f"mark-{tmp_path}", of_two
    launcher = torchrun(folder, mark, **options)
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
    run_two(warm, tmp_path / "resumed", output_dir=folder, resume_from_checkpoint="latest", **options)
    assert_equal_runs(whole, folder)
    trials(f"SIGTERM to {'the group of ' if to_group else ''}torchrun with two processes, resumed bit-equal", 1)
