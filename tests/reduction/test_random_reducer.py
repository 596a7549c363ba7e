# SPDX-License-Identifier: Apache-2.0
import torch

from hf_simprune.reduction import RandomReducer


PROGRESS = torch.tensor(0.5)


def test_every_row_of_every_group_keeps_k_distinct_ascending_tokens():
    tokens = torch.randn(6, 20, 2)
    reducer = RandomReducer(0.7)
    for kept in (*reducer.pair(tokens, tokens, PROGRESS)[:2], reducer.local(tokens[:, :9], tokens, PROGRESS).indices):
        assert kept.dtype == torch.int64
        assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0
    assert kept.shape == (6, 7) and kept.max() < 9


def test_subsets_are_uniform_and_independent_across_rows_and_branches():
    torch.manual_seed(0)
    tokens = torch.zeros(4000, 5, 1)
    selection = RandomReducer(0.4).pair(tokens, tokens, PROGRESS)
    for kept in selection[:2]:
        pairs = (kept[:, 0] * 5 + kept[:, 1]).bincount()
        pairs = pairs[pairs > 0]
        # Ten equally likely pairs, 400 expected each with a standard deviation of 19.
        assert len(pairs) == 10 and (pairs - 400).abs().max() < 95
    same = (selection.student == selection.teacher).all(1).float().mean()
    neighbours = (selection.student[1:] == selection.student[:-1]).all(1).float().mean()
    # One in ten by chance, standard deviation 0.005.
    assert abs(same - 0.1) < 0.03 and abs(neighbours - 0.1) < 0.03


def test_draws_repeat_with_torchs_seed_and_advance_without_it():
    tokens = torch.zeros(4, 50, 1)
    reducer = RandomReducer(0.5)
    torch.manual_seed(3)
    first = reducer.pair(tokens, tokens, PROGRESS)
    second = reducer.pair(tokens, tokens, PROGRESS)
    torch.manual_seed(3)
    again = reducer.pair(tokens, tokens, PROGRESS)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
    assert not torch.equal(first.student, second.student)


def test_keep_rate_one_keeps_all_and_draws_nothing():
    tokens = torch.zeros(2, 6, 1)
    state = torch.get_rng_state()
    selection = RandomReducer(1.0).pair(tokens, tokens, PROGRESS)
    assert torch.equal(torch.get_rng_state(), state)
    for kept in (*selection[:2], RandomReducer(1.0).local(tokens, tokens, PROGRESS).indices):
        assert torch.equal(kept, torch.arange(6).expand(2, 6))
