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


def with_draws(draws, keep_rate=0.4):
    reducer = RandomReducer(keep_rate)
    reducer.draws = draws
    return reducer


def test_what_an_image_keeps_follows_from_its_own_number_and_from_no_batch():
    draws = torch.tensor([5, 2**62 + 1, 5, 0, 9])
    tokens, local = torch.zeros(10, 16, 1), torch.zeros(15, 9, 1)
    state = torch.get_rng_state()
    whole = with_draws(draws)
    student, teacher = whole.pair(tokens, tokens, PROGRESS, 1)[:2]
    crops = whole.local(local, tokens, PROGRESS, 1).indices
    for images in ([0, 1], [3], [4, 2, 1]):
        part = with_draws(draws[images])
        selection = part.pair(torch.zeros(2 * len(images), 16, 1), torch.zeros(2 * len(images), 16, 1), PROGRESS, 1)
        for found, expected in zip(selection[:2], (student, teacher), strict=True):
            assert torch.equal(found.unflatten(0, (2, -1)), expected.unflatten(0, (2, 5))[:, images])
        found = part.local(torch.zeros(3 * len(images), 9, 1), tokens, PROGRESS, 1).indices
        assert torch.equal(found.unflatten(0, (3, -1)), crops.unflatten(0, (3, 5))[:, images])
    assert torch.equal(torch.get_rng_state(), state)


def test_numbered_subsets_are_uniform_and_independent_across_images_views_branches_and_stages():
    tokens = torch.zeros(8000, 5, 1)
    reducer = with_draws(torch.arange(4000))  # neighbours, as bad as numbers can be
    first, second = (reducer.pair(tokens, tokens, PROGRESS, stage) for stage in (0, 1))
    kept = [first.student, first.teacher, second.student, second.teacher]
    kept.append(reducer.local(tokens, tokens, PROGRESS, 0).indices)
    for indices in kept:
        pairs = (indices[:, 0] * 5 + indices[:, 1]).bincount()
        pairs = pairs[pairs > 0]
        # Ten equally likely pairs, 800 expected each with a standard deviation of 27.
        assert len(pairs) == 10 and (pairs - 800).abs().max() < 135

    def shared(one, other):
        return (one == other).all(1).float().mean()

    # One in ten by chance, standard deviation 0.0034.
    for index, one in enumerate(kept):
        assert abs(shared(one[:4000], one[4000:]) - 0.1) < 0.02
        assert abs(shared(one[1:], one[:-1]) - 0.1) < 0.02
        assert all(abs(shared(one, other) - 0.1) < 0.02 for other in kept[index + 1 :])
