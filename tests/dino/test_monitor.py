"""Collapse is recognised in both forms, and a healthy start is not accused."""

import math

import pytest

from hf_simprune.dino.monitor import CollapseMonitor


OUT_DIM = 512
TOP = math.log(OUT_DIM)


def messages(losses_and_entropies, start_step=0):
    monitor = CollapseMonitor(OUT_DIM, start_step)
    return [m for i, (loss, h) in enumerate(losses_and_entropies) if (m := monitor.update(i, loss, h))]


@pytest.mark.parametrize(
    ("entropy", "name", "option"), [(0.99 * TOP, "uniform", "--teacher_temp"), (0.001, "one-prototype", "raise")]
)
def test_collapse_is_reported_once_with_what_to_change(entropy, name, option):
    found = messages([(entropy + 0.005, entropy)] * 500)
    assert len(found) == 1
    assert found[0].startswith(f"{name} collapse at step 199") and option in found[0]


@pytest.mark.parametrize(
    "history",
    [
        [(TOP, 0.99 * TOP)] * 500,  # a start: uniform targets, but KL is still large
        [(0.6 * TOP + 0.005, 0.6 * TOP)] * 500,  # learned well: small KL at a healthy entropy
        ([(0.99 * TOP + 0.005, 0.99 * TOP)] * 199 + [(TOP + 1, 0.99 * TOP)]) * 3,  # never 200 steps in a row
    ],
)
def test_healthy_runs_are_not_accused(history):
    assert messages(history) == []


def test_nothing_is_judged_before_the_warm_up_ends():
    history = [(0.99 * TOP + 0.005, 0.99 * TOP)] * 300
    assert messages(history, start_step=150) == []
    assert messages(history, start_step=100)


def test_counts_survive_a_checkpoint():
    monitor = CollapseMonitor(OUT_DIM, 0)
    for step in range(150):
        assert monitor.update(step, 0.001, 0.0) is None
    resumed = CollapseMonitor(OUT_DIM, 0)
    resumed.load_state_dict(monitor.state_dict())
    assert [resumed.update(step, 0.001, 0.0) is not None for step in range(150, 201)] == [False] * 49 + [True, False]
