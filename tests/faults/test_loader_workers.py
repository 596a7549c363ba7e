"""A loader's worker that dies: the run ends in one line that names it, all it computed is saved, and nothing hangs."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_simprune.dino.worker_deaths import WorkerDeaths, WorkerDied

from .warm_runs import (
    WITH_WORKERS,
    assert_equal_runs,
    checkpoints,
    last_lines,
    processes_of,
    wait_for_steps,
    wait_until_none_is_left,
)


@pytest.mark.parametrize("count", [1, pytest.param(6, marks=pytest.mark.faults)])
def test_a_dead_worker_ends_the_run_in_one_line_and_nothing_is_lost(
    warm, images, undisturbed, count, tmp_path, trials
):
    chance = random.Random(count)
    for number in range(count):
        options = {**WITH_WORKERS, "dataset_name_or_path": images}
        folder, log = tmp_path / f"run-{number}", tmp_path / f"run-{number}.log"
        pid = warm.start(log, output_dir=folder, **options)
        wait_for_steps(folder, chance.randrange(1, 9))
        victim = chance.choice([other for other in processes_of(pid) if other != pid])
        os.kill(victim, signal.SIGKILL)
        assert warm.wait(pid, 120) == 1, last_lines(log)
        wait_until_none_is_left(pid)
        (line,) = re.findall("^error: .*$", log.read_text(), re.M)
        assert f"worker (process {victim}) is killed by signal" in line or f"worker (process {victim}) exited" in line
        step = int(re.match(r"error: stopped at step (\d+): ", line)[1])
        assert f"checkpoint-{step}" in line and "--resume_from_checkpoint latest" in line
        assert checkpoints(folder) == [step] and "Traceback" not in log.read_text()
        assert warm.run(log, output_dir=folder, resume_from_checkpoint="latest", **options) == 0, last_lines(log)
        assert_equal_runs(undisturbed, folder)
    trials("loader workers killed, resumed bit-equal", count)


def test_a_run_that_ends_in_the_unforeseen_ends_and_so_do_its_workers(warm, images, tmp_path):
    log = tmp_path / "log"
    options = {**WITH_WORKERS, "dataset_name_or_path": images}
    pid = warm.start(log, {"crash_at": 3}, output_dir=tmp_path / "run", **options)
    assert warm.wait(pid, 120) == 1, last_lines(log)
    assert "ZeroDivisionError: something unforeseen" in log.read_text()
    wait_until_none_is_left(pid)


class Numbers(Dataset):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def test_a_death_is_reported_when_data_is_waited_for_and_never_in_between(monkeypatch):
    # torch sets its handler once in a process, and another test may have replaced it since
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    with WorkerDeaths() as deaths:
        loader = DataLoader(Numbers(), num_workers=2)
        batches = iter(loader)
        with deaths.waiting():
            next(batches)
        (victim, _) = batches._workers
        os.kill(victim.pid, signal.SIGKILL)
        while Path(f"/proc/{victim.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)  # these are the moments at which torch by itself would raise
        time.sleep(0.2)  # the signal may come a moment after the state
        with pytest.raises(WorkerDied, match=rf"worker \(process {victim.pid}\) is killed by signal: Killed"):
            with deaths.waiting():
                pytest.fail("it should be known before")
    ours = signal.getsignal(signal.SIGCHLD)
    assert getattr(ours, "__self__", None) is not deaths
