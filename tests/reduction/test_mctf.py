# SPDX-License-Identifier: Apache-2.0
"""MCTF against a reference written with plain loops."""

import math

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.reduction import (
    BranchWalk,
    MCTFReducer,
    Merged,
    ReductionSetting,
    Seen,
    Unchanged,
    build_reducer,
    keep_count,
    token_counts,
)


def attention_map(rows, count, generator, sharpness=2.0):
    """Softmax maps (rows, count, count)."""
    return (torch.randn(rows, count, count, generator=generator) * sharpness).softmax(-1)


def seen(patches, attention, sizes=None, prefix=1):
    return Seen(patches, attention, sizes, None, 0, prefix, None)


def random_case(count, prefix=1, rows=2, width=6, seed=0, sized=False):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(rows, count, width, generator=generator)
    sizes = torch.randint(1, 5, (rows, count), generator=generator).float() if sized else None
    return seen(patches, attention_map(rows, prefix + count, generator), sizes, prefix)


def reference(patches, attention, sizes, prefix, keep, taus):
    """One row: the groups in output order, each a list of (token, weight), from lists of Python floats."""
    count = len(patches)
    importance = [sum(row[prefix + i] for row in attention) / len(attention) for i in range(count)]

    def relative_inverse(values):
        return [(1 / v) / max(1 / w for w in values) for v in values]

    def cosine(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)

    info, small = relative_inverse(importance), relative_inverse(sizes)
    evens, odds = list(range(0, count, 2)), list(range(1, count, 2))

    def weight(i, j):
        return (
            ((cosine(patches[i], patches[j]) + 1) / 2) ** (1 / taus[0])
            * (info[i] * info[j]) ** (1 / taus[1])
            * (small[i] * small[j]) ** (1 / taus[2])
        )

    members = {i: [i] for i in range(count)}

    def fuse(sources, targets, number):
        best = {s: max(targets, key=lambda t: (weight(s, t), -t)) for s in sources} if number else {}
        gone = sorted(best, key=lambda s: (-weight(s, best[s]), s))[:number]
        for source in gone:
            members[best[source]] += members.pop(source)
        return [s for s in sources if s not in gone]

    remove = count - keep
    odds = fuse(odds, evens, remove // 2)
    evens = fuse(evens, odds, remove - remove // 2)
    groups = []
    for head in odds + evens:
        total = sum(importance[i] * sizes[i] for i in members[head])
        groups.append([(i, importance[i] * sizes[i] / total) for i in sorted(members[head])])
    return groups


def expected_groups(case, keep, taus=(1, 20, 40)):
    sizes = torch.ones(case.patches.shape[:2]) if case.sizes is None else case.sizes
    return [
        reference(*(part[row].tolist() for part in (case.patches, case.attention, sizes)), case.prefix, keep, taus)
        for row in range(len(sizes))
    ]


def check(found, groups, case):
    """`found` has these groups, their means, their sizes and their sums."""
    generator = torch.Generator().manual_seed(9)
    columns = torch.randn(*case.patches.shape[:2], 5, generator=generator)
    merged, summed = found.apply(case.patches), found.sum_columns(columns)
    sizes = torch.ones(case.patches.shape[:2]) if case.sizes is None else case.sizes
    for row, expected in enumerate(groups):
        assert merged.shape[1] == summed.shape[1] == len(expected)
        for place, group in enumerate(expected):
            inside = [i for i, _ in group]
            assert (found.groups()[row] == place).nonzero().flatten().tolist() == inside
            mean = sum(weight * case.patches[row, i] for i, weight in group)
            torch.testing.assert_close(merged[row, place], mean)
            torch.testing.assert_close(summed[row, place], columns[row, inside].sum(0))
            assert found.sizes(case.sizes)[row, place] == sizes[row, inside].sum()


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize(("count", "keep_rate"), [(2, 0.5), (3, 0.5), (8, 0.5), (9, 0.5), (13, 0.6), (21, 0.8)])
def test_groups_and_means_are_those_of_the_loops(count, keep_rate, prefix, sized):
    case = random_case(count, prefix, sized=sized)
    keep = keep_count(count, keep_rate)
    check(MCTFReducer(keep_rate).decide(case), expected_groups(case, keep), case)


@pytest.mark.parametrize("taus", [(1.0, 1.0, 1.0), (0.5, 0.02, 40.0), (math.inf, math.inf, 0.5)])
def test_temperatures_weigh_the_criteria(taus):
    case = random_case(12, rows=3, sized=True, seed=1)
    names = ("tau_similarity", "tau_information", "tau_size")
    found = MCTFReducer(0.6, **dict(zip(names, taus, strict=True))).decide(case)
    groups = expected_groups(case, 8, taus)
    assert groups != expected_groups(case, 8)
    check(found, groups, case)


def test_both_directions_fuse_half_of_the_tokens_each():
    case = random_case(20, seed=4)
    groups = MCTFReducer(0.7).decide(case).groups()
    # 6 tokens to go: 3 of the 10 odd ones into even ones, then 3 even ones into odd ones
    assert groups.amax() == 13
    heads_of_odd = [len(set(row[1::2].tolist()) & set(range(7))) for row in groups]
    assert heads_of_odd == [7, 7]


def test_a_group_moves_on_with_the_token_that_took_it():
    patches = torch.tensor([[1.0, 0, 0], [1, 0.2, 0], [0, 0, 1], [1, -0.1, 0], [0, 1, 0], [0, 1, -0.3]])
    uniform = torch.full((1, 7, 7), 1 / 7)
    found = MCTFReducer(0.5).decide(seen(patches.unsqueeze(0), uniform))
    # 3 into 0 first; then 0 into 1, which is its best of the odd ones left, and 4 into 5
    groups = found.groups()[0]
    assert groups.tolist() == [0, 0, 2, 0, 1, 1]
    torch.testing.assert_close(found.apply(patches.unsqueeze(0))[0, groups[0]], patches[[0, 1, 3]].mean(0))


def test_ties_go_to_the_lower_index():
    patches = torch.zeros(1, 9, 4)
    patches[..., 0] = 1
    case = seen(patches, torch.full((1, 10, 10), 0.1))
    found = MCTFReducer(0.6).decide(case)
    check(found, expected_groups(case, 6), case)
    # 1 into 0, then 0 and 2 into 3; left are A: 3, 5, 7 and B: 4, 6, 8
    assert found.groups().tolist() == [[0, 0, 0, 0, 3, 1, 4, 2, 5]]


def test_unimportant_small_tokens_fuse_first_among_equally_similar_ones():
    patches = torch.zeros(1, 8, 4)
    patches[..., 0] = 1
    received = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.04, 0.04, 0.1, 0.02])
    attention = torch.cat([torch.zeros(1), received]).expand(1, 9, 9)
    groups = MCTFReducer(0.75).decide(seen(patches, attention)).groups()[0].tolist()
    assert groups[7] == groups[4] and groups.count(groups[0]) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_tokens_are_decided_in_fp32_and_come_back_as_bf16(autocast):
    case = random_case(30, width=16, seed=2)
    half = case._replace(patches=case.patches.bfloat16())
    plain = MCTFReducer(0.7).decide(case._replace(patches=half.patches.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = MCTFReducer(0.7).decide(half)
        applied, summed = found.apply(half.patches), found.sum_columns(half.patches)
    assert torch.equal(found.groups(), plain.groups())
    assert found.weights.dtype == torch.float32 and applied.dtype == summed.dtype == torch.bfloat16
    assert torch.equal(applied, plain.apply(half.patches.float()).bfloat16())


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("count", [1, 7])
def test_keep_rate_one_changes_nothing(count, prefix):
    case = random_case(count, prefix)
    found = MCTFReducer(1.0).decide(case)
    assert isinstance(found, Unchanged)
    assert found.apply(case.patches) is case.patches and found.sum_columns(case.patches) is case.patches
    assert found.sizes(None) is None and found.restore(case.patches, case.patches) is case.patches
    assert torch.equal(found.groups(), torch.arange(count).expand(2, count))
    assert found.grid((1, count)) == (1, count)


def test_a_single_token_stays():
    assert isinstance(MCTFReducer(0.5).decide(random_case(1)), Unchanged)


@pytest.mark.parametrize("scale", [0.0, 1e15])
def test_constant_images_and_zero_attention_give_finite_means(scale):
    patches = torch.full((2, 9, 4), scale)
    attention = torch.zeros(2, 10, 10)
    attention[:, :, 0] = 1
    found = MCTFReducer(0.6).decide(seen(patches, attention))
    assert isinstance(found, Merged)
    torch.testing.assert_close(found.apply(patches), torch.full((2, 6, 4), scale))
    assert torch.equal(found.sizes(None).sum(1), torch.full((2,), 9.0))


def test_an_unattended_token_goes_first_and_does_not_count():
    case = random_case(10, seed=3)
    attention = case.attention.clone()
    attention[:, :, 1 + 4] = 0
    found = MCTFReducer(0.9, tau_information=1).decide(case._replace(attention=attention))
    together = found.groups() == found.groups()[:, 4:5]
    assert torch.equal(together.sum(1), torch.tensor([2, 2]))
    partner = (together & (torch.arange(10) != 4)).nonzero()[:, 1]
    for row in range(2):
        merged = found.apply(case.patches)[row, found.groups()[row, 4]]
        torch.testing.assert_close(merged, case.patches[row, partner[row]])


def test_pooled_attention_maps_still_sum_to_one():
    case = random_case(14, rows=3)
    found = MCTFReducer(0.6).decide(case)
    maps = case.attention[:, 1:, 1:]
    maps = maps / maps.sum(-1, keepdim=True)
    pooled = found.sum_columns(found.apply(maps).transpose(1, 2)).transpose(1, 2)
    assert pooled.shape == (3, 9, 9)
    torch.testing.assert_close(pooled.sum(-1), torch.ones(3, 9))


def test_gradients_flow_through_the_means_only():
    case = random_case(8)
    tokens = case.patches.requires_grad_()
    found = MCTFReducer(0.6).decide(case._replace(attention=case.attention.requires_grad_()))
    assert not found.weights.requires_grad
    found.apply(tokens).sum().backward()
    torch.testing.assert_close(tokens.grad, found.weights.unsqueeze(-1).expand_as(tokens))


class AttentionSite(torch.nn.Module):
    """A block that does nothing but reduce, by the map of its tokens' products."""

    def forward(self, tokens, bias=None, reduction=None):
        if reduction is None:
            return tokens
        scores = tokens @ tokens.transpose(1, 2)
        return reduction(tokens, (scores if bias is None else scores + bias[:, 0]).softmax(-1))


def walk_through(reducer, tokens, prefix, **kwargs):
    walk = BranchWalk(reducer, prefix, (4, 4), **kwargs)
    for index in range(4):
        tokens = walk.block(index, AttentionSite(), tokens)
    return walk, tokens


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("proportional", [True, False])
def test_sizes_follow_the_tokens_through_the_stages(proportional, prefix):
    torch.manual_seed(0)
    reducer = MCTFReducer(0.7, ReductionSetting(layers=(0, 2), depth=4), proportional=proportional)
    tokens = torch.randn(2, prefix + 16, 8)
    walk, left = walk_through(reducer, tokens, prefix, records_before=True)
    assert reducer.counts((4, 4)) == token_counts(16, 0.7, 2) == [16, 12, 9]
    assert left.shape == (2, prefix + 9, 8) and torch.equal(left[:, :prefix], tokens[:, :prefix])
    assert torch.equal(walk.sizes[:, prefix:].sum(1), torch.full((2,), 16.0))
    assert torch.equal(walk.sizes[:, :prefix], torch.ones(2, prefix)) and walk.grid is None
    assert (walk.key_bias(left) is None) == (not proportional)
    restored = walk.restore(left)[:, prefix:]
    groups = walk.maps[1].groups().gather(1, walk.maps[0].groups())
    assert torch.equal(restored, left[:, prefix:].gather(1, groups.unsqueeze(-1).expand(-1, -1, 8)))


def test_torch_export_keeps_the_decision():
    class Fuse(torch.nn.Module):
        def forward(self, patches, attention):
            found = MCTFReducer(0.7).decide(seen(patches, attention))
            return found.apply(patches), found.sum_columns(patches), found.groups(), found.sizes(None)

    case, other = random_case(11), random_case(11, seed=8)
    program = torch.export.export(Fuse(), (case.patches, case.attention)).module()
    for got, want in zip(program(other.patches, other.attention), Fuse()(other.patches, other.attention), strict=True):
        torch.testing.assert_close(got, want)


def test_overhead_counts_cosines_and_pooling_and_is_small():
    setting = ReductionSetting(hidden_size=10, num_heads=3, num_prefix=2)
    reducer = MCTFReducer(0.5, setting)
    # 2 x 3 cosines; 3 heads of 5 patch rows over 7 columns, then 5 columns over 2 + 3 rows; residual and values
    assert reducer.overhead_macs(0, 5) == 6 * 10 + 3 * 5 * 7 + 3 * 5 * 5 + 2 * 5 * 10
    assert MCTFReducer(1.0, setting).overhead_macs(0, 5) == 0
    deit_small = MCTFReducer(0.8, ReductionSetting(layers=(3, 6, 9)))
    overhead = sum(deit_small.overhead_macs(stage, n) for stage, n in enumerate(deit_small.counts((14, 14))[:3]))
    assert overhead / 4.598e9 < 0.005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rate": 0.49}, "keep_rate 0.49 is too low for mctf.*0.5 to 1"),
        ({"tau_similarity": 0.0}, "tau_similarity 0.0 is out of range.*above 0"),
        ({"tau_information": -1.0}, "tau_information -1.0 is out of range"),
        ({"tau_size": math.nan}, "tau_size nan is out of range"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, message):
    options = {"keep_rate": 0.7, **options}
    with pytest.raises(InputError, match=message) as error:
        build_reducer("mctf", options.pop("keep_rate"), options=options)
    assert "\n" not in str(error.value)


def test_it_is_built_by_name():
    reducer = build_reducer("mctf", 0.7, options={"proportional": False})
    assert (reducer.name, reducer.site, reducer.weighs_sizes) == ("mctf", "attention", False)
