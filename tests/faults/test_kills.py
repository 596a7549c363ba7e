"""SIGKILL at any moment, then `--resume_from_checkpoint latest`: the run is the one that was never disturbed."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .warm_runs import WarmServer, assert_equal_runs, checkpoints, last_lines, wait_until_none_is_left


Event = tuple[str, str]
# Checkpoints after steps 2, 4 and 6, of which two stay; k-NN before the first step, after the fourth and the last.
OPTIONS: dict[str, Any] = {"knn_every": 4, "save_steps": 2, "save_total_limit": 2, "max_steps": 6}
WAYS_TO_READ = ({}, {"dataloader_num_workers": 2}, {"streaming": True})
MOMENTS: dict[str, Callable[[Event], bool]] = {
    "step": lambda event: event[0] in ("step", "between student and teacher"),
    "checkpoint": lambda event: "checkpoint-" in event[1] and not removal(event),
    "rotation": lambda event: removal(event),
    "k-NN": lambda event: event[0] == "k-NN",
    "metrics": lambda event: event[1].endswith("metrics.jsonl"),
}
TORN = ("written", "open")  # what a dying process can leave half of


def removal(event: Event) -> bool:
    return "removed" in event[1] or event[0] in ("os.remove", "os.rmdir") or event == ("os.rename", "/checkpoint-2")


def moments(events: list[Event], phase: str) -> list[int]:
    """Numbers, from 1, of the events of a phase."""
    first_export = [name for name, _ in events].index("export")
    first_step = [name for name, _ in events].index("step")
    if phase == "export":
        found = range(first_export, len(events))
    elif phase == "start":
        found = range(first_step)
    else:
        found = [n for n, event in enumerate(events[:first_export]) if MOMENTS[phase](event)]
    assert found, f"nothing happens in the phase {phase}"
    return [n + 1 for n in found]


class Undisturbed:
    """Runs that nothing happens to, one for each way to read, and their lists of events."""

    def __init__(self, warm: WarmServer, images: str, folder: Path) -> None:
        self.warm, self.images, self.folder = warm, images, folder
        self._events: dict[int, list[Event]] = {}

    def options(self, way: int) -> dict[str, Any]:
        return {**OPTIONS, **WAYS_TO_READ[way], "dataset_name_or_path": self.images}

    def run(self, way: int) -> Path:
        return self.folder / f"undisturbed-{way}"

    def events(self, way: int) -> list[Event]:
        if way not in self._events:
            record, log = self.folder / f"events-{way}.json", self.folder / f"undisturbed-{way}.log"
            options = self.options(way)
            status = self.warm.run(log, {"record": str(record)}, output_dir=self.run(way), **options)
            assert status == 0, last_lines(log)
            self._events[way] = [tuple(event) for event in json.loads(record.read_text())]
        return self._events[way]


@pytest.fixture(scope="module")
def undisturbed(warm, images, tmp_path_factory) -> Undisturbed:
    return Undisturbed(warm, images, tmp_path_factory.mktemp("undisturbed"))


def go_on(warm: WarmServer, folder: Path, log: Path, faults: dict | None = None, **options: Any) -> int:
    """What a user does next: resume, or, where no checkpoint was written yet, start again."""
    status = warm.run(log, faults, output_dir=folder, resume_from_checkpoint="latest", **options)
    if status == 2:
        assert not checkpoints(folder), last_lines(log)
        assert "no checkpoint-<step> folder" in log.read_text(), last_lines(log)
        status = warm.run(log, faults, output_dir=folder, overwrite_output_dir=True, **options)
    return status


def kill_and_go_on(undisturbed: Undisturbed, way: int, faults: dict, again: dict | None, folder: Path) -> None:
    """One trial; `again` are the faults of the first attempt to go on."""
    warm, options, log = undisturbed.warm, undisturbed.options(way), folder.with_suffix(".log")
    pid = warm.start(log, faults, output_dir=folder, **options)
    assert warm.wait(pid) == -signal.SIGKILL, last_lines(log)
    wait_until_none_is_left(pid)
    if again is not None:
        status = go_on(warm, folder, log, again, **options)
        assert status in (0, -signal.SIGKILL), last_lines(log)  # it may have ended before its event
    else:
        status = None
    if status != 0:
        assert go_on(warm, folder, log, **options) == 0, last_lines(log)
    assert_equal_runs(undisturbed.run(way), folder)
    assert checkpoints(folder) == [4, 6]
    left = [path.name for path in folder.iterdir() if "partial" in path.name or "removed" in path.name]
    assert not left, left
    shutil.rmtree(folder)


PHASES = ["step"] * 4 + ["checkpoint"] * 5 + ["rotation"] * 3 + ["k-NN"] * 2 + ["metrics"] * 2 + ["export"] * 3
QUICK = ["checkpoint", "export"]


@pytest.mark.parametrize(
    "phases", [QUICK, pytest.param([*PHASES, "start"], marks=pytest.mark.faults)], ids=["two", "twenty"]
)
def test_a_run_killed_at_any_moment_and_resumed_equals_the_undisturbed_one(undisturbed, phases, tmp_path, trials):
    chance = random.Random(len(phases))
    done, second = 0, 0
    for number, phase in enumerate(phases):
        way = number % len(WAYS_TO_READ) if len(phases) > len(QUICK) else 0
        events = undisturbed.events(way)
        kill_at = chance.choice(moments(events, phase))
        faults = {"kill_at": kill_at, "tear": events[kill_at - 1][0] in TORN and chance.random() < 0.8}
        again = {"kill_at": chance.randrange(1, 80)} if chance.random() < 0.3 else None
        print(f"trial {number}: {phase}, {WAYS_TO_READ[way]}, {faults} at {events[kill_at - 1]}, then {again}")
        kill_and_go_on(undisturbed, way, faults, again, tmp_path / f"run-{number}")
        done, second = done + 1, second + (again is not None)
    assert done == len(phases)
    trials(f"SIGKILL at chosen moments, {second} of them followed by another, resumed bit-equal", done)


@pytest.mark.faults
def test_a_run_killed_at_any_time_and_resumed_equals_the_undisturbed_one(undisturbed, tmp_path, trials):
    chance, killed = random.Random(5), 0
    warm, way = undisturbed.warm, 1
    undisturbed.events(way)
    started = time.monotonic()
    assert warm.run(tmp_path / "time.log", output_dir=tmp_path / "time", **undisturbed.options(way)) == 0
    seconds = time.monotonic() - started
    for number in range(15):  # how long a run takes is the machine's mood
        if killed == 5:
            break
        folder, log = tmp_path / f"run-{number}", tmp_path / f"run-{number}.log"
        pid = warm.start(log, output_dir=folder, **undisturbed.options(way))
        status = warm.wait(pid, chance.uniform(0.1, 1.0) * seconds)
        if status is not None:
            assert status == 0, last_lines(log)
            continue
        os.kill(pid, signal.SIGKILL)
        if warm.wait(pid) == 0:
            continue
        killed += 1
        wait_until_none_is_left(pid)
        assert go_on(warm, folder, log, **undisturbed.options(way)) == 0, last_lines(log)
        assert_equal_runs(undisturbed.run(way), folder)
    assert killed >= 3
    trials("SIGKILL by the clock, resumed bit-equal", killed)
