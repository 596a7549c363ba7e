"""Timing of calls in turns, and ratios with intervals."""

import time

import numpy as np
import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.evaluation.latency import compare_latency, cpu_seconds, interleave, median_ratio, wall_seconds


CPU = torch.device("cpu")


def test_calls_take_turns_after_the_warm_up():
    order = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleave(sides, rounds=3, device=CPU, warmup=2)
    assert order == ["a", "b"] * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_no_rounds_are_refused():
    with pytest.raises(InputError, match="rounds=0"):
        interleave({"a": lambda: None}, 0, CPU)


def test_sleeping_takes_wall_time_but_no_cpu_time():
    assert wall_seconds(lambda: time.sleep(0.03), CPU) >= 0.03
    assert cpu_seconds(lambda: time.sleep(0.03), CPU) < 0.015


def test_median_ratio_is_that_of_the_pairs_and_lies_in_its_interval():
    generator = np.random.default_rng(0)
    drift = generator.uniform(1, 5, 200)  # a machine that speeds up and slows down hits both sides of a round
    ratio = median_ratio(0.5 * drift * generator.normal(1, 0.02, 200), drift)
    assert ratio.median == pytest.approx(0.5, abs=0.005)
    assert ratio.low < ratio.median < ratio.high
    assert ratio.high - ratio.low < 0.02
    assert str(ratio).startswith("0.5") or str(ratio).startswith("0.49")


def test_latency_of_half_the_work_is_half():
    matrix = torch.randn(192, 192)

    def work(times):
        def call(x):
            for _ in range(times):
                x = x @ matrix
            return x

        return call

    compared = compare_latency(work(40), work(20), torch.randn(256, 192), rounds=20, clock=cpu_seconds)
    assert 0.35 < compared.ratio.median < 0.65
    assert compared.compressed < compared.original
