# SPDX-License-Identifier: Apache-2.0
"""SimPrune's selection against a reference written with plain loops."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hf_simprune.reduction import SimPruneReducer, keep_count
from hf_simprune.reduction.simprune import cosine_similarity, select_one_way


def cosine_table(queries, keys):
    """Cosines of two lists of vectors, in Python floats."""

    def unit(vector):
        norm = math.sqrt(sum(x * x for x in vector))
        return [x / norm if norm else 0.0 for x in vector]

    queries, keys = [unit(q) for q in queries.tolist()], [unit(k) for k in keys.tolist()]
    return [[sum(a * b for a, b in zip(q, k, strict=True)) for k in keys] for q in queries]


def ranking(values):
    """Indices by falling value; Python's sort is stable, so equal values keep their order."""
    return sorted(range(len(values)), key=lambda i: -values[i])


def reference_pair(table, keep, offset, matching):
    """Kept student and teacher indices for one image pair, from a square table of cosines."""
    count = len(table)
    columns = [[row[j] for row in table] for j in range(count)]
    student_order = ranking([max(row) for row in table])
    teacher_order = ranking([max(column) for column in columns])
    student = student_order[offset : offset + keep]
    if matching == "symmetric":
        return sorted(student), sorted(teacher_order[offset : offset + keep])
    pruned = set(range(count)) - set(student)
    voted = {table[i].index(max(table[i])) for i in pruned}
    keys = []
    for j in range(count):
        rank = teacher_order.index(j)
        edge = max(offset - rank, rank - (offset + keep - 1))
        friend = columns[j].index(max(columns[j]))
        keys.append(4 * (j in voted) + 2 * (friend in pruned) + edge / (count + 1))
    return sorted(student), sorted(ranking(keys)[count - keep :])


def reference_local(local, teacher_views, keep, offset):
    """Kept indices of one local crop (n, D) given both teacher views (N, D) of its image."""
    tables = [cosine_table(local, view) for view in teacher_views]
    scores = [sum(max(table[i]) for table in tables) / 2 for i in range(len(local))]
    return sorted(ranking(scores)[offset : offset + keep])


def views(images, count, width, seed, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2 * images, count, width, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2 * images, count, width, generator=generator, dtype=torch.float64)
    return student.to(**kwargs), teacher.to(**kwargs)


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("count", "keep_rate"), [(4, 0.25), (9, 0.7), (16, 0.8), (25, 0.5)])
def test_pairs_equal_the_loop_reference(matching, progress, count, keep_rate):
    images = 3
    student, teacher = views(images, count, 6, seed=count)
    selection = SimPruneReducer(keep_rate, matching=matching).pair(student, teacher, torch.tensor(progress))
    keep = math.ceil(keep_rate * count - 1e-9)
    offset = round(progress * (count - keep))
    for row in range(2 * images):
        partner = (row + images) % (2 * images)
        table = cosine_table(student[row], teacher[partner])
        expected_student, expected_teacher = reference_pair(table, keep, offset, matching)
        assert selection.student[row].tolist() == expected_student
        assert selection.teacher[partner].tolist() == expected_teacher


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kinds", [1, 3, 6])
def test_ties_are_settled_like_the_loop_reference(matching, progress, kinds):
    """Tokens drawn from a few unit vectors: all cosines are exactly 0 or 1, most ranks are tied."""
    images, count, keep = 4, 15, 9
    generator = torch.Generator().manual_seed(kinds)
    student, teacher = (torch.eye(8)[torch.randint(kinds, (2 * images, count), generator=generator)] for _ in "ab")
    selection = SimPruneReducer(keep / count, matching=matching).pair(student, teacher, torch.tensor(progress))
    offset = round(progress * (count - keep))
    for row in range(2 * images):
        partner = (row + images) % (2 * images)
        table = (student[row] @ teacher[partner].T).tolist()
        expected_student, expected_teacher = reference_pair(table, keep, offset, matching)
        assert selection.student[row].tolist() == expected_student
        assert selection.teacher[partner].tolist() == expected_teacher


def test_coarse_similarities_are_settled_like_the_loop_reference():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(0, 5, (40, 12, 12), generator=generator).float() / 4
    for keep in (1, 5, 11, 12):
        for offset in range(12 - keep + 1):
            student, teacher = select_one_way(similarity, keep, torch.tensor(offset))
            for row in range(len(similarity)):
                expected = reference_pair(similarity[row].tolist(), keep, offset, "one_way")
                assert (student[row].tolist(), teacher[row].tolist()) == expected


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_local_crops_equal_the_loop_reference(progress):
    images, crops, count, patches, keep = 3, 4, 9, 16, 7
    _, teacher = views(images, patches, 5, seed=1)
    local = torch.randn(crops * images, count, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = SimPruneReducer(keep / count).local(local, teacher, torch.tensor(progress)).indices
    assert kept.shape == (crops * images, keep)
    for row in range(crops * images):
        image = row % images
        both = (teacher[image], teacher[images + image])
        assert kept[row].tolist() == reference_local(local[row], both, keep, round(progress * (count - keep)))


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
def test_both_branches_keep_exactly_k_distinct_tokens(matching):
    for count in (1, 2, 5, 36, 49, 100):
        for keep_rate in (0.01, 0.3, 0.55, 0.7, 0.8, 0.999, 1.0):
            student, teacher = views(1, count, 4, seed=count, dtype=torch.float32)
            reducer = SimPruneReducer(keep_rate, matching=matching)
            kept = [
                *reducer.pair(student, teacher, torch.tensor(0.6))[:2],
                reducer.local(student, teacher, torch.tensor(0.6)).indices,
            ]
            for indices in kept:
                assert indices.dtype == torch.int64
                assert indices.shape == (2, keep_count(count, keep_rate))
                assert (indices >= 0).all() and (indices < count).all()
                assert (indices.diff(dim=1) > 0).all()


def test_one_way_prunes_the_match_of_every_pruned_student_token():
    images, count = 4, 49
    student, teacher = views(images, count, 8, seed=5)
    for keep_rate in (0.3, 0.5, 0.8):
        for progress in (0.0, 0.5, 1.0):
            selection = SimPruneReducer(keep_rate).pair(student, teacher, torch.tensor(progress))
            for row in range(2 * images):
                partner = (row + images) % (2 * images)
                match = cosine_similarity(student[row], teacher[partner]).argmax(1)
                pruned = sorted(set(range(count)) - set(selection.student[row].tolist()))
                assert not set(match[pruned].tolist()) & set(selection.teacher[partner].tolist())


def test_the_window_moves_from_pruning_dissimilar_to_pruning_similar_tokens():
    student, teacher = views(2, 20, 16, seed=6)
    best = cosine_similarity(student, teacher.roll(2, 0)).amax(2)
    early = SimPruneReducer(0.5).pair(student, teacher, torch.tensor(0.0)).student
    late = SimPruneReducer(0.5).pair(student, teacher, torch.tensor(1.0)).student
    for row in range(4):
        assert set(early[row].tolist()) == set(best[row].topk(10).indices.tolist())
        assert set(late[row].tolist()) == set(best[row].topk(10, largest=False).indices.tolist())


def test_keep_rate_one_keeps_every_token_in_order():
    student, teacher = views(2, 9, 4, seed=0)
    for matching in ("one_way", "symmetric"):
        reducer = SimPruneReducer(1.0, matching=matching)
        for kept in (
            *reducer.pair(student, teacher, torch.tensor(0.5))[:2],
            reducer.local(student, teacher, torch.tensor(0.5)).indices,
        ):
            assert torch.equal(kept, torch.arange(9).expand(4, 9))


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
def test_selection_follows_a_permutation_of_the_tokens(matching):
    images, count = 3, 30
    student, teacher = views(images, count, 12, seed=8)
    generator = torch.Generator().manual_seed(9)
    shuffle_student, shuffle_teacher = (torch.randperm(count, generator=generator) for _ in "ab")
    reducer, progress = SimPruneReducer(0.6, matching=matching), torch.tensor(0.4)
    plain = reducer.pair(student, teacher, progress)
    shuffled = reducer.pair(student[:, shuffle_student], teacher[:, shuffle_teacher], progress)
    assert torch.equal(shuffle_student[shuffled.student].sort(1).values, plain.student)
    assert torch.equal(shuffle_teacher[shuffled.teacher].sort(1).values, plain.teacher)
    local = reducer.local(student, teacher, progress).indices
    assert torch.equal(
        shuffle_student[reducer.local(student[:, shuffle_student], teacher, progress).indices].sort(1).values, local
    )


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
def test_bf16_autocast_changes_no_index(matching):
    student, teacher = views(4, 64, 32, seed=11, dtype=torch.float32)
    reducer, progress = SimPruneReducer(0.7, matching=matching), torch.tensor(0.5)
    plain = (*reducer.pair(student, teacher, progress)[:2], reducer.local(student, teacher, progress).indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (student[0] @ teacher[0].T).dtype == torch.bfloat16
        mixed = (*reducer.pair(student, teacher, progress)[:2], reducer.local(student, teacher, progress).indices)
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


def test_cosines_are_fp32_for_short_types_and_stay_fp64():
    student, teacher = views(1, 5, 8, seed=12)
    exact = torch.nn.functional.cosine_similarity(student[:, :, None], teacher[:, None], dim=-1)
    for dtype, precision, tolerance in (
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.float16, torch.float32, 2e-3),
        (torch.bfloat16, torch.float32, 2e-2),
    ):
        similarity = cosine_similarity(student.to(dtype), teacher.to(dtype))
        assert similarity.dtype == precision
        assert (similarity.double() - exact).abs().max() < tolerance


def test_short_types_select_as_their_values_in_fp32():
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = views(3, 49, 16, seed=13, dtype=dtype)
        reducer, progress = SimPruneReducer(0.7), torch.tensor(0.3)
        for a, b in zip(
            reducer.pair(student, teacher, progress)[:2],
            reducer.pair(student.float(), teacher.float(), progress)[:2],
            strict=True,
        ):
            assert torch.equal(a, b)


def test_zero_and_non_finite_tokens_still_give_k_valid_indices():
    student, teacher = views(2, 10, 4, seed=14, dtype=torch.float32)
    student[:, 3] = 0
    assert torch.equal(cosine_similarity(student, teacher)[:, 3], torch.zeros(4, 10))
    for bad in (0.0, float("nan"), float("inf")):
        student[0] = bad
        for matching in ("one_way", "symmetric"):
            for kept in SimPruneReducer(0.6, matching=matching).pair(student, teacher, torch.tensor(0.5))[:2]:
                assert kept.shape == (4, 6)
                assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < 10


def test_selection_records_no_gradient_and_leaves_its_inputs_alone():
    student, teacher = views(2, 12, 4, seed=15)
    student.requires_grad_()
    before = student.detach().clone(), teacher.clone()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        reducer = SimPruneReducer(0.5)
        kept = (
            *reducer.pair(student, teacher, torch.tensor(0.5))[:2],
            reducer.local(student, teacher, torch.tensor(0.5)).indices,
        )
    assert not saved and not any(indices.requires_grad for indices in kept)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
def test_a_moving_window_compiles_once_without_graph_breaks(matching):
    student, teacher = views(2, 16, 8, seed=16, dtype=torch.float32)
    reducer = SimPruneReducer(0.7, matching=matching)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t, p: (*reducer.pair(s, t, p)[:2], reducer.local(s, t, p).indices), backend=counter, fullgraph=True
    )
    for progress in (0.0, 0.25, 0.5, 1.0):
        p = torch.tensor(progress)
        eager = (*reducer.pair(student, teacher, p)[:2], reducer.local(student, teacher, p).indices)
        for a, b in zip(compiled(student, teacher, p), eager, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
