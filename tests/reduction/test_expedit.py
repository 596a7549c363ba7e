# SPDX-License-Identifier: Apache-2.0
"""Expedit against a reference written with plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_simprune.errors import InputError
from hf_simprune.reduction import BranchWalk, ExpeditReducer, ReductionSetting, Seen, Unchanged, build_reducer
from hf_simprune.reduction.expedit import cluster, pooling, window


DEIT_SMALL = ReductionSetting(layers=(3, 6, 9), grids=((14, 14), (6, 6)))


def seen(patches, grid):
    return Seen(patches, None, None, grid, 0, 1, None)


def squared(x, y):
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def mean(vectors, weights):
    return [
        sum(w * v[d] for v, w in zip(vectors, weights, strict=True)) / sum(weights) for d in range(len(vectors[0]))
    ]


def softmax(values):
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def reference_clusters(tokens, grid, target, iterations):
    """Centroids and the centroid each token gives most to, from a list of vectors."""
    (rows, columns), (h, w) = grid, target
    centroids = []
    for i in range(h):
        for j in range(w):
            inside = [
                tokens[y * columns + x]
                for y in range(i * rows // h, math.ceil((i + 1) * rows / h))
                for x in range(j * columns // w, math.ceil((j + 1) * columns / w))
            ]
            centroids.append(mean(inside, [1] * len(inside)))
    for _ in range(iterations):
        given = [[0.0] * (h * w) for _ in tokens]
        for place, token in enumerate(tokens):
            row, column = place // columns * h // rows, place % columns * w // columns
            near = [i * w + j for i in range(h) for j in range(w) if abs(i - row) <= 2 and abs(j - column) <= 2]
            shares = softmax([-squared(token, centroids[c]) for c in near])
            for c, share in zip(near, shares, strict=True):
                given[place][c] = share
        centroids = [mean(tokens, [shares[c] for shares in given]) for c in range(h * w)]
    return centroids, [max(range(h * w), key=lambda c: (shares[c], -c)) for shares in given]


def reference_restored(tokens, centroids, after, neighbours, temperature):
    """Every token as a mix of `after`, one vector a centroid."""
    restored = []
    for token in tokens:
        order = sorted(range(len(centroids)), key=lambda c: (squared(token, centroids[c]), c))[:neighbours]
        restored.append(
            mean([after[c] for c in order], softmax([-temperature * squared(token, centroids[c]) for c in order]))
        )
    return restored


CASES = [  # grid, keep rate, temperature, neighbours, width
    ((7, 7), 0.7, 0.02, 20, 4),
    ((7, 7), 0.7, 0.02, 20, 60),
    ((8, 8), 0.5, 0.5, 5, 4),
    ((5, 9), 0.6, 0.1, 3, 5),
    ((9, 4), 0.4, 2.0, 20, 3),
    ((9, 4), 0.4, 0.1, 20, 40),
    ((2, 2), 0.2, 0.02, 20, 4),
    ((1, 6), 0.5, 1.0, 2, 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("grid", "keep_rate", "temperature", "neighbours", "width"), CASES)
def test_clusters_and_restored_tokens_are_those_of_the_loops(grid, keep_rate, temperature, neighbours, width, dtype):
    torch.manual_seed(0)
    count = grid[0] * grid[1]
    patches = 2 * torch.randn(2, count, width, dtype=dtype) / math.sqrt(width) + 3
    found = ExpeditReducer(keep_rate, temperature=temperature, neighbours=neighbours).decide(seen(patches, grid))
    target = tuple(math.ceil(math.sqrt(keep_rate) * side) for side in grid)
    assert found.grid(grid) == target and found.sizes(None) is None
    centroids = found.apply(patches)
    after = torch.randn(2, target[0] * target[1], 3, dtype=dtype)
    restored = found.restore(after, patches)
    for row in range(2):
        tokens = patches[row].tolist()
        expected, assigned = reference_clusters(tokens, grid, target, 5)
        torch.testing.assert_close(centroids[row], torch.tensor(expected, dtype=dtype))
        assert found.groups()[row].tolist() == assigned
        mixes = reference_restored(tokens, expected, after[row].tolist(), neighbours, temperature)
        torch.testing.assert_close(restored[row], torch.tensor(mixes, dtype=dtype), rtol=1e-4, atol=1e-4)


def test_the_options_reach_the_clusters():
    torch.manual_seed(1)
    patches = torch.randn(1, 36, 3, dtype=torch.float64)
    for iterations in (1, 3):
        found = ExpeditReducer(0.5, iterations=iterations).decide(seen(patches, (6, 6)))
        expected, _ = reference_clusters(patches[0].tolist(), (6, 6), (5, 5), iterations)
        torch.testing.assert_close(found.apply(patches)[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("side", "target"), [(14, 11), (14, 8), (13, 12), (6, 5), (5, 5), (3, 1)])
def test_pooling_is_the_adaptive_average_pool(side, target):
    line = torch.randn(1, 1, side)
    torch.testing.assert_close(line @ pooling(side, target, line).T, F.adaptive_avg_pool1d(line, target))


def test_a_token_reaches_the_centroids_of_five_rows_and_columns():
    inside = window((14, 7), (10, 7), torch.device("cpu")).view(14, 7, 10, 7)
    # row 6 of 14 lies in cell 4 of 10
    assert inside[6, 3].nonzero().tolist() == [[i, j] for i in range(2, 7) for j in range(1, 6)]
    assert inside[0, 0].nonzero().tolist() == [[i, j] for i in range(3) for j in range(3)]
    assert window((2, 2), (1, 1), torch.device("cpu")).all()


def test_far_tokens_leave_distant_centroids_alone():
    patches = torch.zeros(1, 144, 2)
    patches[0, 0] = torch.tensor([5.0, 5.0])
    found = ExpeditReducer(0.6).decide(seen(patches, (12, 12)))
    assert (found.down[0, :, 0].view(10, 10)[3:] == 0).all() and found.down[0, 0, 0] > 0


@pytest.mark.parametrize("schedule", ["stages", "published"])
def test_keep_rate_one_changes_nothing(schedule):
    patches = torch.randn(2, 12, 4)
    found = ExpeditReducer(1.0, schedule=schedule).decide(seen(patches, (3, 4)))
    assert isinstance(found, Unchanged) and found.apply(patches) is patches
    assert found.grid((3, 4)) == (3, 4)
    assert ExpeditReducer(1.0, DEIT_SMALL, schedule=schedule).overhead_macs(0, 196) == 0


def test_a_grid_too_small_to_shrink_changes_nothing():
    patches = torch.randn(1, 4, 3)
    assert ExpeditReducer(0.8).decide(seen(patches, (2, 2))).apply(patches) is patches


@pytest.mark.parametrize("value", [0.0, 1.0, -1e15])
def test_constant_images_stay_constant(value):
    patches = torch.full((2, 36, 5), value)
    found = ExpeditReducer(0.5).decide(seen(patches, (6, 6)))
    torch.testing.assert_close(found.apply(patches), torch.full((2, 25, 5), value))
    torch.testing.assert_close(found.restore(found.apply(patches), patches), patches)


def test_huge_features_neither_overflow_nor_lose_a_centroid():
    torch.manual_seed(0)
    patches = 1e12 * torch.randn(2, 64, 8)
    found = ExpeditReducer(0.3).decide(seen(patches, (8, 8)))
    clusters = found.apply(patches)
    assert clusters.isfinite().all() and found.restore(clusters, patches).isfinite().all()
    torch.testing.assert_close(found.down.sum(2), torch.ones(2, 25))
    torch.testing.assert_close(found.up.sum(2), torch.ones(2, 64))


def test_a_centroid_that_gets_nothing_stays():
    # the middle pool lies between two values that the tokens have, and all go to the outer ones
    tokens = torch.tensor([0, 0, 0, 1e6, 1e6, 1e6]).view(1, 6, 1)
    third, half = 1 / 3, 1 / 2
    expected = [[third, third, third, 0, 0, 0], [0, 0, half, half, 0, 0], [0, 0, 0, third, third, third]]
    for iterations in (1, 4):
        down, _, assigned = cluster(tokens, (1, 6), (1, 3), iterations, 1.0, 20)
        torch.testing.assert_close(down, torch.tensor([expected]))
        assert assigned.tolist() == [[0, 0, 0, 2, 2, 2]]


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_tokens_are_clustered_in_fp32_and_come_back_as_bf16(autocast):
    torch.manual_seed(0)
    patches = torch.randn(2, 49, 16).bfloat16()
    plain = ExpeditReducer(0.6).decide(seen(patches.float(), (7, 7)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = ExpeditReducer(0.6).decide(seen(patches, (7, 7)))
        clusters = found.apply(patches)
        restored = found.restore(clusters, patches)
    assert torch.equal(found.down, plain.down) and torch.equal(found.up, plain.up)
    assert found.down.dtype == torch.float32 and clusters.dtype == restored.dtype == torch.bfloat16
    assert torch.equal(clusters, plain.apply(patches.float()).bfloat16())


def test_gradients_flow_through_the_means_only():
    torch.manual_seed(0)
    patches = torch.randn(1, 16, 3, requires_grad=True)
    found = ExpeditReducer(0.5).decide(seen(patches, (4, 4)))
    assert not found.down.requires_grad and not found.up.requires_grad
    upstream = torch.randn(1, 9, 3)
    found.apply(patches).backward(upstream)
    torch.testing.assert_close(patches.grad, found.down.transpose(1, 2) @ upstream)
    after = torch.randn(1, 9, 3, requires_grad=True)
    back = torch.randn(1, 16, 3)
    found.restore(after, patches).backward(back)
    torch.testing.assert_close(after.grad, found.up.transpose(1, 2) @ back)


def test_equally_near_centroids_count_alike():
    found = ExpeditReducer(0.5, neighbours=4).decide(seen(torch.ones(1, 36, 2), (6, 6)))
    torch.testing.assert_close(found.up, torch.full((1, 36, 25), 1 / 25))


class Plain(torch.nn.Module):
    """A block that does nothing but reduce behind itself."""

    def forward(self, tokens, bias=None, reduction=None):
        assert bias is None
        self.length = tokens.shape[1]
        return tokens if reduction is None else reduction(tokens)


def walk_through(reducer, tokens, prefix, grid, depth, **kwargs):
    walk = BranchWalk(reducer, prefix, grid, **kwargs)
    blocks = [Plain() for _ in range(depth)]
    for index, block in enumerate(blocks):
        tokens = walk.block(index, block, tokens)
    return walk, tokens, [block.length - prefix for block in blocks]


@pytest.mark.parametrize("prefix", [1, 2])
def test_stages_cluster_smaller_grids_one_after_another(prefix):
    torch.manual_seed(0)
    reducer = ExpeditReducer(0.7, ReductionSetting(layers=(0, 2), depth=4))
    tokens = torch.randn(2, prefix + 70, 4)
    walk, left, lengths = walk_through(reducer, tokens, prefix, (7, 10), 4, records_before=True)
    assert reducer.counts((7, 10)) == [70, 6 * 9, 5 * 7] and lengths == [70, 54, 54, 35]
    assert walk.grid == (5, 7) and walk.sizes is None
    assert torch.equal(left[:, :prefix], tokens[:, :prefix])
    restored = walk.restore(left)
    assert restored.shape == tokens.shape and walk.grid == (7, 10)
    first, second = walk.maps
    torch.testing.assert_close(restored[:, prefix:], first.up @ second.up @ left[:, prefix:])


def test_the_published_schedule_restores_the_grid_inside_the_network():
    torch.manual_seed(0)
    setting = ReductionSetting(layers=(0, 1, 2), depth=6, grids=((5, 7),))
    reducer = ExpeditReducer(0.8, setting, schedule="published", grid=3, cluster_after=1, restore_after=3)
    assert reducer.layers == (1,) and reducer.restore_after == 3 and reducer.counts((5, 7)) == [35, 15]
    tokens = torch.randn(2, 36, 4)
    walk, left, lengths = walk_through(reducer, tokens, 1, (5, 7), 6)
    assert lengths == [35, 35, 15, 15, 35, 35] and walk.grid == (5, 7)
    found = walk.maps[0]
    torch.testing.assert_close(left[:, 1:], found.up @ found.down @ tokens[:, 1:])


@pytest.mark.parametrize(
    ("keep_rate", "side", "local_side", "restore_after"), [(0.8, 11, 5, 10), (0.7, 8, 4, 9), (0.9, 12, 6, 10)]
)
def test_the_published_schedule_follows_the_keep_rate(keep_rate, side, local_side, restore_after):
    reducer = ExpeditReducer(keep_rate, DEIT_SMALL, schedule="published")
    assert reducer.layers == (3,) and reducer.restore_after == restore_after
    assert reducer.counts((14, 14)) == [196, side**2] and reducer.counts((6, 6)) == [36, local_side**2]


@pytest.mark.parametrize(("depth", "start", "end"), [(2, 0, 1), (3, 0, 1), (6, 1, 4), (24, 7, 21)])
def test_the_published_schedule_scales_with_the_depth(depth, start, end):
    reducer = ExpeditReducer(0.8, ReductionSetting(depth=depth), schedule="published")
    assert reducer.layers == (start,) and reducer.restore_after == end


def test_a_grid_option_means_the_global_crop_and_keeps_its_share_elsewhere():
    reducer = ExpeditReducer(0.7, DEIT_SMALL, schedule="published", grid=7)
    assert reducer.counts((14, 14)) == [196, 49] and reducer.counts((6, 6)) == [36, 9]
    assert reducer.counts((20, 28)) == [560, 140]
    assert ExpeditReducer(0.7, schedule="published", grid=7).counts((8, 16)) == [128, 7 * 14]


def macs_of_deit_small(reducer):
    """MACs of 12 blocks of width 384 on 14 x 14 patches and [CLS], and of the patch embedding."""

    def block(patches):
        return 12 * (patches + 1) * 384**2 + 2 * (patches + 1) ** 2 * 384

    patches = iter(reducer.counts((14, 14)))
    now = next(patches)
    total = now * 768 * 384
    for index in range(12):
        total += block(now)
        if index in reducer.layers:
            now = next(patches)
        if index == reducer.restore_after:
            now = 196
    return total


@pytest.mark.parametrize(("keep_rate", "percent"), [(0.8, 77), (0.7, 66)])
def test_published_flop_shares_of_deit_small(keep_rate, percent):
    dense = macs_of_deit_small(ExpeditReducer(1.0, DEIT_SMALL))
    reducer = ExpeditReducer(keep_rate, DEIT_SMALL, schedule="published")
    assert dense == pytest.approx(4.598e9, rel=1e-3)
    assert 100 * macs_of_deit_small(reducer) / dense == pytest.approx(percent, abs=0.5)


def test_counts_of_the_stages_are_ceilings_of_the_share_of_every_side_of_the_full_grid():
    assert ExpeditReducer(0.8, DEIT_SMALL).counts((14, 14)) == [196, 169, 144, 121]
    assert ExpeditReducer(0.7, DEIT_SMALL).counts((14, 14)) == [196, 144, 100, 81]
    # Where one stage alone would be rounded up to the whole grid, the next ones still make it smaller.
    assert ExpeditReducer(0.9, DEIT_SMALL).counts((14, 14)) == [196, 196, 169, 144]
    assert ExpeditReducer(0.8, DEIT_SMALL).counts((8, 8)) == [64, 64, 49, 36]
    assert ExpeditReducer(0.8, DEIT_SMALL).counts((6, 6)) == [36, 36, 25, 25]
    assert ExpeditReducer(0.25, DEIT_SMALL).counts((6, 4)) == [24, 6, 2, 1]
    assert 7 / 25 * 25 > 7  # what a bare ceil would trip over
    assert ExpeditReducer(0.7, schedule="published", grid=7).counts((25, 25)) == [625, 49]


def test_overhead_counts_every_product_of_tokens_and_centroids():
    setting = ReductionSetting(layers=(0, 1), hidden_size=10, grids=((4, 6),))
    stages = ExpeditReducer(0.5, setting, iterations=3)
    # narrow tokens: 3 + 1 times means and products, then the final means
    assert stages.overhead_macs(0, 24) == (2 * 4 + 1) * 24 * 15 * 10
    assert stages.overhead_macs(1, 15) == (2 * 4 + 1) * 15 * 6 * 10
    assert stages.overhead_macs(0, 16) == (2 * 4 + 1) * 16 * 9 * 10  # any square
    # of 4 x 4, the smallest that comes down to 3 x 3; few tokens: their products with each other are cheaper
    assert stages.overhead_macs(1, 9) == 9 * 9 * (10 + 4 * 4) + 9 * 4 * 10
    published = ExpeditReducer(0.5, setting, schedule="published", grid=2)
    assert published.overhead_macs(0, 24) == (2 * 6 + 2) * 24 * 6 * 10
    with pytest.raises(InputError, match="grids.*none has 23 tokens at stage 0"):
        stages.overhead_macs(0, 23)


@pytest.mark.parametrize(("grid", "message"), [(None, "there is none"), ((3, 3), "3 x 3 is not that of 10 tokens")])
def test_tokens_without_a_grid_are_refused(grid, message):
    with pytest.raises(InputError, match=f"expedit needs the grid.*{message}"):
        ExpeditReducer(0.5).decide(seen(torch.randn(1, 10, 2), grid))


def test_a_grid_larger_than_the_tokens_is_refused():
    with pytest.raises(InputError, match="grid 15: the token grid has 14 patches a side, give 1 to 14"):
        ExpeditReducer(0.7, DEIT_SMALL, schedule="published", grid=15)
    unknown = ExpeditReducer(0.7, schedule="published", grid=15)
    for use in (lambda: unknown.counts((14, 20)), lambda: unknown.decide(seen(torch.randn(1, 280, 2), (14, 20)))):
        with pytest.raises(InputError, match="grid 15: the token grid has 14"):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "every_layer"}, "schedule 'every_layer' is unknown: choose one of stages, published"),
        ({"grid": 8}, "grid 8 goes with schedule=published"),
        ({"cluster_after": 3}, "cluster_after 3 goes with schedule=published"),
        ({"restore_after": 3}, "restore_after 3 goes with schedule=published"),
        ({"schedule": "published", "grid": 0}, "grid 0: .*give 1 to 14"),
        ({"schedule": "published", "restore_after": 2}, "restore_after 2: clustered after block 3.*4 to 11"),
        ({"schedule": "published", "restore_after": 3}, "restore_after 3: "),
        ({"schedule": "published", "restore_after": 12}, "restore_after 12: .*4 to 11"),
        ({"schedule": "published", "cluster_after": 11}, "cluster_after 11: a model of 12 blocks.*0 to 10"),
        ({"schedule": "published", "cluster_after": -1}, "cluster_after -1"),
        ({"iterations": 0}, "iterations 0 is out of range: give 1 or more"),
        ({"neighbours": 0}, "neighbours 0 is out of range: give 1 or more"),
        ({"temperature": 0.0}, "temperature 0.0 is out of range: give a number above 0"),
        ({"temperature": math.nan}, "temperature nan is out of range"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as error:
        build_reducer("expedit", 0.7, DEIT_SMALL, options)
    assert "\n" not in str(error.value)


def test_a_single_block_cannot_restore():
    with pytest.raises(InputError, match="2 blocks or more, this one has 1"):
        ExpeditReducer(0.7, ReductionSetting(depth=1), schedule="published")


def test_torch_export_keeps_the_clusters():
    class Cluster(torch.nn.Module):
        def forward(self, patches):
            found = ExpeditReducer(0.5).decide(seen(patches, (4, 5)))
            clusters = found.apply(patches)
            return clusters, found.restore(clusters, patches), found.groups()

    torch.manual_seed(0)
    patches, other = torch.randn(2, 20, 3), torch.randn(2, 20, 3)
    program = torch.export.export(Cluster(), (patches,)).module()
    for got, want in zip(program(other), Cluster()(other), strict=True):
        torch.testing.assert_close(got, want)


def test_it_is_built_by_name():
    reducer = build_reducer("expedit", 0.7, options={"iterations": 3})
    assert (reducer.name, reducer.site, reducer.iterations) == ("expedit", "after", 3)
    assert not reducer.weighs_sizes and reducer.restore_after is None
