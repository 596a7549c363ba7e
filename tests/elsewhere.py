"""Python programs in processes of their own that need not import torch and transformers, which costs five seconds.

`run([...], folder)` stands for `subprocess.run([sys.executable, ...])`. A server, one for each process of pytest,
imports torch, transformers and what they build on, but never this package; each run is a fork of it, with the
environment, folder, output and end of a program that was started anew. `fresh=True` starts one anew after all: one
test of every kind of claim does, as proof that the forks hide nothing.

Run as a program this file is the server. Commands and answers are JSON, one a line.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
PACKAGE = "hf_simprune"
IMPORTED = (
    "torch", "torch.distributed", "safetensors.torch", "PIL.Image", "accelerate", "transformers",
    "transformers.dynamic_module_utils", "transformers.models.vit.modeling_vit",
    "transformers.models.deit.modeling_deit", "transformers.models.dinov2.modeling_dinov2",
    "transformers.models.clip.modeling_clip", "transformers.pipelines",
)  # fmt: skip
# Every run has a cache of its own, in its folder: the libraries read this once, so that all forks have the same text.
HOME = {"HF_HOME": "hf-home", "HF_HUB_OFFLINE": "1"}


def run(
    words: list[str],
    folder: Path,
    package: bool = False,
    timeout: float = 120,
    fresh: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess:
    """`python *words` in a folder, with this package or where importing it is an error."""
    if fresh:
        command = [sys.executable, *words] if package else [sys.executable, "-c", _HIDDEN, *words]
        env = _environment(package, environment)
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    return _start(words, folder, package, environment).finish(timeout)


def run_ranks(
    world: int, words: list[str], folder: Path, timeout: float = 120, **environment: str
) -> list[subprocess.CompletedProcess]:
    """`python *words` with this package in several processes that find each other as those of a launcher do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    ranks = [
        _start(words, folder, True, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)
    ]
    return [rank.finish(timeout) for rank in ranks]


_HIDDEN = f"import sys; sys.modules[{PACKAGE!r}] = None; sys.argv[:1] = []; exec(sys.argv.pop(1))"


def _environment(package: bool, changes: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    assert not any(name.startswith("HF_") for name in changes), "the libraries have read it already"
    path = str(ROOT) if package else ""
    return {**kept, **HOME, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, **changes}


class _Run:
    def __init__(self, words: list[str], pid: int, output: Path) -> None:
        self.words, self.pid, self.output = words, pid, output

    def finish(self, timeout: float) -> subprocess.CompletedProcess:
        status = _ask(wait=self.pid, seconds=timeout)
        texts = [(self.output / name).read_text(errors="replace") for name in ("out", "err")]
        if status is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.words, timeout, *texts)
        return subprocess.CompletedProcess(self.words, status, *texts)


def _start(words: list[str], folder: Path, package: bool, changes: dict[str, str]) -> _Run:
    output = Path(tempfile.mkdtemp(dir=folder, prefix=".output-"))
    environment = _environment(package, changes)
    where = {"folder": str(folder), "output": str(output)}
    return _Run(words, _ask(words=words, environment=environment, package=package, **where), output)


def _ask(**request: Any) -> Any:
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env=_environment(False, {}), cwd="/", **pipes)
    ready = json.loads(server.stdout.readline())
    assert ready == {"threads": 1, "package": []}, ready  # forks are sound, and hide nothing
    atexit.register(server.stdin.close)
    return server


def main() -> None:
    del sys.path[0]  # where this file is
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks need not look through all of it again
    own = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
    print(json.dumps({"threads": len(os.listdir("/proc/self/task")), "package": own}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(wait_for(request["wait"], request["seconds"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _become(**request)
            sys.exit(0)
        print(json.dumps(pid), flush=True)


def _become(words: list[str], environment: dict[str, str], package: bool, folder: str, output: str) -> None:
    """Do what `python *words` does."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate((os.devnull, f"{output}/out", f"{output}/err")):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if not package:
        sys.modules[PACKAGE] = None
    kind, *rest = words
    first = "" if kind in ("-c", "-m") else str(Path(kind).resolve().parent)
    sys.path[:0] = [first, *filter(None, environment["PYTHONPATH"].split(os.pathsep))]
    sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


def wait_for(pid: int, seconds: float) -> int | None:
    """Exit status, minus the signal's number of a run that was killed, None if it still runs then."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ChildProcessError):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


if __name__ == "__main__":
    main()
