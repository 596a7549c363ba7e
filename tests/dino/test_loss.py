"""Loss, centre and schedules against the formulas of facebookresearch/dino, written naively."""

import math

import numpy as np
import pytest
import torch

from hf_simprune.dino.loss import dino_loss, effective_rank, feature_std, teacher_targets, updated_center
from hf_simprune.dino.schedules import DinoSchedules, cosine_schedule, teacher_temperature


def naive_loss(student_logits, teacher_logits, center, teacher_temp, student_temp, num_views):
    students = (student_logits / student_temp).chunk(num_views)
    teachers = ((teacher_logits - center) / teacher_temp).softmax(-1).chunk(2)
    total, pairs = 0, 0
    for q, target in enumerate(teachers):
        for v, student in enumerate(students):
            if v != q:
                total = total + (-target * student.log_softmax(-1)).sum(-1).mean()
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("num_views", [2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_the_double_loop(num_views, dtype):
    generator = torch.Generator().manual_seed(num_views)
    student = torch.randn(num_views * 5, 37, generator=generator, dtype=dtype, requires_grad=True)
    teacher = torch.randn(10, 37, generator=generator, dtype=dtype)
    center = torch.randn(37, generator=generator, dtype=dtype)
    targets = teacher_targets(teacher, center, 0.04)
    loss = dino_loss(student, targets.probabilities, num_views, 0.1)
    expected = naive_loss(student, teacher, center, 0.04, 0.1, num_views)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(loss, student)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-7)


def test_teacher_entropy_is_that_of_the_targets():
    teacher = torch.randn(6, 11, dtype=torch.float64)
    targets = teacher_targets(teacher, torch.zeros(11), 0.07)
    naive = -(targets.probabilities * targets.probabilities.log()).sum(-1).mean()
    torch.testing.assert_close(targets.entropy, naive)


def test_center_is_the_moving_average_of_the_batch_mean():
    center, logits = torch.randn(7, dtype=torch.float64), torch.randn(12, 7, dtype=torch.float64)
    expected = center * 0.9 + logits.mean(0) * 0.1
    torch.testing.assert_close(updated_center(center, logits.sum(0), 12, 0.9), expected, rtol=1e-12, atol=1e-12)


def published_cosine(base, final, epochs, steps_per_epoch, warmup_epochs=0):
    warmup = np.linspace(0, base, warmup_epochs * steps_per_epoch) if warmup_epochs else np.array([])
    steps = np.arange(epochs * steps_per_epoch - len(warmup))
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))])


@pytest.mark.parametrize(
    ("base", "final", "warmup"), [(5e-4, 1e-6, 3), (0.04, 0.4, 0), (0.996, 1.0, 0), (1e-3, 0.0, 1)]
)
def test_cosine_schedules_equal_the_published_arrays(base, final, warmup):
    epochs, per_epoch = 7, 13
    expected = published_cosine(base, final, epochs, per_epoch, warmup)
    ours = [cosine_schedule(i, epochs * per_epoch, base, final, warmup * per_epoch) for i in range(len(expected))]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * base)


def test_teacher_temperature_equals_the_published_array():
    expected = np.concatenate([np.linspace(0.04, 0.07, 4), np.full(6, 0.07)])
    np.testing.assert_allclose([teacher_temperature(e, 4, 0.04, 0.07) for e in range(10)], expected, atol=1e-12)
    assert teacher_temperature(0, 1, 0.03, 0.07) == 0.03


def schedules(**changes):
    values = {
        "total_steps": 100, "learning_rate": 1e-3, "min_learning_rate": 1e-6, "warmup_steps": 10, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "momentum_teacher": 0.99, "teacher_temp": 0.07, "warmup_teacher_temp": 0.04,
        "warmup_teacher_temp_intervals": 3, "teacher_temp_interval": 10, "freeze_last_layer_steps": 12,
        "curriculum": "linear",
    }  # fmt: skip
    return DinoSchedules(**(values | changes))


def test_temperature_and_freeze_follow_epochs_or_steps():
    by_epoch = schedules()
    assert by_epoch.at(9).teacher_temp == 0.04
    assert by_epoch.at(10).teacher_temp == pytest.approx(0.055)
    assert by_epoch.at(11).last_layer_frozen and not by_epoch.at(12).last_layer_frozen
    assert by_epoch.warmup_end == 30
    by_step = schedules(teacher_temp_interval=1)
    assert by_step.at(2).teacher_temp == pytest.approx(0.07)
    assert by_epoch.at(0).window_progress == 0.0
    assert by_epoch.at(99).window_progress == 1.0


def test_feature_diagnostics_tell_collapse_from_spread():
    spread = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    assert effective_rank(spread) > 7.8
    assert effective_rank(torch.outer(torch.randn(64), torch.ones(8))) == pytest.approx(1.0, abs=1e-3)
    assert feature_std(torch.ones(16, 8)) == 0
    assert feature_std(spread) == pytest.approx(1 / math.sqrt(8), rel=0.05)
