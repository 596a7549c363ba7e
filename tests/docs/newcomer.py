"""A process that has imported everything and runs, one after the other, what a newcomer types.

Commands are the real ones, with their real options; those of ours get further options behind, by which they take few
steps on a narrow network. Requests come from `shim.py` and `workplace.py` over a socket, one JSON line each.
"""

import contextlib
import importlib.util
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
_SIZES = "hidden_size=24,num_attention_heads=2,intermediate_size=48"
_FEW_STEPS = {
    "max_steps": 2, "per_device_train_batch_size": 4, "local_crop_size": 24, "local_crops_number": 1, "out_dim": 32,
    "head_hidden_dim": 16, "head_bottleneck_dim": 8, "warmup_epochs": "none", "warmup_steps": 1,
    "freeze_last_layer": "none", "dataloader_num_workers": 0, "knn_every": 0, "knn_k": 3, "max_eval_samples": 8,
    "logging_steps": 1, "save_steps": 2, "disable_tqdm": "true",
}  # fmt: skip
_NARROW = {"config_overrides": _SIZES, "image_size": 32, "patch_size": 8, "global_crop_size": "none"}
_FEW_IMAGES = {"calibration_images": 15, "cost_images": 2, "max_span": 2, "disable_tqdm": "true"}
_FEW_ROUNDS = {"rounds": 2, "knn_k": 3, "train_images": 40, "max_eval_samples": 40, "disable_tqdm": "true"}
_RECIPES = {"train_dino.py": "train", "compress.py": "compress", "evaluate.py": "evaluate"}


def shrunk(command: str, words: Sequence[str]) -> list[str]:
    """The words of a command and what makes it quick, which comes last and so wins."""
    given = {re.split("[= ]", word[2:])[0].replace("-", "_") for word in words if word.startswith("--")}
    if command == "train":
        added = _FEW_STEPS | ({} if "model_name_or_path" in given else _NARROW)
    elif command in ("analyze", "compress"):
        added = _FEW_IMAGES | ({"heal_steps": 1} if "heal_steps" in given else {})
    else:
        added = _FEW_ROUNDS if command == "evaluate" else {}
    return [*words, *(word for name, value in added.items() for word in (f"--{name}", str(value)))]


class Newcomer:
    """Runs commands and Python blocks in this process."""

    def __init__(self) -> None:
        self.reloaded = False

    def run(self, words: list[str]) -> int:
        """Run one command. Returns its exit status."""
        name, *rest = words
        return {
            "hf-simprune": self.cli,
            "python": self.python,
            "accelerate": self.accelerate,
            "torchrun": self.torchrun,
            "make": self.make,
            "block": self.block,
        }[name](rest)

    def cli(self, words: list[str]) -> int:
        from hf_simprune.cli import main

        if words[:1] == ["explore"]:
            return self.explore(words[1:])
        sys.argv = ["hf-simprune", *words]
        return main([*words[:1], *shrunk(words[0], words[1:])])

    def explore(self, words: list[str]) -> int:
        """Everything but serving, which has tests of its own; a Space is written where gradio is installed."""
        from hf_simprune.commands.explore import OPTIONS, run
        from hf_simprune.rba.checkpoint import load_checkpoint

        args = OPTIONS.parse(words)
        load_checkpoint(args.model_name_or_path)
        if args.space is not None and find_spec("gradio") is not None:
            run(args)
        return 0

    def python(self, words: list[str]) -> int:
        while words[0] == "-W":
            words = words[2:]
        if words[:2] == ["-m", "accelerate.commands.launch"]:
            return self.accelerate(["launch", *words[2:]])
        if words[:2] == ["-m", "pytest"]:
            return self.pytest(words[2:])
        script, *rest = words
        if Path(script).name == "demo.py":
            return self.demo(script, rest)
        command = {"train_dino.py": "train", "compress.py": "compress", "evaluate.py": "evaluate"}.get(
            Path(script).name
        )
        if Path(script).name == "scaling.py":
            rest = [*rest, "--calculated_only"]
        sys.argv = [script, *(shrunk(command, rest) if command else rest)]
        sys.path.insert(0, str(Path(script).resolve().parent))
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            del sys.path[0]
        return 0

    def accelerate(self, words: list[str]) -> int:
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch", f"accelerate {words[0]} is not for documents"
        args = launch_command_parser().parse_args(words[1:])
        assert args.config_file is None or Path(args.config_file).is_file(), args.config_file
        return self.python([args.training_script, *args.training_script_args])

    def torchrun(self, words: list[str]) -> int:
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words)
        return self.python([args.training_script, *args.training_script_args])

    def make(self, words: list[str]) -> int:
        """What the Makefile would start, which for documents is the demo."""
        would = subprocess.run(
            ["/usr/bin/env", "make", "-n", *words], capture_output=True, text=True, check=True
        ).stdout
        assert words == ["demo"] and "bin/python recipes/demo.py" in would, would
        return self.python(["recipes/demo.py"])

    def pytest(self, words: list[str]) -> int:
        """That there are such tests; running them is not for here."""
        import pytest

        os.chdir(ROOT)
        return pytest.main([*words, "--collect-only", "-q", "-p", "no:cacheprovider"])

    def demo(self, script: str, words: list[str]) -> int:
        """The whole demo, its processes in this one, but for that which reloads the result without the package."""
        spec = importlib.util.spec_from_file_location("demo", script)
        demo = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(demo)
        compare, loads_elsewhere, start = demo.compare, demo.loads_elsewhere, subprocess.run

        def reload_once(*arguments: Any) -> bool:
            first, self.reloaded = not self.reloaded, True
            return loads_elsewhere(*arguments) if first else True

        def here(command: list[str], **settings: Any) -> subprocess.CompletedProcess:
            if command[1] == "-c":
                return start(command, **settings)
            return subprocess.CompletedProcess(command, self.guarded(["python", *command[1:]]))

        demo.compare = lambda *arguments: compare(*arguments) or True  # two steps need not help
        demo.loads_elsewhere = reload_once
        sys.argv, subprocess.run = [script, *words], here
        try:
            demo.main()
        finally:
            subprocess.run = start
        return 0

    def block(self, words: list[str]) -> int:
        """A Python block of a document."""
        text = Path(words[0]).read_text(encoding="utf-8")
        exec(compile(text, words[1], "exec"), {"__name__": "__main__"})
        return 0

    def guarded(self, words: list[str]) -> int:
        """`run`, in which nothing but an exit status comes out."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        try:
            return self.run(words)
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            return 1


@contextlib.contextmanager
def captured(streams: dict[str, str]) -> Iterator[None]:
    """What this process and its children write, as "out" and "err"."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in enumerate(kept, start=1):
                os.dup2(old, number)
                os.close(old)
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                streams[name] = file.read().decode(errors="replace")


def time_once() -> None:
    """Latencies are measured in one round."""
    from hf_simprune.evaluation import latency, model_cost

    def interleave(sides: Any, rounds: int, device: Any, warmup: int = 1, clock: Any = latency.wall_seconds) -> Any:
        return measure(sides, 1, device, 0, clock)

    measure, latency.interleave, model_cost.interleave = latency.interleave, interleave, interleave


def draw_nothing() -> None:
    """Pictures take seconds and have tests of their own: a heat-map is one white pixel, curves are left out."""
    from PIL import Image

    import hf_simprune.dino.run as training
    import hf_simprune.rba.run as compression

    def blank(_: Any, png: Path, *__: Any) -> None:
        Image.new("RGB", (1, 1), "white").save(png)

    training.draw_pictures, compression.plot_redundancy = lambda *_: None, blank


def main() -> None:
    address, package = sys.argv[1:]
    import hf_simprune

    assert Path(hf_simprune.__file__).is_relative_to(package), hf_simprune.__file__
    time_once()
    draw_nothing()
    newcomer = Newcomer()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile() as stream:
                request = json.loads(stream.readline())
                if not request:
                    return
                answer: dict[str, Any] = {}
                os.chdir(request["folder"])
                started = time.process_time()
                with captured(answer):
                    answer["status"] = newcomer.guarded(request["words"])
                answer["seconds"] = time.process_time() - started
                connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
