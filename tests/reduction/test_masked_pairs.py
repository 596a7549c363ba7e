"""SimPrune's selection with masked student tokens, against loops that decide token by token."""

import itertools
import math

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.reduction import SimPruneReducer
from hf_simprune.reduction.masked_pairs import (
    pair_masked,
    paired_cosines,
    select_masked_pairs,
    validate_masked_policy,
)
from hf_simprune.reduction.simprune import cosine_similarity, select_one_way, select_symmetric


def naive_student(scores, masked, keep, offset, policy):
    """Kept tokens of one row; `scores` are those tokens are ranked by."""
    tokens = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if policy == "keep":
        others = [i for i in tokens if not masked[i]]
        tokens = others[:offset] + [i for i in tokens if masked[i]] + others[offset:]
    return sorted(tokens[offset : offset + keep])


def naive_teacher(cross, student_kept, other_masked, other_kept, partner, keep, offset, one_way):
    """Kept tokens of one teacher row: `cross[i][j]` to the other view's student, whose flags are `other_…`."""
    count = len(cross)
    forced = {partner[i]: i in student_kept for i in range(count) if partner[i] >= 0}
    free = [j for j in range(count) if j not in forced]
    leaving = count - keep - sum(not stays for stays in forced.values())
    start = math.floor(offset * leaving / (count - keep) + 0.5)
    visible = [i for i in range(count) if not other_masked[i]]
    best = {j: max((cross[i][j] for i in visible), default=-math.inf) for j in free}
    votes = set()
    for i in visible:
        if i not in other_kept:
            votes.add(max(range(count), key=lambda j: (cross[i][j], -j)))
    ranked = sorted(free, key=lambda j: (-best[j], j))
    key = {}
    for rank, j in enumerate(ranked):
        edge = max(start - rank, rank - (start + len(free) - leaving - 1))
        key[j] = edge
        if one_way:
            match = max(visible, key=lambda i: (cross[i][j], -i)) if visible else None
            key[j] += (4 * (j in votes) + 2 * (match is not None and match not in other_kept)) * (count + 1)
    leave = sorted(free, key=lambda j: (-key[j], j))[:leaving]
    return sorted([j for j in free if j not in leave] + [j for j, stays in forced.items() if stays])


def naive(cross, same, partner, keep, offset, policy, one_way):
    rows, count = partner.shape
    cross, same, partner = cross.tolist(), same.tolist(), partner.tolist()
    masked = [[p >= 0 for p in row] for row in partner]
    student, teacher = [], []
    for r in range(rows):
        scores = [same[r][i] if masked[r][i] else max(cross[r][i]) for i in range(count)]
        student.append(naive_student(scores, masked[r], keep, offset, policy))
    for t in range(rows):
        s = (t + rows // 2) % rows
        teacher.append(naive_teacher(cross[s], student[t], masked[s], student[s], partner[t], keep, offset, one_way))
    return student, teacher


def random_case(seed, count=9, images=3, levels=4, most=6):
    """Coarse similarities, so that ranks tie, and some masked tokens with partners in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * images
    cross = torch.randint(levels, (rows, count, count), generator=generator) / levels
    same = torch.randint(levels, (rows, count), generator=generator) / levels
    partner = torch.full((rows, count), -1)
    for row in range(rows):
        number = int(torch.randint(most + 1, (), generator=generator))
        where = torch.randperm(count, generator=generator)[:number]
        partner[row, where] = torch.randperm(count, generator=generator)[:number]
    return cross, same, partner


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize("policy", ["pair", "keep"])
def test_the_selection_equals_the_loops_with_tied_similarities(policy, one_way):
    for seed, keep, share in itertools.product(range(12), (3, 7), (0.0, 0.5, 1.0)):
        cross, same, partner = random_case(seed, most=9 if seed % 3 == 0 else 5)
        offset = torch.tensor(round(share * (9 - keep)))
        found = select_masked_pairs(cross, same, partner, keep, offset, policy, one_way)
        student, teacher = naive(cross, same, partner, keep, int(offset), policy, one_way)
        assert found.student.tolist() == student, (seed, keep, share)
        assert found.teacher.tolist() == teacher, (seed, keep, share)


@pytest.mark.parametrize("policy", ["pair", "keep"])
def test_a_masked_token_and_its_partner_share_their_fate_and_counts_are_exact(policy):
    for seed in range(20):
        cross, same, partner = random_case(seed)
        found = select_masked_pairs(cross, same, partner, 5, torch.tensor(2), policy)
        for row in range(len(partner)):
            assert len(set(found.student[row].tolist())) == len(set(found.teacher[row].tolist())) == 5
            for token, place in enumerate(partner[row].tolist()):
                if place >= 0:
                    assert (token in found.student[row]) == (place in found.teacher[row])


def test_policy_keep_loses_no_masked_token_while_there_are_places():
    for seed, offset in itertools.product(range(20), range(5)):
        cross, same, partner = random_case(seed, most=5)
        found = select_masked_pairs(cross, same, partner, 5, torch.tensor(offset), "keep")
        for row in range(len(partner)):
            kept = set(found.student[row].tolist())
            masked = {i for i, place in enumerate(partner[row].tolist()) if place >= 0}
            assert masked <= kept


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_without_masked_tokens_it_is_the_selection_of_simprune(matching, progress):
    generator = torch.Generator().manual_seed(3)
    reducer = SimPruneReducer(0.6, matching=matching)
    student, teacher = (torch.randn(6, 11, 5, generator=generator) for _ in range(2))
    nobody = torch.full((6, 11), -1)
    found = pair_masked(reducer, student, teacher, nobody, torch.tensor(progress), "pair")
    expected = reducer.pair(student, teacher, torch.tensor(progress))
    assert torch.equal(found.student, expected.student) and torch.equal(found.teacher, expected.teacher)
    ties = torch.randint(3, (6, 9, 9), generator=generator).float()
    select = select_one_way if matching == "one_way" else select_symmetric
    student_keep, teacher_keep = select(ties, 5, torch.tensor(2))
    found = select_masked_pairs(
        ties, ties[:, 0], torch.full((6, 9), -1), 5, torch.tensor(2), "pair", matching == "one_way"
    )
    assert torch.equal(found.student, student_keep) and torch.equal(found.teacher.roll(3, 0), teacher_keep)


def test_tokens_are_compared_with_the_right_view_and_position():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 8, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    partner = torch.full((4, 8), -1)
    partner[0, 2], partner[0, 5], partner[3, 1] = 6, 0, 1
    reducer = SimPruneReducer(0.5)
    found = pair_masked(reducer, student, teacher, partner, torch.tensor(0.5), "pair")

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm())).item()

    cross, same = torch.zeros(4, 8, 8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)
    for r, i, j in itertools.product(range(4), range(8), range(8)):
        cross[r, i, j] = cosine(student[r, i], teacher[(r + 2) % 4, j])
        if partner[r, i] >= 0:
            same[r, i] = cosine(student[r, i], teacher[r, partner[r, i]])
    assert (paired_cosines(student, teacher, partner) - same)[partner >= 0].abs().max() < 1e-12
    assert (cosine_similarity(student, teacher.roll(2, 0)) - cross).abs().max() < 1e-12
    student_kept, teacher_kept = naive(cross, same, partner, 4, 2, "pair", True)
    assert found.student.tolist() == student_kept and found.teacher.tolist() == teacher_kept


def test_keep_rate_one_keeps_all_and_nothing_has_a_gradient():
    tokens = torch.randn(2, 5, 4, requires_grad=True)
    partner = torch.tensor([[0, -1, -1, -1, 4]] * 2)
    found = pair_masked(SimPruneReducer(1.0), tokens, tokens, partner, torch.tensor(0.0), "pair")
    assert found.student.tolist() == found.teacher.tolist() == [[0, 1, 2, 3, 4]] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert paired_cosines(tokens.bfloat16(), tokens.bfloat16(), partner).dtype == torch.float32


def test_an_unknown_policy_is_refused():
    with pytest.raises(InputError, match="--masked_policy drop is unknown: choose one of pair, keep"):
        validate_masked_policy("drop")
