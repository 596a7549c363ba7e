"""What goes wrong inside a run: it is killed at its n-th event, or numbers and workers are spoiled.

Events are what the interpreter tells of the run's own folder (files opened, renamed, removed …, see Python's audit
events) and a few places in the code. They are the same in every run of the same options, so the list of those of an
undisturbed run is the list of moments at which another run can be killed.
"""

import json
import os
import signal
import sys
import time
from itertools import count
from pathlib import Path


_FILES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


class Events:
    """Counts, notes and, at the chosen one, kills."""

    def __init__(self, folder: Path, kill_at: int | None, tear: bool) -> None:
        self.folder, self.kill_at, self.tear = str(folder), kill_at, tear
        self.process = os.getpid()
        self.seen: list[tuple[str, str]] = []
        self._inside = False

    def audit(self, name: str, arguments: tuple) -> None:
        if name in _FILES and not self._inside and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            inside_a_removed_folder = name in ("os.remove", "os.rmdir") and arguments[1] not in (None, -1)
            if inside_a_removed_folder or (isinstance(path, str) and path.startswith(self.folder)):
                self.note(name, path)

    def note(self, name: str, path: str = "") -> None:
        if self._inside or os.getpid() != self.process:  # workers hear of it too
            return
        self._inside = True
        self.seen.append((name, path.removeprefix(self.folder)))
        if self.kill_at == len(self.seen):
            if self.tear:
                self._tear(name, path)
            os.kill(os.getpid(), signal.SIGKILL)
        self._inside = False

    @staticmethod
    def _tear(name: str, path: str) -> None:
        """Leave half of what was being written, as a process does that dies while it writes."""
        if path.endswith("metrics.jsonl"):
            with open(path, "a") as file:
                file.write('{"step": 3, "loss": 1.2')
        elif name == "written":
            os.truncate(path, os.path.getsize(path) // 2)


def arm(
    folder: Path,
    record: str | None = None,
    kill_at: int | None = None,
    tear: bool = False,
    spoil: dict | None = None,
    crash_at: int | None = None,
    pictures: bool = False,
    slow_knn: dict | None = None,
) -> None:
    """Put the faults in place, before a run starts.

    record: file for the list of events; kill_at: the event, counted from 1; tear: and what was being written is torn;
    spoil: of `spoil_numbers`; crash_at: the step, counted from 1, in which something unforeseen happens;
    slow_knn: of `_slow_knn`.
    """
    from hf_simprune.dino import engine, run
    from hf_simprune.dino.online_knn import OnlineKnn

    if not pictures:  # they take longer than the training
        run.draw_pictures = lambda *_: None
    if spoil:
        spoil_numbers(**spoil)
    if crash_at is not None:
        _crash(crash_at)
    if slow_knn:
        _slow_knn(**slow_knn)
    if record is None and kill_at is None:
        return
    events = Events(folder, kill_at, tear)
    _announce(events, engine.DinoEngine, "step", "step")
    _announce(events, engine, "update_teacher", "between student and teacher")
    _announce(events, OnlineKnn, "_features", "k-NN")
    _announce(events, run, "export_model", "export")
    _announce_writing(events)
    sys.addaudithook(events.audit)
    if record is not None:
        end = run._end

        def recorded(*arguments) -> None:
            Path(record).write_text(json.dumps(events.seen))
            end(*arguments)

        run._end = recorded


def _announce(events: Events, owner, name: str, event: str) -> None:
    original = getattr(owner, name)

    def announced(*arguments, **options):
        events.note(event)
        return original(*arguments, **options)

    setattr(owner, name, announced)


def _announce_writing(events: Events) -> None:
    """safetensors writes without telling the interpreter."""
    import safetensors.torch

    original = safetensors.torch.serialize_file

    def announced(tensors, path, *arguments, **options):
        events.note("writing", str(path))
        original(tensors, path, *arguments, **options)
        events.note("written", str(path))

    safetensors.torch.serialize_file = announced


def _crash(at: int) -> None:
    from hf_simprune.dino.engine import DinoEngine

    original, steps = DinoEngine.step, count(1)

    def crashing(self, *arguments, **options):
        if next(steps) == at:
            raise ZeroDivisionError("something unforeseen")
        return original(self, *arguments, **options)

    DinoEngine.step = crashing


def _slow_knn(step: int, seconds: float, begun: str) -> None:
    """In the evaluation of a step every image takes that long; a file tells that it has begun."""
    from hf_simprune.dino.online_knn import LabelledImages, OnlineKnn

    evaluate, readable, slow = OnlineKnn.__call__, LabelledImages.readable, []

    def evaluated(self, now, *arguments):
        slow[:] = [True] * (now == step)
        return evaluate(self, now, *arguments)

    def slowly_readable(self, position):
        if slow:
            Path(begun).touch()
            time.sleep(seconds)
        return readable(self, position)

    OnlineKnn.__call__, LabelledImages.readable = evaluated, slowly_readable


def spoil_numbers(step: int, where: str, value: float) -> None:
    """From one `step` (counted from 1) on, `value` appears in an activation or a gradient of the student."""
    from hf_simprune.dino.engine import DinoEngine

    original, steps = DinoEngine.step, count(1)

    def spoiled(self, *arguments, **options):
        if next(steps) < step:
            return original(self, *arguments, **options)
        layer = self.dual.student.backbone.layers[1].mlp.fc1

        def put(tensor):
            changed = tensor.clone()
            changed.view(-1)[3] = value
            return changed

        if where == "activation":
            handle = layer.register_forward_hook(lambda module, inputs, output: put(output))
        else:
            handle = layer.weight.register_hook(put)
        try:
            return original(self, *arguments, **options)
        finally:
            handle.remove()

    DinoEngine.step = spoiled
