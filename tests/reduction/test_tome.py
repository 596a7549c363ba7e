# SPDX-License-Identifier: Apache-2.0
"""ToMe's matching and merging against a reference written with plain loops."""

import math

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.reduction import BranchWalk, ReductionSetting, ReductionStep, Seen, ToMeReducer, Unchanged

from .published_cost import GRID, flop_share


SETTING = ReductionSetting(layers=(3, 6, 9))


def seen_of(patches, keys, sizes=None, stage=0):
    return Seen(patches, keys, sizes, None, stage, 1, None)


def random_row(rows, count, width=4, head_width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, count, width, generator=generator),
        torch.randn(rows, count, head_width, generator=generator),
        torch.randint(1, 6, (rows, count), generator=generator).float(),
    )


def cosine(a, b):
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def reference(patches, keys, sizes, merges):
    """Groups, tokens and sizes for one row: (n, D), (n, d) and (n,)."""
    count, keys = len(patches), keys.tolist()
    sources, targets = range(1, count, 2), range(0, count, 2)
    friend = {i: max(targets, key=lambda j: (cosine(keys[i], keys[j]), -j)) for i in sources}
    merged = sorted(sources, key=lambda i: (-cosine(keys[i], keys[friend[i]]), i))[:merges]
    members = [[i] for i in sources if i not in merged] + [[j] for j in targets]
    for group in members:
        group += [i for i in merged if friend[i] == group[0]]
    groups = [next(g for g, group in enumerate(members) if i in group) for i in range(count)]
    totals = [sum(sizes[i].item() for i in group) for group in members]
    tokens = [
        sum(sizes[i].item() * patches[i].double() for i in group) / total
        for group, total in zip(members, totals, strict=True)
    ]
    return groups, torch.stack(tokens), totals


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(("count", "keep_rate"), [(16, 0.8), (25, 0.7), (9, 0.5), (8, 0.5), (3, 0.6), (2, 0.5)])
def test_merged_tokens_equal_the_loop_reference(sized, count, keep_rate):
    patches, keys, sizes = random_row(4, count, seed=count)
    reducer = ToMeReducer(keep_rate, SETTING)
    found = reducer.decide(seen_of(patches, keys, sizes if sized else None))
    applied, keep = found.apply(patches), math.ceil(keep_rate * count)
    assert applied.shape[1] == keep == reducer.counts((1, count))[1]
    for row in range(4):
        weights = sizes[row] if sized else torch.ones(count)
        groups, tokens, totals = reference(patches[row], keys[row], weights, count - keep)
        assert found.groups()[row].tolist() == groups
        assert found.sizes(sizes if sized else None)[row].tolist() == totals
        torch.testing.assert_close(applied[row].double(), tokens, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kinds", [1, 2, 4])
def test_equal_cosines_merge_the_lower_index_into_the_lower_index(kinds):
    """Keys drawn from a few unit vectors: all cosines are exactly 0 or 1."""
    keys = torch.eye(4)[torch.randint(kinds, (2, 81), generator=torch.Generator().manual_seed(kinds))]
    patches, _, _ = random_row(2, 81)
    for keep_rate in (0.5, 0.7, 0.9):
        found = ToMeReducer(keep_rate, SETTING).decide(seen_of(patches, keys))
        for row in range(2):
            merges = 81 - math.ceil(keep_rate * 81)
            expected = reference(patches[row], keys[row], torch.ones(81), merges)[0]
            assert found.groups()[row].tolist() == expected


def test_the_most_similar_pair_merges_and_keys_that_are_zero_do_not_break_it():
    keys = torch.tensor([[[1.0, 0], [0, 0], [0, 1], [0.1, 1], [0, 0], [0, 0]]])
    patches = torch.arange(6.0).reshape(1, 6, 1)
    found = ToMeReducer(0.8, SETTING).decide(seen_of(patches, keys))
    # Odd ones left: 1 and 5. Even ones: 0, 2 with 3, and 4.
    assert found.apply(patches).flatten().tolist() == [1, 5, 0, 2.5, 4]


class Block(torch.nn.Module):
    """Attention and MLP do nothing; keys are the first numbers of the tokens."""

    def __init__(self, prefix):
        super().__init__()
        self.prefix = prefix
        self.biases = []

    def forward(self, tokens, key_bias, reduction=None):
        self.biases.append(key_bias)
        return tokens if reduction is None else reduction(tokens, tokens[:, self.prefix :, :3].float())


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"schedule": "every_layer", "r": 4}])
def test_tokens_merged_again_and_again_are_the_plain_means_of_their_patches(prefix, options):
    """With nothing between the stages, whatever was merged when: every patch counts once."""
    tokens = torch.randn(3, prefix + 25, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    setting = ReductionSetting(layers=(0, 1, 3), depth=4, num_prefix=prefix)
    walk = BranchWalk(ToMeReducer(0.6, setting, **options), prefix, (5, 5), records_before=True)
    after = tokens
    for index in range(4):
        after = walk.block(index, Block(prefix), after)
    assert torch.equal(after[:, :prefix], tokens[:, :prefix])
    origin = torch.arange(25).repeat(3, 1)
    for found in walk.maps:
        origin = found.groups() if found is walk.maps[0] else found.groups().gather(1, origin)
    largest = 0
    for row in range(3):
        for group in range(after.shape[1] - prefix):
            members = (origin[row] == group).nonzero().flatten()
            mean = sum(tokens[row, prefix + i] for i in members) / len(members)
            torch.testing.assert_close(after[row, prefix + group], mean, rtol=1e-6, atol=1e-6)
            assert walk.sizes[row, prefix + group] == len(members)
            largest = max(largest, len(members))
    assert largest > 3  # merged more than once
    restored = walk.restore(after)
    for row in range(3):
        for i in range(25):
            assert torch.equal(restored[row, prefix + i], after[row, prefix + origin[row, i]])


def test_merging_without_sizes_would_weigh_patches_unequally():
    """What the test above guards against: the mean of means is another one."""
    patches, keys = torch.tensor([[[0.0], [0.0], [3.0], [9.0]]]), torch.ones(1, 4, 1)
    first = ToMeReducer(0.75, SETTING).decide(seen_of(patches, keys))
    assert first.apply(patches).flatten().tolist() == [9, 0, 3]
    sizes = first.sizes(None)
    assert sizes.tolist() == [[1, 2, 1]]
    again = ToMeReducer(0.6, SETTING).decide(seen_of(first.apply(patches), keys[:, :3], sizes))
    assert again.apply(first.apply(patches)).flatten().tolist() == [3, 3]
    again = ToMeReducer(0.6, SETTING).decide(seen_of(first.apply(patches), keys[:, :3]))
    assert again.apply(first.apply(patches)).flatten().tolist() == [4.5, 3]


@pytest.mark.parametrize("proportional", [True, False])
def test_attention_weighs_merged_tokens_by_the_log_of_their_sizes_if_proportional(proportional):
    setting = ReductionSetting(layers=(0,), num_prefix=2)
    reducer = ToMeReducer(0.5, setting, proportional=proportional)
    walk, block = BranchWalk(reducer, 2, (3, 3)), Block(2)
    tokens = torch.randn(2, 11, 5)
    for index in range(2):
        tokens = walk.block(index, block, tokens)
    assert block.biases[0] is None
    # Sizes are there either way: the mean of a later merge needs them.
    assert walk.sizes.sum(1).tolist() == [11, 11] and walk.sizes.max() > 1
    if proportional:
        torch.testing.assert_close(block.biases[1], walk.sizes.log()[:, None, None])
    else:
        assert block.biases[1] is None


def test_every_layer_merges_r_at_most_half_and_stops_with_one_token():
    reducer = ToMeReducer(0.8, ReductionSetting(layers=(3,), depth=7), schedule="every_layer", r=5)
    assert reducer.layers == tuple(range(7))
    assert reducer.counts((4, 5)) == [20, 15, 10, 5, 3, 2, 1, 1]
    walk, tokens = BranchWalk(reducer, 1, (4, 5)), torch.randn(2, 21, 5)
    for index, count in enumerate(reducer.counts((4, 5))[1:]):
        tokens = walk.block(index, Block(1), tokens)
        assert tokens.shape[1] == 1 + count
    assert reducer.overhead_macs(6, 1) == 0


def test_keep_rate_one_changes_nothing_and_keeps_the_order():
    patches, keys, sizes = random_row(2, 9)
    found = ToMeReducer(1.0, SETTING).decide(seen_of(patches, keys, sizes))
    assert isinstance(found, Unchanged) and torch.equal(found.apply(patches), patches)
    assert torch.equal(found.sizes(sizes), sizes)


def test_no_gradient_reaches_the_keys_and_merged_tokens_share_theirs():
    patches, keys, _ = random_row(2, 10)
    tokens = torch.cat([torch.zeros(2, 1, 4), patches], dim=1).requires_grad_()
    keys.requires_grad_()
    step = ReductionStep(BranchWalk(ToMeReducer(0.6, SETTING), 1, None), 0)
    step(tokens, keys).sum().backward()
    assert keys.grad is None
    groups = step.map.groups()
    share = torch.tensor([[1 / row.tolist().count(g) for g in row.tolist()] for row in groups])
    torch.testing.assert_close(tokens.grad[:, 1:], share.unsqueeze(-1).expand(-1, -1, 4))


def test_bf16_tokens_and_autocast_leave_matching_and_means_in_fp32():
    patches, keys, sizes = random_row(1, 150, width=16, head_width=16)
    patches = patches.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ToMeReducer(0.6, SETTING).decide(seen_of(patches, keys, sizes))
        applied = found.apply(patches)
    assert applied.dtype == torch.bfloat16 and found.weights.dtype == torch.float32
    groups, tokens, _ = reference(patches[0], keys[0], sizes[0], 60)
    assert found.groups()[0].tolist() == groups
    torch.testing.assert_close(applied[0].double(), tokens, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("r", "share"), [(8, 74.3), (7, 77.4), (11, 64.9)])
def test_flop_shares_of_every_layer_are_the_published_ones(r, share):
    reducer = ToMeReducer(0.8, SETTING, schedule="every_layer", r=r)
    assert abs(flop_share(reducer.layers, reducer.counts(GRID)) - share) < 0.1


@pytest.mark.parametrize(("keep_rate", "share"), [(0.8, 74.9), (0.7, 65.2)])
def test_flop_shares_in_stages_are_those_of_a_pruning_method(keep_rate, share):
    reducer = ToMeReducer(keep_rate, SETTING)
    assert reducer.counts((6, 6)) == {0.8: [36, 29, 24, 20], 0.7: [36, 26, 19, 14]}[keep_rate]
    assert abs(flop_share(reducer.layers, reducer.counts(GRID)) - share) < 0.1


def test_the_overhead_is_half_against_half_and_the_weighted_sums():
    reducer = ToMeReducer(0.8, SETTING)
    assert reducer.overhead_macs(0, 196) == 98 * 98 * 64 + 196 * 384
    assert reducer.overhead_macs(1, 157) == 78 * 79 * 64 + 157 * 384
    assert ToMeReducer(1.0, SETTING).overhead_macs(0, 196) == 0


@pytest.mark.parametrize(
    ("keep_rate", "options", "message"),
    [
        (0.49, {}, r"^keep_rate 0\.49: tome .*0\.5 to 1\.$"),
        (0.8, {"schedule": "layers"}, "schedule 'layers'.*stages, every_layer"),
        (0.8, {"schedule": "every_layer"}, "option r is missing.*r=8"),
        (0.8, {"r": 8}, "option r 8 needs schedule every_layer"),
        (0.8, {"schedule": "every_layer", "r": 0}, "option r 0.*at least 1"),
        (0.8, {"schedule": "every_layer", "r": 2.5}, r"option r 2\.5.*at least 1"),
    ],
)
def test_what_tome_cannot_do_is_refused(keep_rate, options, message):
    with pytest.raises(InputError, match=message):
        ToMeReducer(keep_rate, SETTING, **options)


def test_decisions_can_be_exported_for_any_number_of_images():
    class Module(torch.nn.Module):
        def forward(self, patches, keys, sizes):
            found = ToMeReducer(0.7, SETTING).decide(seen_of(patches, keys, sizes))
            return found.apply(patches), found.sizes(sizes)

    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(Module(), random_row(2, 17), dynamic_shapes=(batch,) * 3).module()
    other = random_row(5, 17, seed=9)
    for ours, expected in zip(exported(*other), Module()(*other), strict=True):
        assert torch.equal(ours, expected)
