"""Numbers that are not finite, in activations and in gradients: no step is taken and the run says where it stopped.

An overflow under fp16, which a loss scale recovers from, is tested in tests/dino/test_whole_step.py, and the trainer
by itself, which is quicker, in tests/dino/test_trainer.py.
"""

import math
import re

import pytest
import torch
from safetensors.torch import load_file

from .warm_runs import assert_equal_runs, checkpoints, last_lines, wait_until_none_is_left


OPTIONS = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1, "knn_every": 0}
EVERY = [(where, value) for where in ("activation", "gradient") for value in (math.nan, math.inf, -math.inf)]


@pytest.mark.faults
def test_a_step_with_numbers_that_are_not_finite_is_not_taken_and_named(warm, images, tmp_path, trials):
    options = {**OPTIONS, "dataset_name_or_path": images}
    whole = tmp_path / "whole"
    assert warm.run(tmp_path / "whole.log", output_dir=whole, **options) == 0
    for number, (where, value) in enumerate(EVERY):
        step = 2 + number % 3 + 1  # what was done before: 2, 3 or 4 steps
        folder, log = tmp_path / f"run-{number}", tmp_path / f"run-{number}.log"
        spoil = {"step": step, "where": where, "value": value}
        pid = warm.start(log, {"spoil": spoil}, output_dir=folder, **options)
        assert warm.wait(pid) == 1, last_lines(log)
        wait_until_none_is_left(pid)
        (line,) = re.findall("^error: .*$", log.read_text(), re.M)
        assert line.startswith(f"error: stopped at step {step - 1}: ") and ("not finite" in line or "loss is" in line)
        assert f"checkpoint-{step - 1}" in line and "Traceback" not in log.read_text()
        assert (step - 1) in checkpoints(folder) and (step - 1) // 2 * 2 in checkpoints(folder)
        for file in (folder / f"checkpoint-{step - 1}").glob("*.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())

        # nothing of the step was done: with sound numbers the run goes on to the same end
        assert warm.run(log, output_dir=folder, resume_from_checkpoint="latest", **options) == 0, last_lines(log)
        assert_equal_runs(whole, folder)
    trials("NaN or infinity in activations or gradients, step not taken, resumed bit-equal", len(EVERY))
