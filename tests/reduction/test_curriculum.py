# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.reduction import window_offset, window_progress


def test_linear_goes_from_zero_to_one_in_equal_steps():
    assert [window_progress("linear", step, 5) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_the_static_and_step_curricula():
    assert [window_progress("easy", step, 5) for step in range(5)] == [0, 0, 0, 0, 0]
    assert [window_progress("hard", step, 5) for step in range(5)] == [1, 1, 1, 1, 1]
    assert [window_progress("step", step, 5) for step in range(5)] == [0, 0, 1, 1, 1]
    assert [window_progress("step", step, 4) for step in range(4)] == [0, 0, 1, 1]


def test_a_training_of_one_step_starts_its_window_at_zero():
    assert window_progress("linear", 0, 1) == 0
    assert window_progress("hard", 0, 1) == 1


def test_offsets_cover_the_window_range_as_integer_tensors():
    offsets = [window_offset(torch.tensor(window_progress("linear", step, 101)), 20, 14) for step in range(101)]
    assert all(offset.dtype == torch.int64 and offset.ndim == 0 for offset in offsets)
    values = [int(offset) for offset in offsets]
    assert values == sorted(values)
    assert set(values) == set(range(7)) and values[0] == 0 and values[-1] == 6
    assert int(window_offset(torch.tensor(0.3), 196, 157)) == 12  # 11.7
    assert int(window_offset(torch.tensor(0.3), 9, 9)) == 0


def test_an_unknown_curriculum_is_refused_and_the_known_ones_listed():
    with pytest.raises(InputError, match="curriculum 'cosine'.*linear, easy, hard, step"):
        window_progress("cosine", 0, 10)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_of_training_is_refused(step):
    with pytest.raises(InputError, match=f"step {step} .*10 steps"):
        window_progress("linear", step, 10)
