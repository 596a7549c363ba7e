"""Exact and greedy pairings against brute force."""

import itertools

import _matchings
import pytest
import torch


def cosines(pairs: int, count: int, seed: int = 0, ties: bool = False) -> torch.Tensor:
    values = torch.rand(pairs, count, count, generator=torch.Generator().manual_seed(seed))
    return (values * 4).round() / 4 if ties else values


@pytest.mark.parametrize("ties", [False, True])
def test_greedy_takes_the_best_pair_that_is_left(ties):
    similarity = cosines(3, 7, ties=ties)
    match = _matchings.match_greedy(similarity)
    for pair in range(3):
        students, teachers, expected = set(range(7)), set(range(7)), {}
        while students:
            best = max((similarity[pair, s, t].item(), -s, -t) for s in students for t in teachers)
            expected[-best[1]] = -best[2]
            students.remove(-best[1])
            teachers.remove(-best[2])
        assert match[pair].tolist() == [expected[s] for s in range(7)]


def test_hungarian_has_the_largest_sum_of_all_pairings():
    similarity = cosines(3, 6)
    match = _matchings.match_hungarian(similarity)
    for pair in range(3):
        best = max(sum(similarity[pair, s, t] for s, t in enumerate(p)) for p in itertools.permutations(range(6)))
        assert sum(similarity[pair, s, t] for s, t in enumerate(match[pair])).item() == pytest.approx(best.item())
        assert sorted(match[pair].tolist()) == list(range(6))


@pytest.mark.parametrize("name", ["greedy", "hungarian"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_whole_pairs_are_kept_by_the_rank_of_their_cosine(name, offset):
    similarity, keep = cosines(4, 8, seed=5), 5
    student, teacher = _matchings.SELECTIONS[name](similarity, keep, torch.tensor(offset))
    match = _matchings.matches(name, similarity)
    for pair in range(4):
        cosine = [similarity[pair, s, match[pair, s]].item() for s in range(8)]
        kept = sorted(sorted(range(8), key=lambda s: -cosine[s])[offset : offset + keep])
        assert student[pair].tolist() == kept
        assert teacher[pair].tolist() == sorted(match[pair, s].item() for s in kept)


@pytest.mark.parametrize("offset", [0, 2, 4])
def test_without_a_top_up_the_teacher_loses_the_different_partners_only(offset):
    similarity, keep = cosines(6, 10, seed=7), 6
    left = _matchings.teacher_left(similarity, keep, torch.tensor(offset))
    for pair in range(6):
        best = similarity[pair].max(dim=1).values.tolist()
        order = sorted(range(10), key=lambda s: -best[s])
        pruned = order[:offset] + order[offset + keep :]
        assert left[pair].item() == 10 - len({similarity[pair, s].argmax().item() for s in pruned})
    assert (left >= keep).all() and (left > keep).any()
