"""The loop: logging, checkpoints, resumption to the last digit, interruption, stopping."""

import json
import math
import os
import signal

import pytest
import torch
from safetensors import safe_open

from hf_simprune.dino.checkpoint import NotSavedError, find_checkpoint, list_checkpoints, set_aside_later
from hf_simprune.dino.engine import StepResult, Views
from hf_simprune.dino.trainer import DinoTrainer, LoopSettings
from hf_simprune.errors import InputError, TrainingError, TrainingInterrupted

from .conftest import FixedViews, tiny_dual, tiny_engine, tiny_schedules, tiny_views


def build(folder, total=12, reduction="random", **changes):
    options = {key: changes.pop(key) for key in ("evaluate", "source", "snapshot", "snapshot_steps") if key in changes}
    source = options.pop("source", FixedViews(dtype=torch.float32))
    values = {"output_dir": folder, "images_per_step": 3, "logging_steps": 1, "save_steps": 5, "disable_tqdm": True}
    dual = tiny_dual(reduction, 0.6, dtype=torch.float32, drop_path_rate=0.3, seed=changes.pop("weights", 0))
    engine = tiny_engine(dual)
    return DinoTrainer(engine, tiny_schedules(total), source, LoopSettings(**(values | changes)), **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [(r["step"], r["loss"], r["teacher_entropy"], r["gradient_norm"]) for r in lines(folder) if "loss" in r]


@pytest.mark.parametrize("reduction", ["none", "random", "simprune"])
def test_resumed_run_equals_the_undisturbed_one_to_the_last_digit(tmp_path, reduction):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    straight = build(whole, reduction=reduction)
    straight.train()

    def stop_at_7(step, stopped):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return {"knn_accuracy": 0.5}

    with pytest.raises(TrainingInterrupted, match="--resume_from_checkpoint latest"):
        build(parts, reduction=reduction, evaluate=stop_at_7, knn_every=7).train()
    assert [path.name for path in list_checkpoints(parts)] == ["checkpoint-5", "checkpoint-7"]
    resumed = build(parts, reduction=reduction, weights=99)  # other weights, so that loading must replace them all
    resumed.resume("latest")
    resumed.train()
    assert losses(parts) == losses(whole)
    for name, tensor in straight.engine.dual.state_dict().items():
        assert torch.equal(tensor, resumed.engine.dual.state_dict()[name]), name
    assert torch.equal(straight.engine.center, resumed.engine.center)


def test_resuming_from_an_older_checkpoint_drops_later_lines(tmp_path):
    build(tmp_path, save_total_limit=None).train()
    whole = losses(tmp_path)
    resumed = build(tmp_path)
    resumed.resume(str(tmp_path / "checkpoint-5"))
    resumed.train()
    assert losses(tmp_path) == whole


def test_later_checkpoints_are_set_aside_when_an_earlier_one_is_gone_on_from(tmp_path):
    build(tmp_path, save_total_limit=None).train()
    moved = set_aside_later(tmp_path, 5)
    assert [path.name for path in moved] == ["abandoned-checkpoint-10", "abandoned-checkpoint-12"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-5"
    assert all((path / "trainer_state.json").is_file() for path in moved)


def test_averages_over_the_logging_interval_survive_a_resumption(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    build(whole, logging_steps=4).train()
    build(parts, logging_steps=4).train()
    resumed = build(parts, logging_steps=4)
    resumed.resume(str(parts / "checkpoint-10"))
    resumed.train()
    assert losses(parts) == losses(whole)
    single = tmp_path / "single"
    single.mkdir()
    build(single).train()
    each = [loss for _, loss, _, _ in losses(single)]
    assert losses(whole)[0][1] == pytest.approx(sum(each[:4]) / 4, abs=1e-12)


def test_sigterm_saves_and_says_how_to_resume(tmp_path):
    def stop(step, stopped):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"knn_accuracy": 0.5}

    with pytest.raises(TrainingInterrupted, match="after step 3"):
        build(tmp_path, evaluate=stop, knn_every=3).train()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_checkpoints_rotate_and_hold_no_pickle(tmp_path):
    build(tmp_path, save_steps=2, save_total_limit=2).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-12"]
    files = sorted(path.name for path in (tmp_path / "checkpoint-12").iterdir())
    tensors = ["optimizer.safetensors", "student.safetensors", "teacher.safetensors"]
    assert files == ["manifest.json", *tensors, "trainer_state.json"]
    with safe_open(tmp_path / "checkpoint-12" / "optimizer.safetensors", "pt") as tensors:
        assert "center" in tensors.keys()


def test_a_checkpoint_cut_short_is_never_found(tmp_path, monkeypatch):
    trainer = build(tmp_path, total=5)
    trainer.train()
    monkeypatch.setattr("hf_simprune.atomic.os.rename", lambda *a: (_ for _ in ()).throw(OSError("full")))
    trainer.step = 6
    with pytest.raises(NotSavedError, match=r"checkpoint-6 could not be written \(full\); .*checkpoint-5"):
        trainer.save()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-5"


def test_another_architecture_cannot_be_resumed(tmp_path):
    build(tmp_path).train()
    other = build(tmp_path)
    other.engine = tiny_engine(tiny_dual(architecture="deit_tiny", dtype=torch.float32))
    with pytest.raises(InputError, match="another architecture"):
        other.resume("latest")


def test_another_length_needs_permission(tmp_path):
    build(tmp_path).train()
    with pytest.raises(InputError, match="--allow_schedule_change"):
        build(tmp_path, total=20).resume("latest")
    longer = build(tmp_path, total=20, allow_schedule_change=True)
    longer.resume("latest")
    longer.train()
    assert losses(tmp_path)[-1][0] == 20


@pytest.mark.parametrize("where", ["latest", "missing-folder"])
def test_missing_checkpoint_is_an_input_error(tmp_path, where):
    with pytest.raises(InputError, match="--resume_from_checkpoint"):
        build(tmp_path).resume(where)


class Poisoned(FixedViews):
    """Not-a-number pixels from step 7 on."""

    def views(self, batch):
        crops = batch.global_crops.clone()
        if torch.equal(batch.global_crops, tiny_views(7, dtype=torch.float32).global_crops):
            crops[0, 0, 0, 0] = math.nan
        return Views(crops, batch.local_crops)


def test_non_finite_loss_stops_names_the_step_and_keeps_the_network(tmp_path):
    with pytest.raises(TrainingError, match=r"stopped at step 7: loss is nan.*checkpoint-7"):
        build(tmp_path, source=Poisoned(dtype=torch.float32), save_total_limit=1).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-7"]
    resumed = build(tmp_path)
    assert resumed.resume("latest").name == "checkpoint-7"
    assert all(torch.isfinite(p).all() for p in resumed.engine.dual.parameters())
    resumed.train()


def test_endless_overflow_stops(tmp_path):
    trainer = build(tmp_path)
    trainer.engine.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.engine.step = lambda *a, **k: StepResult(1.0, 1.0, math.inf, skipped=True)
    with pytest.raises(TrainingError, match="not finite 50 times in a row"):
        trainer.train()


def test_gradients_that_are_not_finite_stop_a_run_that_has_no_loss_scale_to_lower(tmp_path):
    trainer = build(tmp_path)
    trainer.engine.step = lambda *a, **k: StepResult(1.0, 1.0, math.inf, skipped=True)
    with pytest.raises(TrainingError, match="stopped at step 0: gradients are not finite, and no step was taken"):
        trainer.train()


def test_a_network_that_is_not_finite_is_not_saved_over_what_is_good(tmp_path):
    class Spoiled(Poisoned):
        def views(self, batch):
            views = super().views(batch)
            if not views.global_crops.isfinite().all():
                with torch.no_grad():
                    next(trainer.engine.dual.student.parameters()).view(-1)[0] = math.inf
            return views

    trainer = build(tmp_path, source=Spoiled(dtype=torch.float32))
    with pytest.raises(
        TrainingError, match="stopped at step 7: loss is nan. The last good checkpoint is checkpoint-5"
    ):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_collapse_is_written_to_the_metrics(tmp_path, capsys):
    trainer = build(tmp_path, total=240, logging_steps=100, save_steps=1000)
    entropy = 0.99 * math.log(trainer.engine.center.numel())
    trainer.engine.step = lambda *a, **k: StepResult(entropy + 0.001, entropy, 1.0, skipped=False)
    trainer.train()
    (found,) = [r for r in lines(tmp_path) if "collapse" in r]
    assert found["collapse"].startswith("uniform collapse")
    assert "uniform collapse" in capsys.readouterr().out


def test_metrics_hold_the_promised_numbers(tmp_path):
    def evaluate(step, stopped):
        return {"knn_accuracy": step / 100}

    trainer = build(tmp_path, evaluate=evaluate, knn_every=6, steps_per_epoch=4)
    trainer.describe_window = lambda values: {"window_offset": round(values.window_progress * 6)}
    trainer.train()
    records = lines(tmp_path)
    assert [r["step"] for r in records if "knn_accuracy" in r] == [0, 6, 12]
    steps = [r for r in records if "loss" in r]
    assert [r["epoch"] for r in steps] == [(i + 1) / 4 for i in range(12)]
    wanted = {"loss", "kl", "teacher_entropy", "cls_std", "cls_rank"}
    wanted |= {"learning_rate", "images_per_second", "data_wait"}
    assert all(wanted <= r.keys() and all(math.isfinite(r[key]) for key in wanted) for r in steps)
    assert steps[0]["window_offset"] == 0 and steps[-1]["window_offset"] == 6
    assert steps[3]["kl"] == pytest.approx(steps[3]["loss"] - steps[3]["teacher_entropy"])


def test_bad_images_are_counted_once(tmp_path, capsys):
    class Broken(FixedViews):
        def views(self, batch):
            return Views(batch.global_crops, batch.local_crops, bad_indices=(17, 4))

    trainer = build(tmp_path, source=Broken(dtype=torch.float32))
    trainer.train()
    assert lines(tmp_path)[-1]["bad_images"] == 2
    assert capsys.readouterr().out.count("image 17") == 1


def test_snapshots_are_asked_for_at_their_steps(tmp_path):
    seen = []
    steps = frozenset({0, 5, 11})
    build(tmp_path, snapshot=lambda step, views, values: seen.append(step), snapshot_steps=steps).train()
    assert seen == [0, 5, 11]
