"""One of two processes is killed: the other ends with an error instead of waiting for ever, and resuming works."""

import os
import random
import re
import signal
import socket
from pathlib import Path

import pytest

from .warm_runs import (
    WITH_WORKERS,
    WarmServer,
    assert_equal_runs,
    checkpoints,
    last_lines,
    processes_of,
    wait_for_steps,
    wait_until_none_is_left,
)


OPTIONS = {"max_steps": 8, "save_steps": 2, "knn_every": 4, "per_device_train_batch_size": 4}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_two(warm: WarmServer, log: Path, faults: dict | None = None, faulty: int = 1, **options) -> list[int]:
    """Two processes that know of each other and of no launcher, which would end one when the other is gone."""
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        warm.start(
            log.with_suffix(f".{rank}.log"),
            faults if rank == faulty else {},
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{**OPTIONS, **options},
        )
        for rank in (0, 1)
    ]


def run_two(warm: WarmServer, log: Path, **options) -> None:
    statuses = [warm.wait(pid) for pid in start_two(warm, log, **options)]
    assert statuses == [0, 0], [last_lines(log.with_suffix(f".{rank}.log")) for rank in (0, 1)]


@pytest.mark.parametrize("victims", [[1], pytest.param([1, 0, 1, 0], marks=pytest.mark.faults)], ids=["one", "four"])
def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_run_can_go_on(
    warm, images, victims, tmp_path, trials
):
    chance, whole = random.Random(len(victims)), tmp_path / "whole"
    options = {"dataset_name_or_path": images}
    run_two(warm, tmp_path / "whole", output_dir=whole, **options)
    for number, victim in enumerate(victims):
        folder, log = tmp_path / f"run-{number}", tmp_path / f"run-{number}"
        # after the first checkpoint; the second process has no events but its steps and its part in the k-NN
        faults = {"kill_at": chance.randrange(7, 16) if victim == 1 else chance.randrange(80, 160)}
        pids = start_two(warm, log, faults, victim, output_dir=folder, **options)
        assert warm.wait(pids[victim]) == -signal.SIGKILL
        status = warm.wait(pids[1 - victim], 120)
        if status is None:
            os.killpg(pids[1 - victim], signal.SIGKILL)
        said = log.with_suffix(f".{1 - victim}.log").read_text()
        assert status == 1, said[-3000:]
        (line,) = re.findall("^error: .*$", said, re.M)
        assert "another process of this run ended" in line and "--resume_from_checkpoint latest" in line
        for pid in pids:
            wait_until_none_is_left(pid)
        assert checkpoints(folder)
        run_two(warm, log, output_dir=folder, resume_from_checkpoint="latest", **options)
        assert_equal_runs(whole, folder)
    trials("one of two processes killed, the other ended, both resumed bit-equal", len(victims))


@pytest.mark.faults
def test_when_one_of_two_loses_a_worker_both_end_in_one_line_at_a_checkpoint_and_can_go_on(
    warm, images, tmp_path, trials
):
    options = {**WITH_WORKERS, "per_device_train_batch_size": 4, "dataset_name_or_path": images}
    run_two(warm, tmp_path / "whole", output_dir=tmp_path / "whole-run", **options)
    for loser in (0, 1):
        folder, log = tmp_path / f"run-{loser}", tmp_path / f"log-{loser}"
        pids = start_two(warm, log, output_dir=folder, **options)
        wait_for_steps(folder, 2 + loser)
        victim = next(pid for pid in processes_of(pids[loser]) if pid != pids[loser])
        os.kill(victim, signal.SIGKILL)
        logs = [log.with_suffix(f".{rank}.log") for rank in (0, 1)]
        assert [warm.wait(pid, 120) for pid in pids] == [1, 1], list(map(last_lines, logs))
        (line,) = re.findall("^error: .*$", "".join(path.read_text() for path in logs), re.M)  # said by one
        step = int(re.match(r"error: stopped at step (\d+): ", line)[1])
        assert f"worker (process {victim})" in line and f"checkpoint-{step}" in line
        assert checkpoints(folder) == [step]
        for pid in pids:
            wait_until_none_is_left(pid)
        run_two(warm, log, output_dir=folder, resume_from_checkpoint="latest", **options)
        assert_equal_runs(tmp_path / "whole-run", folder)
    trials("loader workers of one of two processes killed, both saved and resumed bit-equal", 2)
