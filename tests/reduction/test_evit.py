# SPDX-License-Identifier: Apache-2.0
"""EViT's selection and fused token against a reference written with plain loops."""

import math

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.reduction import BranchWalk, EViTReducer, Fused, ReductionSetting, ReductionStep, Seen, Unchanged

from .published_cost import GRID, flop_share


SETTING = ReductionSetting(layers=(3, 6, 9))


def seen_of(patches, attention, prefix=1, stage=0):
    return Seen(patches, attention, None, None, stage, prefix, None)


def random_row(rows, count, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(rows, count, width, generator=generator)
    attention = torch.randn(rows, count + 1, generator=generator).softmax(-1)[:, 1:]
    return patches, attention


def reference(patches, attention, keep_rate, fuse):
    """Kept indices and tokens that go on, for one row (n, D) and its scores (n,)."""
    count = len(attention)
    keep = math.ceil(keep_rate * count - 1e-9)
    best_first = sorted(range(count), key=lambda i: (-attention[i].item(), i))
    kept, dropped = sorted(best_first[:keep]), best_first[keep:]
    tokens = [patches[i].double() for i in kept]
    if fuse and dropped:
        fused = torch.zeros(patches.shape[1], dtype=torch.float64)
        for i in dropped:
            fused += attention[i].double() * patches[i].double()
        tokens.append(fused)
    return kept, torch.stack(tokens)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(("count", "keep_rate"), [(16, 0.8), (25, 0.7), (9, 0.5), (7, 0.1), (2, 0.8), (1, 0.5)])
def test_kept_and_fused_tokens_equal_the_loop_reference(fuse, count, keep_rate):
    patches, attention = random_row(4, count, seed=count)
    reducer = EViTReducer(keep_rate, SETTING, fuse=fuse)
    found = reducer.decide(seen_of(patches, attention))
    applied = found.apply(patches)
    assert applied.shape[1] == reducer.counts((1, count))[1]
    for row in range(4):
        kept, tokens = reference(patches[row], attention[row], keep_rate, fuse)
        assert found.groups()[row].tolist() == [kept.index(i) if i in kept else -1 for i in range(count)]
        torch.testing.assert_close(applied[row].double(), tokens, rtol=1e-6, atol=1e-6)


def test_equal_attention_keeps_the_lower_index():
    attention = torch.tensor([[0.1, 0.2, 0.1, 0.2, 0.1, 0.1], [0.1] * 6]).repeat(1, 8)
    patches = torch.randn(2, 48, 2)
    for keep_rate in (0.25, 0.5, 0.8):
        found = EViTReducer(keep_rate, SETTING, fuse=True).decide(seen_of(patches, attention))
        for row in range(2):
            assert found.indices[row].tolist() == reference(patches[row], attention[row], keep_rate, True)[0]


def test_the_fused_token_is_a_sum_that_is_not_normalised():
    patches, attention = torch.ones(1, 4, 3), torch.tensor([[0.4, 0.1, 0.25, 0.05]])
    applied = EViTReducer(0.5, SETTING).decide(seen_of(patches, attention)).apply(patches)
    torch.testing.assert_close(applied[0, :, 0], torch.tensor([1.0, 1.0, 0.15]))


@pytest.mark.parametrize("prefix", [1, 2])
def test_three_stages_of_a_walk_equal_the_loop_and_drop_a_fused_token_like_any_other(prefix):
    """Each stage's attention is given by the tokens themselves, so that the fused ones have low scores and leave."""

    def scores(patches):
        return patches.double().abs().sum(-1).softmax(-1).float()

    class Block(torch.nn.Module):
        def forward(self, tokens, key_bias, reduction=None):
            assert key_bias is None
            return tokens if reduction is None else reduction(tokens, scores(tokens[:, prefix:]))

    tokens = torch.randn(2, prefix + 25, 6, generator=torch.Generator().manual_seed(3))
    reducer = EViTReducer(0.7, ReductionSetting(layers=(0, 2, 3), num_prefix=prefix))
    walk = BranchWalk(reducer, prefix, (5, 5), records_before=True)
    after = tokens
    for index in range(5):
        after = walk.block(index, Block(), after)
    assert [found.count for found in walk.maps] == [25, 19, 15] and after.shape[1] == prefix + 12
    assert reducer.counts((5, 5)) == [25, 19, 15, 12]
    assert torch.equal(after[:, :prefix], tokens[:, :prefix])
    fused_left = 0
    for row in range(2):
        patches = tokens[row, prefix:]
        for stage in range(3):
            kept, patches = reference(patches, scores(patches), 0.7, True)
            fused_left += stage > 0 and walk.maps[stage].groups()[row, -1] < 0
        torch.testing.assert_close(after[row, prefix:].double(), patches, rtol=1e-5, atol=1e-5)
    assert fused_left > 0
    assert walk.restore(after).shape == tokens.shape


def test_restoring_three_stages_gives_dropped_tokens_what_they_had_when_they_left():
    class Block(torch.nn.Module):
        def forward(self, tokens, key_bias, reduction=None):
            return 2 * reduction(tokens, tokens[:, 1:, 0].softmax(-1))

    tokens = torch.cat([torch.zeros(1, 1), torch.arange(1, 17.0).unsqueeze(1)]).unsqueeze(0)
    for fuse in (False, True):
        walk = BranchWalk(EViTReducer(0.5, ReductionSetting(layers=(0, 1)), fuse=fuse), 1, (4, 4), records_before=True)
        after = tokens
        for index in range(2):
            after = walk.block(index, Block(), after)
        # The largest stay: 9 to 16 at first. The second stage has one more token to choose from where one is fused.
        last = range(13, 17) if not fuse else range(12, 17)
        expected = [i * (4 if i in last else 2 if i > 8 else 1) for i in range(1, 17)]
        assert walk.restore(after)[0, 1:, 0].tolist() == expected


@pytest.mark.parametrize("fuse", [True, False])
def test_permuted_patches_give_the_same_tokens(fuse):
    patches, attention = random_row(3, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    reducer = EViTReducer(0.6, SETTING, fuse=fuse)
    found = reducer.decide(seen_of(patches, attention))
    other = reducer.decide(seen_of(patches[:, order], attention[:, order]))
    assert torch.equal((found.groups() >= 0)[:, order], other.groups() >= 0)
    for row in range(3):
        a, b = found.apply(patches)[row], other.apply(patches[:, order])[row]
        if fuse:
            torch.testing.assert_close(a[-1], b[-1])
            a, b = a[:-1], b[:-1]
        assert sorted(a.tolist()) == sorted(b.tolist())


def test_keep_rate_one_changes_nothing_and_appends_nothing():
    patches, attention = random_row(2, 9)
    found = EViTReducer(1.0, SETTING).decide(seen_of(patches, attention))
    assert isinstance(found, Unchanged) and torch.equal(found.apply(patches), patches)
    assert EViTReducer(1.0, SETTING).counts((3, 3)) == [9, 9, 9, 9]


def test_no_gradient_reaches_the_scores_and_dropped_tokens_get_theirs_through_the_fused_one():
    patches, attention = random_row(2, 10)
    tokens = torch.cat([torch.zeros(2, 1, 4), patches], dim=1).requires_grad_()
    attention.requires_grad_()
    walk = BranchWalk(EViTReducer(0.7, SETTING), 1, None)
    step = ReductionStep(walk, 0)
    step(tokens, attention).sum().backward()
    assert attention.grad is None and isinstance(step.map, Fused)
    expected = torch.where(step.map.groups() >= 0, torch.ones(()), attention.detach())
    torch.testing.assert_close(tokens.grad[:, 1:], expected.unsqueeze(-1).expand(-1, -1, 4))


def test_bf16_tokens_are_fused_in_fp32():
    patches, attention = random_row(2, 50, width=16)
    patches = patches.bfloat16()
    applied = EViTReducer(0.3, SETTING).decide(seen_of(patches, attention)).apply(patches)
    assert applied.dtype == torch.bfloat16
    for row in range(2):
        _, tokens = reference(patches[row], attention[row], 0.3, True)
        assert torch.equal(applied[row, :-1].double(), tokens[:-1])
        torch.testing.assert_close(applied[row, -1].double(), tokens[-1], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("keep_rate", "fuse", "share"), [(0.8, False, 74.9), (0.8, True, 75.6), (0.7, False, 65.2), (0.7, True, 65.9)]
)
def test_flop_shares_are_the_published_ones(keep_rate, fuse, share):
    reducer = EViTReducer(keep_rate, SETTING, fuse=fuse)
    assert abs(flop_share(reducer.layers, reducer.counts(GRID)) - share) < 0.1


def test_counts_of_both_crop_sizes():
    assert EViTReducer(0.8, SETTING, fuse=False).counts((14, 14)) == [196, 157, 126, 101]
    assert EViTReducer(0.8, SETTING).counts((14, 14)) == [196, 158, 128, 104]
    assert EViTReducer(0.8, SETTING).counts((6, 6)) == [36, 30, 25, 21]


def test_the_overhead_is_a_row_of_attention_and_the_fused_sum():
    reducer = EViTReducer(0.8, SETTING)
    assert reducer.overhead_macs(0, 196) == (197 + 39) * 384
    assert EViTReducer(0.8, SETTING, fuse=False).overhead_macs(1, 158) == 159 * 384
    assert sum(reducer.overhead_macs(stage, n) for stage, n in enumerate(reducer.counts(GRID)[:-1])) < 4.6e9 / 1000


def test_a_model_without_cls_is_refused():
    with pytest.raises(InputError, match=r"^token_reduction evit .*\[CLS\].*such as tome\.$"):
        EViTReducer(0.8, ReductionSetting(num_prefix=0))


def test_decisions_can_be_exported_for_any_number_of_images():
    class Module(torch.nn.Module):
        def forward(self, patches, attention):
            return EViTReducer(0.7, SETTING).decide(seen_of(patches, attention)).apply(patches)

    inputs = random_row(2, 16)
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(Module(), inputs, dynamic_shapes=(batch, batch)).module()
    other = random_row(5, 16, seed=9)
    assert torch.equal(exported(*other), Module()(*other))
