# SPDX-License-Identifier: Apache-2.0
"""Token maps against plain loops: what comes out, where every token went, how to go back, what flows backward."""

import pytest
import torch

from hf_simprune.reduction import Fused, Kept, Merged, Unchanged


ROWS, COUNT, WIDTH = 3, 7, 4


def random_kept(keep=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(COUNT, generator=generator) for _ in range(ROWS)])
    return order[:, :keep].sort(1).values, order[:, keep:].sort(1).values


def kept_map():
    return Kept(random_kept()[0], COUNT)


def fused_map():
    kept, dropped = random_kept()
    return Fused(kept, dropped, torch.rand(dropped.shape, generator=torch.Generator().manual_seed(1)))


def merged_map():
    """Groups of 1 to 4 tokens, other ones in every row, with uneven weights."""
    group_of = torch.tensor([[0, 1, 2, 0, 1, 0, 2], [2, 2, 2, 1, 0, 2, 1], [0, 1, 1, 1, 1, 2, 0]])
    weights = torch.rand(ROWS, COUNT, generator=torch.Generator().manual_seed(2)) + 0.1
    for row in range(ROWS):
        for group in range(3):
            weights[row, group_of[row] == group] /= weights[row, group_of[row] == group].sum()
    return Merged(group_of, weights, 3)


MAPS = {"kept": kept_map, "fused": fused_map, "merged": merged_map}


def apply_by_loop(found, patches):
    """List of output tokens of every row, in Python sums over the tokens' fp64 values."""
    rows = []
    for row, tokens in enumerate(patches.double()):
        if isinstance(found, Merged):
            out = [torch.zeros(patches.shape[-1], dtype=torch.float64) for _ in range(found.kept)]
            for i, token in enumerate(tokens):
                out[found.group_of[row, i]] += found.weights[row, i].double() * token
        else:
            out = [tokens[i] for i in found.indices[row]]
        if isinstance(found, Fused):
            parts = [a.double() * tokens[i] for i, a in zip(found.dropped[row], found.weights[row], strict=True)]
            out.append(sum(parts))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def patches_of(dtype=torch.float32, seed=5):
    return torch.randn(ROWS, COUNT, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_applied_maps_equal_the_loop_in_every_precision(name, dtype):
    found, patches = MAPS[name](), patches_of(dtype)
    applied = found.apply(patches)
    assert applied.dtype == dtype and found.count == COUNT
    # Sums are taken in fp32 or better and rounded once: the nearest number of the dtype, but for a last-bit tie.
    torch.testing.assert_close(applied.double(), apply_by_loop(found, patches), rtol=torch.finfo(dtype).eps, atol=2e-7)


@pytest.mark.parametrize("name", ["fused", "merged"])
def test_sums_under_autocast_are_not_rounded_to_bf16(name):
    found, patches = MAPS[name](), patches_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        applied = found.apply(patches)
    assert applied.dtype == torch.float32
    torch.testing.assert_close(applied.double(), apply_by_loop(found, patches), rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("name", MAPS)
def test_one_map_applies_to_vectors_of_any_width(name):
    found, wide = MAPS[name](), torch.randn(ROWS, COUNT, 11)
    torch.testing.assert_close(found.apply(wide).double(), apply_by_loop(found, wide), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.apply(wide[..., :1]), found.apply(wide)[..., :1])


@pytest.mark.parametrize("name", MAPS)
def test_gradients_are_those_of_finite_differences(name):
    found, patches = MAPS[name](), patches_of(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(found.apply, (patches,))
    assert torch.autograd.gradcheck(lambda x: found.restore(found.apply(x), x), (patches,))


def test_gradients_of_kept_tokens_stay_with_them_and_merged_ones_share_by_weight():
    kept, patches = kept_map(), patches_of().requires_grad_()
    kept.apply(patches).sum().backward()
    assert torch.equal(patches.grad.sum(-1) > 0, kept.groups() >= 0)
    merged, patches = merged_map(), patches_of().requires_grad_()
    merged.apply(patches).sum().backward()
    torch.testing.assert_close(patches.grad, merged.weights.unsqueeze(-1).expand_as(patches))


@pytest.mark.parametrize("name", ["kept", "fused"])
def test_groups_say_where_every_kept_token_went_and_minus_one_for_the_dropped(name):
    found = MAPS[name]()
    for row in range(ROWS):
        kept = found.indices[row].tolist()
        assert found.groups()[row].tolist() == [kept.index(i) if i in kept else -1 for i in range(COUNT)]
    assert found.groups().dtype == torch.int64


@pytest.mark.parametrize("name", ["kept", "fused"])
def test_restored_tokens_are_the_kept_ones_and_the_dropped_as_they_left(name):
    found, before = MAPS[name](), patches_of()
    after = found.apply(before) + 100
    restored = found.restore(after, before)
    for row in range(ROWS):
        kept = found.indices[row].tolist()
        for i in range(COUNT):
            expected = after[row, kept.index(i)] if i in kept else before[row, i]
            assert torch.equal(restored[row, i], expected)


def test_restored_tokens_of_a_merge_are_copies_of_their_group():
    found, before = merged_map(), patches_of()
    after = found.apply(before) + 100
    restored = found.restore(after, before)
    for row in range(ROWS):
        for i in range(COUNT):
            assert torch.equal(restored[row, i], after[row, found.group_of[row, i]])


def test_sizes_follow_the_tokens():
    sizes = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7]]).repeat(ROWS, 1)
    kept, fused, merged = kept_map(), fused_map(), merged_map()
    assert kept.sizes(None) is None and fused.sizes(None) is None
    for row in range(ROWS):
        stay = [1.0 + i for i in kept.indices[row].tolist()]
        assert kept.sizes(sizes)[row].tolist() == stay
        assert fused.sizes(sizes)[row].tolist() == [*stay, 28 - sum(stay)]
        for given, of in ((sizes, lambda i: 1.0 + i), (None, lambda i: 1.0)):
            groups = merged.group_of[row].tolist()
            expected = [sum(of(i) for i in range(COUNT) if groups[i] == group) for group in range(3)]
            assert merged.sizes(given)[row].tolist() == expected


def test_keeping_everything_changes_nothing():
    patches, sizes = patches_of(torch.bfloat16), torch.rand(ROWS, COUNT)
    everything = torch.arange(COUNT).repeat(ROWS, 1)
    for found in (Kept(everything, COUNT), Unchanged(patches)):
        assert torch.equal(found.apply(patches), patches) and torch.equal(found.groups(), everything)
        assert torch.equal(found.restore(patches + 1, patches), patches + 1)
        assert torch.equal(found.sizes(sizes), sizes) and found.sizes(None) is None
    assert Unchanged(patches).grid((1, COUNT)) == (1, COUNT)


def test_a_token_alone_in_its_group_passes_a_merge_unchanged():
    group_of = torch.tensor([[1, 0, 2, 2]])
    patches = torch.randn(1, 4, 8).bfloat16()
    merged = Merged(group_of, torch.tensor([[1.0, 1.0, 0.5, 0.5]]), 3).apply(patches)
    assert torch.equal(merged[0, :2], patches[0, [1, 0]])


def test_tokens_that_are_not_contiguous_are_mapped_alike():
    patches = torch.randn(COUNT, ROWS, WIDTH).transpose(0, 1)
    for make in MAPS.values():
        assert torch.equal(make().apply(patches), make().apply(patches.contiguous()))
