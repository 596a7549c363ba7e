"""Which patches left at which stage, recorded at three moments of a run."""

import torch

from hf_simprune.dino.snapshots import MOMENTS, moment_steps, stage_dropped


def test_moments_coincide_in_short_runs_and_none_is_lost():
    assert moment_steps(101) == {0: ("start",), 50: ("middle",), 100: ("end",)}
    assert moment_steps(2) == {0: ("start", "middle"), 1: ("end",)}
    assert moment_steps(1) == {0: MOMENTS}


def test_stages_are_followed_back_to_the_first_grid():
    kept = [torch.tensor([[0, 2, 3, 5, 6], [1, 2, 3, 4, 7]]), torch.tensor([[1, 2, 4], [0, 1, 3]])]
    # first row: 1, 4, 7 leave first; of 0 2 3 5 6 the 1st, 2nd and 4th stay: 2, 3, 6
    # second row: 0, 5, 6 leave first; of 1 2 3 4 7 there stay 1, 2, 4
    assert stage_dropped(kept, 8).tolist() == [[2, 1, 0, 0, 1, 2, 0, 1], [1, 0, 0, 2, 0, 1, 1, 2]]
