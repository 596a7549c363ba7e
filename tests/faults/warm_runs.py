"""The tests' side of `warm_server`, and what runs that were disturbed are compared by."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tiny_run import ROOT, environment, untimed, words


# numpy's and Arrow's libraries would start threads as soon as they are imported
WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
BUFFERED = {"PYTHONUNBUFFERED": ""}  # standard output, as where nobody has set anything
# A run that is long enough for something to happen to it and that saves nothing before.
WITH_WORKERS = {"max_steps": 16, "save_steps": 100, "knn_every": 0, "dataloader_num_workers": 2}
# One that saves and evaluates often.
OFTEN = {"max_steps": 4, "save_steps": 2, "knn_every": 2}
PATIENCE = 300.0  # seconds; the machine may have much else to do


class WarmServer:
    """Starts runs of `recipes/train_dino.py`; the words of a run are those of `tiny_run.words`."""

    def __enter__(self) -> "WarmServer":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm_server"],
            cwd=ROOT,
            env=environment(HF_HUB_OFFLINE="1", **WITHOUT_THREADS, **BUFFERED),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._answer() == {"ready": 1}, "forking a process with threads is not sound"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.write("{}\n")
        self._process.wait(60)

    def start(self, log: Path, faults: dict | None = None, environment: dict | None = None, **options: Any) -> int:
        """Start a run whose output goes to the end of `log`; returns its process id, which is its session's too."""
        command = {
            "words": words(**options),
            "output": str(log),
            "environment": environment or {},
            "faults": faults or {},
        }
        return self._ask(command)

    def wait(self, pid: int, seconds: float = PATIENCE) -> int | None:
        """Exit status, minus the signal's number where one ended it, None if it still runs."""
        return self._ask({"wait": pid, "seconds": seconds})

    def run(self, log: Path, faults: dict | None = None, **options: Any) -> int:
        """Start and wait; a run that takes too long is ended and is an error."""
        pid = self.start(log, faults, **options)
        status = self.wait(pid)
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            raise AssertionError(f"the run hangs:\n{log.read_text()}")
        return status

    def fuzz(self, target: str, seed: int, count: int, folder: Path) -> dict[str, Any]:
        """What `fuzzing.fuzz` reports, where `folder` is new; a death of its process or a hang is a fault too."""
        report = folder.with_suffix(".json")
        arguments = {"target": target, "seed": seed, "count": count, "folder": str(folder), "report": str(report)}
        pid = self._ask(arguments)
        status = self.wait(pid, 2 * PATIENCE)
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            self.wait(pid)
        if status != 0:
            at_work = Path(f"{report}.progress")
            place = at_work.read_text().strip() if at_work.exists() else f"setting up {target}"
            return {"outcomes": {}, "faults": [f"ended with {status} at {place}"]}
        return json.loads(report.read_text())

    def _ask(self, command: dict) -> Any:
        self._process.stdin.write(json.dumps(command) + "\n")
        return self._answer()

    def _answer(self) -> Any:
        ready, _, _ = select.select([self._process.stdout], [], [], 2 * PATIENCE)
        assert ready, "the server does not answer"
        return json.loads(self._process.stdout.readline())


def processes_of(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # after the name in brackets: state, parent, group, session
                state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state != "Z":
                    found.append(int(folder.name))
    return found


def wait_until_none_is_left(session: int, seconds: float = 60.0) -> None:
    """Workers notice within seconds that their parent is gone."""
    deadline = time.monotonic() + seconds
    while left := processes_of(session):
        assert time.monotonic() < deadline, f"processes {left} of session {session} are left"
        time.sleep(0.05)


def wait_for_steps(folder: Path, count: int, launcher: subprocess.Popen | None = None) -> None:
    """Until a run has logged as many steps."""
    deadline, file = time.monotonic() + 300, folder / "metrics.jsonl"
    while not (file.exists() and file.read_text().count('"loss"') >= count):
        assert launcher is None or launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def result_of(folder: Path) -> dict[str, bytes]:
    """All weights of a finished run, and its last checkpoint's, by file."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    files = [*folder.glob("*.safetensors"), *folder.glob("training/**/*.safetensors"), *last.glob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def assert_equal_runs(one: Path, other: Path) -> None:
    """Weights to the last bit, and every line of metrics.jsonl but for its timing."""
    first, second = result_of(one), result_of(other)
    assert first.keys() == second.keys()
    different = [name for name in first if first[name] != second[name]]
    assert not different, different
    assert untimed(one) == untimed(other)


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder."""
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def last_lines(log: Path, count: int = 30) -> Sequence[str]:
    return log.read_text().splitlines()[-count:]
