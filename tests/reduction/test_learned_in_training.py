# SPDX-License-Identifier: Apache-2.0
"""Methods that learn or calibrate, in the whole training step."""

import json

import pytest
import torch

from hf_simprune.dino.trainer import DinoTrainer, LoopSettings

from ..dino.conftest import FixedViews, tiny_dual, tiny_engine, tiny_schedules, tiny_views


METHODS = [
    ("simprune_dynamic", {"gate_init": 0.3}),
    ("self_slimmed", {}),
    ("self_slimmed", {"recalibration": 0.5}),
    ("patch_slimming", {"calibrate_epochs": 2.5, "calibration_batches": 2}),
]
LEARNED = METHODS[:3]


class Views(FixedViews):
    def batches(self, start):
        step = start
        while True:
            yield [tiny_views(step, size=16, dtype=torch.float32)]
            step += 1


def build(folder, name, options, total=12, seed=0):
    dual = tiny_dual(name, 0.6, (1, 2), torch.float32, seed, options=options, drop_path_rate=0.3)
    folder.mkdir(exist_ok=True)
    settings = LoopSettings(folder, 3, steps_per_epoch=2, logging_steps=1, save_steps=100, disable_tqdm=True)
    return DinoTrainer(tiny_engine(dual), tiny_schedules(total), Views(), settings)


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in records if "loss" in r]


# patch slimming calibrates in steps 0, 1, 5, 6, 10, 11: a calibration begins, and one is under way
@pytest.mark.parametrize(("name", "options", "stop"), [(*method, 5) for method in METHODS] + [(*METHODS[3], 6)])
def test_resumed_run_equals_the_undisturbed_one_to_the_last_digit(tmp_path, name, options, stop):
    straight = build(tmp_path / "whole", name, options)
    straight.train()
    first = build(tmp_path / "parts", name, options)
    original = first.engine.step

    def stop_there(*args, **kwargs):
        if first.step == stop:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    first.engine.step = stop_there
    first.settings.__dict__["save_steps"] = stop
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = build(tmp_path / "parts", name, options, seed=99)
    resumed.resume(str(tmp_path / "parts" / f"checkpoint-{stop}"))
    resumed.train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    wanted = straight.engine.dual.state_dict()
    for key, tensor in resumed.engine.dual.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
    assert any(key.startswith("student.reduction.") for key in wanted)


def gradients(name, options, checkpointing):
    dual = tiny_dual(name, 0.6, (1, 2), options=options)
    if checkpointing:
        dual.student.backbone.activation_checkpointing_enable()
    torch.manual_seed(1)
    views = tiny_views(0, batch=4)
    losses = []
    for _ in range(2):  # twice: nothing of a pass may linger
        output = dual(views.global_crops, views.local_crops, torch.tensor(0.4))
        dual.zero_grad()
        loss = output.student_logits.square().mean() + output.auxiliary_loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    return losses[0], {key: parameter.grad for key, parameter in dual.student.named_parameters()}


@pytest.mark.parametrize(("name", "options"), LEARNED)
def test_recomputed_activations_give_the_same_loss_and_gradients(name, options):
    plain, plain_gradients = gradients(name, options, False)
    again, again_gradients = gradients(name, options, True)
    assert plain == again
    for key, gradient in plain_gradients.items():
        torch.testing.assert_close(again_gradients[key], gradient, rtol=1e-9, atol=1e-12)
    learned = {key: gradient for key, gradient in plain_gradients.items() if key.startswith("reduction.")}
    assert learned
    for key, gradient in learned.items():
        assert gradient.ndim < 2 or gradient.abs().sum() > 0, key


@pytest.mark.parametrize(("name", "options"), LEARNED)
def test_the_teachers_modules_are_the_average_of_the_students(name, options):
    engine = tiny_engine(tiny_dual(name, 0.6, (1, 2), options=options))
    values = tiny_schedules().at(10)
    before = [parameter.clone() for parameter in engine.dual.teacher.reduction.parameters()]
    engine.step([tiny_views(0)], values)
    momentum = values.momentum_teacher
    students = engine.dual.student.reduction.parameters()
    for old, new, student in zip(before, engine.dual.teacher.reduction.parameters(), students, strict=True):
        assert not new.requires_grad
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * student)


def test_the_pass_keeps_what_patch_slimming_has_calibrated():
    engine = tiny_engine(tiny_dual("patch_slimming", 0.6, (1, 2)))
    views = tiny_views(0)
    engine.before_step(0, 5, [views])
    output = engine.dual(views.global_crops, views.local_crops, torch.tensor(0.0))
    positions = engine.dual.student.reduction
    for count, branches in ((16, (0, 1)), (4, (2,))):
        for branch in branches:
            first, second = (stage[branch].indices for stage in output.maps)
            assert (first == positions.kept(count, 0)).all()
            assert (first.gather(1, second) == positions.kept(count, 1)).all()


def test_factors_of_one_leave_the_dynamic_pass_as_it_is():
    dual = tiny_dual("simprune_dynamic", 0.6, (1, 2))
    views = tiny_views(0, batch=4)
    found = dual(views.global_crops, views.local_crops, torch.tensor(0.4))
    with torch.no_grad():
        plain = dual(views.global_crops, views.local_crops, torch.tensor(0.4))
    torch.testing.assert_close(found.student_logits, plain.student_logits, rtol=1e-12, atol=1e-12)
    counts = [tuple(stage.indices.shape[1] for stage in stages) for stages in found.maps]
    assert all(student == teacher for student, teacher, _ in counts)
