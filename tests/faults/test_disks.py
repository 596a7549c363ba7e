"""A full or read-only disk costs no checkpoint, no line of the log and no run that can go on."""

import errno
import json
import os
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from hf_simprune.atomic import clear_leftovers
from hf_simprune.dino import export
from hf_simprune.dino import run as run_module
from hf_simprune.dino.argument_parsing import parse_arguments
from hf_simprune.dino.checkpoint import (
    NotSavedError,
    check_files,
    checkpoint_tensors,
    find_checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from hf_simprune.dino.engine import DinoEngine
from hf_simprune.dino.export import export_model, result_folder
from hf_simprune.dino.output_folder import tidy_up
from hf_simprune.dino.run import run_training
from hf_simprune.errors import InputError, TrainingError
from hf_simprune.rba.output import building

from ..dino.conftest import tiny_dual, tiny_engine
from ..tiny_run import words
from .failing_disk import MIB, FailingDisk, contents, empty, fill, hidden, set_writable, small_disk, visible
from .tiny_trainer import STATE, STEPS, build, same, tensors, untimed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder and the final state of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = build(folder)
    trainer.train()
    return folder, tensors(trainer)


def same_log(folder, other):
    return untimed(folder) == untimed(other)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
@pytest.mark.parametrize("lasting", [False, True], ids=["one call", "from then on"])
@pytest.mark.parametrize("step", [5, 10], ids=["replacing", "new"])
def test_a_checkpoint_that_fails_at_any_call_leaves_the_last_one_as_it_was(
    tmp_path, monkeypatch, trials, code, lasting, step
):
    engine = tiny_engine(tiny_dual(dtype=torch.float32))
    write_checkpoint(tmp_path, checkpoint_tensors(engine), STATE | {"step": 5, "which": "old"})
    before = contents(tmp_path)
    with torch.no_grad():
        next(engine.dual.parameters()).add_(1)
    changed, disk, failures = checkpoint_tensors(engine), FailingDisk(monkeypatch, code), 0
    for call in range(1, 100):
        disk.fail(call, None if lasting else 1)
        try:
            write_checkpoint(tmp_path, changed, STATE | {"step": step, "which": "new"})
            error = None
        except NotSavedError as caught:
            error = caught
        if not disk.mend():
            break
        failures += 1
        latest = find_checkpoint(tmp_path, "latest")
        assert check_files(latest) is None
        if error is not None:
            assert os.strerror(code) in str(error) and "\n" not in str(error)
        whole = contents(latest)
        if whole == {name.partition("/")[2]: data for name, data in before.items()}:
            assert error is not None
        else:  # the names were changed, and only then the disk failed
            assert load_checkpoint(latest, engine)["which"] == "new"
        if not lasting and code == errno.ENOSPC:
            assert hidden(tmp_path) == []
        tidy_up(tmp_path)
        assert hidden(tmp_path) == [] and check_files(find_checkpoint(tmp_path, "latest")) is None
        shutil.rmtree(tmp_path / f"checkpoint-{step}", ignore_errors=True)
        for name, data in before.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
    assert call < 99 and failures > 12
    assert load_checkpoint(find_checkpoint(tmp_path, "latest"), engine)["which"] == "new"
    trials(f"calls failing while a checkpoint is written ({os.strerror(code)})", failures)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_run_goes_on_while_the_disk_fails_and_loses_nothing(tmp_path, monkeypatch, capsys, undisturbed, code):
    disk = FailingDisk(monkeypatch, code)

    def happen(step):
        if step == 5:  # before the step that saves is logged, until after the one that would have saved next
            disk.fail()
        elif step == 8:
            assert disk.mend()

    trainer = build(tmp_path / "run", happen, save_total_limit=None)
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("checkpoint-6 could not be written") == 1 and "tries again in 3 steps" in out
    assert f"the last good one is {tmp_path}/run/checkpoint-3" in out
    assert out.count("metrics.jsonl cannot be written") == out.count("metrics.jsonl is written again") == 1
    tidy_up(tmp_path / "run")
    assert visible(tmp_path / "run") == ["checkpoint-12", "checkpoint-3", "checkpoint-9", "metrics.jsonl"]
    assert same_log(tmp_path / "run", undisturbed[0]) and same(tensors(trainer), undisturbed[1])


def test_lines_that_only_a_checkpoint_could_keep_come_back_from_it(tmp_path, monkeypatch, undisturbed):
    """The log's own file fails, checkpoints do not, and then the run is killed."""
    folder = tmp_path / "run"

    def happen(step):
        if step == 3:
            monkeypatch.setattr("hf_simprune.dino.runlog.append", lambda *_: (_ for _ in ()).throw(OSError("quota")))
        elif step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, happen).train()
    assert len(untimed(folder)) == 2
    monkeypatch.undo()
    resumed = build(folder, weights=9)
    resumed.resume("latest")
    resumed.train()
    assert same_log(folder, undisturbed[0])


def test_a_last_checkpoint_that_fails_stops_in_one_line_and_the_retry_ends_the_run(tmp_path, monkeypatch, undisturbed):
    folder, disk = tmp_path / "run", FailingDisk(monkeypatch)
    with pytest.raises(TrainingError) as caught:
        build(folder, lambda step: disk.fail() if step == STEPS else None).train()
    disk.mend()
    assert "checkpoint-12 could not be written (No space left on device)" in str(caught.value)
    assert f"one is {folder}/checkpoint-9, from which --resume_from_checkpoint latest goes on" in str(caught.value)
    assert "\n" not in str(caught.value) and hidden(folder) == []
    again = build(folder, weights=9)
    assert again.resume("latest").name == "checkpoint-9"
    again.train()
    assert same_log(folder, undisturbed[0]) and same(tensors(again), undisturbed[1])


def test_a_run_that_can_never_save_says_that_nothing_is_left(tmp_path, monkeypatch):
    disk = FailingDisk(monkeypatch)
    with pytest.raises(TrainingError, match="checkpoint-12 .* no earlier one is left.*--overwrite_output_dir"):
        build(tmp_path / "run", lambda step: disk.fail() if step == 1 else None).train()
    disk.mend()
    assert visible(tmp_path / "run") == ["metrics.jsonl"]


def test_a_log_that_cannot_be_begun_is_bad_input(tmp_path, monkeypatch):
    trainer, disk = build(tmp_path / "run"), FailingDisk(monkeypatch, errno.EROFS)
    disk.fail()
    with pytest.raises(InputError, match="--output_dir .*metrics.jsonl cannot be written: Read-only file system"):
        trainer.train()


def test_an_output_that_cannot_take_messages_does_not_end_the_run(tmp_path, monkeypatch, undisturbed):
    """Standard output may go into a file on the full disk."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_simprune.dino.runlog.tqdm.write", full)
    monkeypatch.setattr("hf_simprune.dino.runlog.tqdm.update", full)
    trainer = build(tmp_path / "run", evaluate=lambda step, stopped: {"knn_accuracy": 0.5})
    trainer.train()
    assert same(tensors(trainer), undisturbed[1])


@pytest.mark.parametrize("lasting", [False, True], ids=["one call", "from then on"])
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.faults)])
def test_a_result_that_fails_at_any_call_leaves_whole_files_only(tmp_path, monkeypatch, trials, lasting, every):
    dual, processor = tiny_dual(dtype=torch.float32), ViTImageProcessor(size={"height": 16, "width": 16})
    folder = tmp_path / "run"

    def export():
        with result_folder(folder) as place:
            export_model(place, dual, processor)

    export()
    old = contents(folder)
    with torch.no_grad():
        for parameter in dual.parameters():
            parameter.add_(1)
    export()
    new = contents(folder)
    assert old.keys() == new.keys() and any(old[name] != new[name] for name in old)
    disk, failures = FailingDisk(monkeypatch), 0
    for call in range(1, 200, every):
        shutil.rmtree(folder)
        for name, data in old.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        disk.fail(call, None if lasting else 1)
        try:
            export()
        except Exception as error:
            assert "No space left" in str(error), error
        if not disk.mend():
            break
        failures += 1
        found = contents(folder)
        assert found.keys() == old.keys() and hidden(folder) == []
        for name, data in found.items():
            assert data in (old[name], new[name]), name
    assert failures > 25 / every and contents(folder) == new
    trials("calls failing while the result is written", failures)


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_compression_that_fails_at_any_call_leaves_whole_files_only(tmp_path, monkeypatch, trials, overwritten):
    disk, failures = FailingDisk(monkeypatch), 0
    old = dict.fromkeys(("config.json", "model.safetensors", "redundancy.json", "tokenizer.json"), b"old")
    new = dict.fromkeys(("config.json", "model.safetensors", "redundancy.json", "README.md"), b"new")
    for call in range(1, 60):
        folder = tmp_path / f"result-{call}"
        if overwritten:
            folder.mkdir()
            for name, data in old.items():
                (folder / name).write_bytes(data)
        disk.fail(call, 1)
        try:
            with building(str(folder)) as place:
                for name, data in new.items():
                    (place / name).write_bytes(data)
        except TrainingError as error:
            assert f"--output_dir {folder} could not be written: No space left on device" == str(error)
        if not disk.mend():
            break
        failures += 1
        assert hidden(tmp_path) == []
        for name, data in contents(folder).items() if folder.exists() else ():
            assert data in (old.get(name), new.get(name))
        assert not overwritten or "redundancy.json" in visible(folder)
    assert failures > 8 and contents(folder) == new
    trials("calls failing while a compression is written", failures)


def test_leftovers_of_a_killed_run_are_tidied_up_and_nothing_else(tmp_path):
    for name in (".partial-checkpoint-8/a", ".removed-checkpoint-2/a", ".replaced-checkpoint-5/a", "checkpoint-6/a",
                 ".replaced-checkpoint-6/old", ".partial-notes/a", ".partial-result/config.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    (tmp_path / ".partial-metrics.jsonl").write_text("x")
    found = tidy_up(tmp_path)
    assert len(found) == 6 and sorted(contents(tmp_path)) == [".partial-notes/a", "checkpoint-5/a", "checkpoint-6/a"]
    assert tidy_up(tmp_path) == [] and clear_leftovers(tmp_path / "nowhere") == []


class TestOnARealDisk:
    def test_a_run_survives_a_disk_that_is_full_for_a_while(self, tmp_path, capsys, undisturbed, trials):
        with small_disk(tmp_path / "disk", 3) as disk:

            def happen(step):
                if step == 5:
                    fill(disk)
                elif step == 8:
                    empty(disk)

            trainer = build(disk / "run", happen)
            trainer.train()
            out = capsys.readouterr().out
            assert "checkpoint-6 could not be written (" in out and "No space left on device" in out
            assert visible(disk / "run") == ["checkpoint-12", "checkpoint-9", "metrics.jsonl"]
            assert hidden(disk / "run") == [] and check_files(disk / "run" / "checkpoint-12") is None
            assert same_log(disk / "run", undisturbed[0]) and same(tensors(trainer), undisturbed[1])
        trials("runs on a real disk that fills up and is emptied", 1)

    @pytest.mark.parametrize(
        "spare", [40_000, *(pytest.param(n, marks=pytest.mark.faults) for n in (0, 8_192, 120_000))]
    )
    def test_a_disk_that_fills_up_for_good_keeps_the_last_checkpoint(self, tmp_path, undisturbed, trials, spare):
        with small_disk(tmp_path / "disk", 3) as disk:
            with pytest.raises(TrainingError, match=r"checkpoint-12 could not be written .*checkpoint-\d"):
                build(disk / "run", lambda step: fill(disk, spare) if step == 5 else None).train()
            assert hidden(disk / "run") == []
            before = find_checkpoint(disk / "run", "latest")
            assert check_files(before) is None
            empty(disk)
            resumed = build(disk / "run", weights=9)
            assert resumed.resume("latest") == before
            resumed.train()
            assert same_log(disk / "run", undisturbed[0]) and same(tensors(resumed), undisturbed[1])
        trials("runs on a real disk that fills up for good, then resumed", 1)

    def test_a_folder_that_becomes_read_only_for_a_while(self, tmp_path, capsys, undisturbed, trials):
        with small_disk(tmp_path / "disk", 3 * MIB // MIB) as disk:

            def happen(step):
                if step in (5, 8):
                    set_writable(disk, step == 8)

            trainer = build(disk / "run", happen)
            trainer.train()
            assert "checkpoint-6 could not be written (Read-only file system)" in capsys.readouterr().out
            assert visible(disk / "run") == ["checkpoint-12", "checkpoint-9", "metrics.jsonl"]
            assert same_log(disk / "run", undisturbed[0]) and same(tensors(trainer), undisturbed[1])
        trials("runs on a real disk that is read-only for a while", 1)


class TestWholeRuns:
    @pytest.fixture
    def train(self, images, tmp_path, monkeypatch):
        """Trains in this process and returns the output folder; pictures are left out, to save time."""
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr("hf_simprune.dino.run.draw_pictures", lambda *_: None)

        def run(**changes):
            AcceleratorState._reset_state(True)
            folder = tmp_path / "run"
            run_training(parse_arguments(words(output_dir=folder, dataset_name_or_path=images, **changes)))
            return folder

        yield run
        AcceleratorState._reset_state(True)

    def test_a_result_that_cannot_be_written_costs_no_training(self, train, tmp_path, monkeypatch, capsys):
        disk, folder, steps = FailingDisk(monkeypatch), tmp_path / "run", []
        plain, step = export.export_model, DinoEngine.step
        monkeypatch.setattr("hf_simprune.dino.run.export_model", lambda *a: (disk.fail(4), plain(*a)))
        with pytest.raises(TrainingError) as caught:
            train()
        disk.mend()
        message = str(caught.value)
        assert message.startswith(f"the result could not be written to {folder} (") and "\n" not in message
        assert "safe in checkpoint-6" in message and "--resume_from_checkpoint latest" in message
        assert hidden(folder) == [] and "model.safetensors" not in visible(folder)
        assert json.loads((folder / "training" / "run.json").read_text())["finished"] is False
        log = (folder / "metrics.jsonl").read_bytes()
        monkeypatch.setattr("hf_simprune.dino.run.export_model", plain)
        monkeypatch.setattr(DinoEngine, "step", lambda *a, **k: steps.append(step(*a, **k)) or steps[-1])
        train(resume_from_checkpoint="latest")
        assert steps == [] and (folder / "metrics.jsonl").read_bytes() == log
        assert json.loads((folder / "training" / "run.json").read_text())["finished"] is True
        saved = load_file(folder / "training" / "teacher" / "model.safetensors")
        trained = load_file(folder / "checkpoint-6" / "teacher.safetensors")
        assert saved and all(torch.equal(value, trained[f"backbone.{name}"]) for name, value in saved.items())

    def test_what_is_only_shown_may_fail(self, train, monkeypatch, capsys):
        """The pruned tokens of the middle of training."""

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("hf_simprune.dino.snapshots.save_file", full)
        folder = train(max_steps=2)
        assert "pruned tokens of step 0 will not be drawn: No space left on device" in capsys.readouterr().out
        assert (folder / "model.safetensors").exists()

    def test_a_disk_that_is_full_from_the_start_is_bad_input(self, train, tmp_path, monkeypatch):
        disk = FailingDisk(monkeypatch)
        prepare = run_module._prepare_folder
        monkeypatch.setattr(run_module, "_prepare_folder", lambda *a: (disk.fail(), prepare(*a))[1])
        with pytest.raises(InputError, match="--output_dir .*: it cannot be written: No space left on device"):
            train()
        disk.mend()
        assert not (tmp_path / "run").exists() or contents(tmp_path / "run") == {}
