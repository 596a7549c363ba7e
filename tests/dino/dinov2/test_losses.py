"""KoLeo, the masked-patch loss and Sinkhorn-Knopp against loops; Sinkhorn-Knopp on two ranks against one."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_simprune.dino.dinov2.losses import koleo_loss, masked_patch_loss, sinkhorn_targets


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_koleo(features):
    rows = [row / row.norm() for row in features]
    total = 0.0
    for i, row in enumerate(rows):
        nearest = max((j for j in range(len(rows)) if j != i), key=lambda j: float(row.detach() @ rows[j].detach()))
        total = total - torch.log((row - rows[nearest] + 1e-8).norm() + 1e-8)
    return total / len(rows)


@pytest.mark.parametrize("rows", [2, 3, 9])
def test_koleo_equals_a_loop_and_so_does_its_gradient(rows):
    features = randn(rows, 5, seed=rows).requires_grad_()
    loss = koleo_loss(features)
    (gradient,) = torch.autograd.grad(loss, features)
    expected = naive_koleo(features)
    (expected_gradient,) = torch.autograd.grad(expected, features)
    assert abs(loss - expected).item() < 1e-12
    assert (gradient - expected_gradient).abs().max() < 1e-10


def test_koleo_falls_as_features_spread_and_is_finite_for_equal_ones():
    close = torch.ones(4, 8, dtype=torch.float64) + 0.01 * randn(4, 8)
    assert koleo_loss(randn(4, 8)) < koleo_loss(close)
    assert math.isfinite(koleo_loss(torch.ones(4, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        assert koleo_loss(randn(4, 8).bfloat16()).dtype == torch.float32


def naive_patch_loss(student, targets, mask_of, temperature):
    """`mask_of[v]` lists the rows that are masked patches of view v."""
    total = 0.0
    for rows in mask_of:
        view = 0.0
        for m in rows:
            logs = student[m] / temperature - torch.log(torch.exp(student[m] / temperature).sum())
            view = view - sum(targets[m, k] * logs[k] for k in range(student.shape[1]))
        total = total + (view / len(rows) if rows else 0.0)
    return total / len(mask_of)


def test_the_patch_loss_is_the_mean_over_views_of_the_mean_over_their_masked_patches():
    student = randn(6, 7).requires_grad_()
    targets = randn(6, 7, seed=1).softmax(-1)
    mask_of = [[0, 1, 2, 3], [], [4], [5]]
    weights = torch.tensor([1 / 4] * 4 + [1.0, 1.0], dtype=torch.float64)
    loss = masked_patch_loss(student, targets, weights, 4, 0.1)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = naive_patch_loss(student, targets, mask_of, 0.1)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert abs(loss - expected).item() < 1e-12
    assert (gradient - expected_gradient).abs().max() < 1e-12


def test_no_masked_patch_gives_zero_and_zero_gradients():
    head = torch.nn.Linear(3, 7)
    loss = masked_patch_loss(head(torch.zeros(0, 3)), torch.zeros(0, 7), torch.zeros(0), 4, 0.1)
    loss.backward()
    assert loss == 0 and head.weight.grad.abs().max() == 0


def naive_sinkhorn(logits, temperature, iterations=3):
    """As written in SwAV and DINOv2: exponentials, prototypes first."""
    rows, prototypes = logits.shape
    q = [[math.exp(float(logits[b, k]) / temperature) for b in range(rows)] for k in range(prototypes)]
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        q = [[value / sum(row) / prototypes for value in row] for row in q]
        columns = [sum(row[b] for row in q) for b in range(rows)]
        q = [[row[b] / columns[b] / rows for b in range(rows)] for row in q]
    return torch.tensor([[q[k][b] * rows for k in range(prototypes)] for b in range(rows)], dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_sinkhorn_equals_the_published_loop(rows):
    logits = randn(rows, 6, seed=rows)
    found = sinkhorn_targets(logits, 0.07)
    expected = naive_sinkhorn(logits, 0.07)
    assert (found.probabilities - expected).abs().max() < 1e-12
    assert (found.probabilities.sum(1) - 1).abs().max() < 1e-12
    entropy = -(expected * expected.clamp_min(1e-300).log()).sum(1).mean()
    assert abs(found.entropy - entropy) < 1e-12


def test_sinkhorn_evens_out_prototypes_and_survives_sharp_temperatures_in_fp32():
    logits = randn(64, 4, dtype=torch.float32)
    logits[:, 0] += 3  # one prototype that plain softmax would always choose
    targets = sinkhorn_targets(logits, 0.5).probabilities
    assert (targets.sum(0) / 16 - 1).abs().max() < 0.1
    assert logits.softmax(1).sum(0)[0] > 40
    # plain exponentials of these would all be 0 in the second row
    far = torch.tensor([[1.0, -1.0], [-9.0, -9.1]])
    assert sinkhorn_targets(far, 0.02).probabilities.isfinite().all()


def test_sinkhorn_of_no_rows_is_empty():
    found = sinkhorn_targets(torch.zeros(0, 4), 0.04)
    assert found.probabilities.shape == (0, 4) and found.entropy == 0


def _rank(rank, folder, splits):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for logits in splits:
        results.append(sinkhorn_targets(logits[rank], 0.05).probabilities)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sinkhorn_on_two_ranks_equals_one_process_whatever_each_has(tmp_path):
    wholes = [randn(9, 5, seed=seed) for seed in range(3)] + [randn(4, 5, seed=9), randn(0, 5)]
    cuts = [4, 2, 8, 0, 0]  # rows of the first rank; the last but one leaves it without any
    splits = [(whole[:cut], whole[cut:]) for whole, cut in zip(wholes, cuts, strict=True)]
    mp.start_processes(_rank, (str(tmp_path), splits), nprocs=2, start_method="fork")
    found = [torch.cat(parts) for parts in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True)]
    for whole, targets in zip(wholes, found, strict=True):
        assert targets.shape == whole.shape
        if len(whole):
            assert (targets - sinkhorn_targets(whole, 0.05).probabilities).abs().max() < 1e-12
