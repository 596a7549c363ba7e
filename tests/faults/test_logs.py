"""After any end and resumption the log is that of an undisturbed run, and trackers go on with the run they began."""

import errno
import json
import os
import sys
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate import tracking as accelerate_tracking
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType

from hf_simprune.dino.runlog import RunLog, append, cut_back, read_metrics
from hf_simprune.dino.tracking import end_trackers, start_trackers
from hf_simprune.errors import InputError

from .failing_disk import hidden
from .tiny_trainer import STEPS, Killed, build, untimed


def accuracy(step, stopped):
    return {"knn_accuracy": step / 100}


def whole_run(folder, **settings):
    build(folder, evaluate=accuracy, **settings).train()
    return untimed(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("undisturbed") / "run", knn_every=3)


LINES = [json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(1, 5)]


class TestCuttingBack:
    def test_at_every_byte_leaves_the_whole_lines_up_to_the_step(self, tmp_path, trials):
        path, text = tmp_path / "metrics.jsonl", "".join(LINES)
        for length in range(len(text) + 1):
            for step in (2, 4):
                path.write_text(text[:length])
                kept = cut_back(path, step)
                whole = [
                    line for line in LINES[:step] if text[:length].startswith("".join(LINES[: LINES.index(line) + 1]))
                ]
                assert path.read_text() == "".join(whole) and kept == [json.loads(line) for line in whole]
        assert hidden(tmp_path) == []
        trials("torn metrics.jsonl, at every byte", 2 * (len(text) + 1))

    def test_at_step_0_empties_the_file_and_makes_it(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        for _ in range(2):
            assert cut_back(path, 0) == [] and path.read_text() == ""
            path.write_text("".join(LINES))

    @pytest.mark.parametrize("line", ["{", "7\n", '{"loss": 1}\n', '{"step": "3"}\n', "\xff\n", "[" * 5000 + "\n"])
    def test_leaves_out_what_is_no_line_of_a_run(self, tmp_path, line):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes("".join([*LINES[:2], line, *LINES[2:]]).encode("latin-1"))
        kept = cut_back(path, 4)
        glued = not line.endswith("\n")
        assert [record["step"] for record in kept] == ([1, 2, 4] if glued else [1, 2, 3, 4])
        assert read_metrics(path) == kept

    def test_adds_unwritten_lines_once(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(LINES[:3]))
        cut_back(path, 4, LINES[2:4])
        assert path.read_text() == "".join(LINES[:4])

    def test_does_not_touch_a_file_that_is_right(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(LINES))
        before = path.stat().st_ino
        cut_back(path, 4)
        assert path.stat().st_ino == before


def test_a_line_that_was_written_in_half_is_taken_back(tmp_path, monkeypatch):
    path, write = tmp_path / "metrics.jsonl", os.write
    length = append(LINES[0], path, append("", path, 0))

    def half(descriptor, data):
        if half.failed:
            raise OSError(errno.ENOSPC, "No space left on device")
        half.failed = True
        return write(descriptor, data[: len(data) // 2])

    half.failed = False
    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        append("".join(LINES[1:]), path, length)
    monkeypatch.undo()
    assert path.read_text() == LINES[0]
    with path.open("a") as file:  # even where nothing could be taken back
        file.write('{"st')
    append(LINES[1], path, length)
    assert path.read_text() == "".join(LINES[:2])


class TestKilled:
    @pytest.mark.parametrize(
        "step", [4, 9, *(pytest.param(n, marks=pytest.mark.faults) for n in (5, 6, 7, 8, 10, 11, 12))]
    )
    def test_before_a_step_and_resumed(self, tmp_path, undisturbed, trials, step):
        def kill(number):
            if number == step:
                raise Killed

        folder = tmp_path / "run"
        with pytest.raises(Killed):
            build(folder, kill, evaluate=accuracy, knn_every=3).train()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')
        resumed = build(folder, weights=9, evaluate=accuracy, knn_every=3)
        resumed.resume("latest")
        resumed.train()
        assert untimed(folder) == undisturbed
        trials("runs killed before a step and resumed: equal logs", 1)

    @pytest.mark.parametrize(("at", "evaluated"), [(6, False), (STEPS, False), (STEPS, True)])
    def test_in_an_evaluation_or_after_the_last_and_resumed(self, tmp_path, undisturbed, at, evaluated):
        folder, asked = tmp_path / "run", []

        def killed_evaluation(step, stopped):
            if step == at:
                raise Killed
            return accuracy(step, stopped)

        trainer = build(folder, evaluate=accuracy if evaluated else killed_evaluation, knn_every=3)
        if evaluated:
            trainer.train()
        else:
            with pytest.raises(Killed):
                trainer.train()

        def recorded(step, stopped):
            asked.append(step)
            return accuracy(step, stopped)

        resumed = build(folder, weights=9, evaluate=recorded, knn_every=3)
        resumed.resume("latest")
        resumed.train()
        assert untimed(folder) == undisturbed and asked == ([] if evaluated else list(range(at, STEPS + 1, 3)))

    def test_twice_and_gone_back_to_an_earlier_checkpoint(self, tmp_path, undisturbed):
        folder = tmp_path / "run"
        build(folder, evaluate=accuracy, knn_every=3, save_total_limit=None).train()
        for start in ("checkpoint-9", "checkpoint-3"):
            resumed = build(folder, weights=9, evaluate=accuracy, knn_every=3, save_total_limit=None)
            resumed.resume(str(folder / start))
            resumed.train()
            assert untimed(folder) == undisturbed


class Tracker:
    """What accelerate's trackers do, remembered; `broken` ones refuse numbers and cannot be closed."""

    def __init__(self, name, broken=False):
        self.name, self.broken, self.seen = name, broken, []

    def log(self, values, step):
        if self.broken:
            raise RuntimeError("the network is away")
        self.seen.append((step, values))

    finish = log


def test_a_tracker_that_fails_ends_neither_the_run_nor_the_other_trackers(tmp_path, capsys):
    trainer = build(tmp_path / "run")
    broken, sound = Tracker("broken", broken=True), Tracker("sound")
    trainer.accelerator.trackers = [broken, sound]
    trainer.train()
    assert [step for step, _ in sound.seen] == list(range(1, STEPS + 1))
    out = capsys.readouterr().out
    assert out.count("warning: broken does not take numbers (the network is away)") == 1 and "sound" not in out
    (warning,) = end_trackers([Tracker("broken", broken=True), SimpleNamespace(name="fine", finish=lambda: None)])
    assert "broken could not be closed" in warning
    trainer.accelerator.trackers = []


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for wandb and trackio that remember what they are initialised with."""
    AcceleratorState._reset_state(True)
    calls = []
    for name in ("wandb", "trackio"):

        def init(tracker=name, **options):
            calls.append((tracker, options))
            return SimpleNamespace(log=lambda values, step: None, finish=lambda: None)

        config = SimpleNamespace(update=lambda values, allow_val_change, name=name: calls.append((name, "config")))
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, config=config))
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", list(LoggerType))
    yield calls
    AcceleratorState._reset_state(True)


def begin(folder, step, names=("wandb", "trackio"), run_name=None) -> Accelerator:
    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=str(folder / "logs"))
    folder.mkdir(exist_ok=True)
    start_trackers(accelerator, folder / "trackers.json", {"seed": 1}, run_name, "my-folder", step)
    return accelerator


class TestTrackers:
    def test_go_on_with_the_run_they_began(self, tmp_path, trackers):
        begin(tmp_path, step=0, run_name="tiny")
        begin(tmp_path, step=6, run_name="tiny")
        started = [(name, options) for name, options in trackers if options != "config"]
        first, second = dict(started[:2]), dict(started[2:])
        assert first["wandb"]["project"] == first["trackio"]["project"] == "hf-simprune"
        assert first == second
        assert first["wandb"]["resume"] == first["trackio"]["resume"] == "allow"
        assert len(first["wandb"]["id"]) == 8 and first["wandb"]["name"] == "tiny"
        assert first["trackio"]["name"].startswith("tiny-")
        assert [name for name, options in trackers if options == "config"] == ["wandb", "trackio"]  # stored once

    def test_begin_another_run_for_another_training(self, tmp_path, trackers):
        for folder in (tmp_path / "one", tmp_path / "two", tmp_path / "one"):  # the last overwrites the first
            begin(folder, step=0)
        ids = [options["id"] for name, options in trackers if name == "wandb" and options != "config"]
        names = [options["name"] for name, options in trackers if name == "trackio" and options != "config"]
        assert len(set(ids)) == len(set(names)) == 3 and all(name.startswith("my-folder-") for name in names)

    def test_one_that_cannot_start_is_bad_input(self, tmp_path, trackers, monkeypatch):
        def refuse(**options):
            raise ValueError("no key;\nlog in first")

        monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
        with pytest.raises(InputError, match="--report_to wandb,trackio: it cannot be started: no key; log in first"):
            begin(tmp_path, step=0)

    def test_tensorboard_forgets_what_was_logged_after_the_checkpoint(self, tmp_path, trackers):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        for start, end in ((0, 8), (5, 10)):
            accelerator = begin(tmp_path, start, names=["tensorboard"])
            log = RunLog(tmp_path / "metrics.jsonl", accelerator, start, 10, disable_tqdm=True)
            for step in range(start + 1, end + 1):
                log.write({"step": step, "loss": float(100 * start + step)})
            log.close()
            accelerator.end_training()
            AcceleratorState._reset_state(True)
        reader = EventAccumulator(str(tmp_path / "logs" / "hf-simprune"))
        reader.Reload()
        events = [(event.step, event.value) for event in reader.Scalars("loss")]
        assert events == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 506), (7, 507), (8, 508), (9, 509), (10, 510)]
        assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == events
        folders = [path for path in (tmp_path / "logs" / "hf-simprune").iterdir() if path.is_dir()]
        assert len(folders) <= 2  # the options, which are stored once
