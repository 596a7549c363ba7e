# SPDX-License-Identifier: Apache-2.0
"""What every method in the registry has to keep to, whatever it does: a new one is tested here without a change."""

import types

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.reduction import (
    METHODS,
    BranchReducer,
    BranchWalk,
    PairReducer,
    ReductionSetting,
    ReductionStep,
    Seen,
    build_reducer,
    keep_count,
    method_options,
    parse_options,
)


WIDTH, HEADS, DEPTH = 12, 3, 5
LAYERS = (1, 2, 4)
GRIDS = ((6, 5), (3, 5))  # an even and an odd number of patches

VARIANTS = {
    "evit": [{"fuse": False}],
    "expedit": [{"schedule": "published", "cluster_after": 1, "restore_after": 3, "grid": 3}],
    "mctf": [{"proportional": False}],
    "tome": [{"proportional": False}, {"schedule": "every_layer", "r": 4}],
}
BRANCH_METHODS = [name for name, method in METHODS.items() if issubclass(method, BranchReducer)]
PAIR_METHODS = [name for name, method in METHODS.items() if issubclass(method, PairReducer)]
BRANCH_CASES = [
    pytest.param(name, options, id=" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
    for name in BRANCH_METHODS
    for options in [{}, *VARIANTS.get(name, [])]
]


def built(name, keep_rate=0.7, options=None, prefix=1):
    """A reducer and its module for one branch, with parameters that are not their initial zeros."""
    setting = ReductionSetting(LAYERS, DEPTH, WIDTH, HEADS, num_prefix=prefix, grids=GRIDS)
    reducer = build_reducer(name, keep_rate, setting, options)
    torch.manual_seed(0)
    learned = reducer.build_learned()
    for parameter in [] if learned is None else learned.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return reducer, learned


def attention_of(reducer, tokens, prefix):
    """What the reducer needs of a block's attention, made of the tokens (R, prefix + n, D) by fixed weights."""
    generator = torch.Generator().manual_seed(7)
    keys = tokens.float() @ torch.randn(tokens.shape[-1], 4, generator=generator)
    maps = (keys @ keys.transpose(1, 2)).softmax(-1)
    if reducer.site == "attention":
        return maps
    return {"nothing": None, "cls_attention": maps[:, 0, prefix:], "keys": keys[:, prefix:]}[reducer.needs]


class Block(torch.nn.Module):
    """A block that does nothing but reduce."""

    def __init__(self, prefix):
        super().__init__()
        self.prefix = prefix

    def forward(self, tokens, key_bias, reduction=None):
        if reduction is None:
            return tokens
        return reduction(tokens, attention_of(reduction.reducer, tokens, self.prefix))


def tokens_of(grid, prefix=1, rows=3, seed=0):
    return torch.randn(rows, prefix + grid[0] * grid[1], WIDTH, generator=torch.Generator().manual_seed(seed))


def walked(reducer, learned, tokens, grid, prefix=1):
    walk = BranchWalk(reducer, prefix, grid, learned, records_before=True)
    for index in range(DEPTH):
        tokens = walk.block(index, Block(prefix), tokens)
    return walk, tokens


def decided(reducer, learned, patches, attention, grid, prefix=1):
    with torch.no_grad():
        return reducer.decide(Seen(patches, attention, None, grid, 0, prefix, learned))


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_a_pass_leaves_as_many_tokens_as_promised_and_the_prefix_as_it_was(name, options, grid, prefix):
    for keep_rate in (0.9, 0.7, 0.5):
        reducer, learned = built(name, keep_rate, options, prefix)
        counts, tokens = reducer.counts(grid), tokens_of(grid, prefix)
        walk, after = walked(reducer, learned, tokens, grid, prefix)
        assert len(counts) == len(reducer.layers) + 1 == len(walk.maps) + 1
        assert counts[0] == grid[0] * grid[1] and counts == sorted(counts, reverse=True)
        # On so small a grid a fused token, or whole rows and columns, may leave nothing to gain at a high keep rate.
        assert counts[-1] < counts[0] or keep_rate > 0.5
        for stage, found in enumerate(walk.maps):
            assert found.count == counts[stage]
            assert found.apply(torch.zeros(3, counts[stage], 2)).shape == (3, counts[stage + 1], 2)
        last = counts[0] if reducer.restore_after is not None else counts[-1]
        assert after.shape == (3, prefix + last, WIDTH) and after.isfinite().all()
        assert torch.equal(after[:, :prefix], tokens[:, :prefix])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_groups_are_in_range_and_the_full_grid_can_be_had_back(name, options, grid):
    reducer, learned = built(name, options=options)
    counts, tokens = reducer.counts(grid), tokens_of(grid)
    walk, after = walked(reducer, learned, tokens, grid)
    for stage, found in enumerate(walk.maps):
        groups = found.groups()
        assert groups.dtype == torch.int64 and groups.shape == (3, counts[stage])
        assert groups.min() >= -1 and groups.max() < counts[stage + 1]
    restored = walk.restore(after)
    assert restored.shape == tokens.shape and torch.equal(restored[:, :1], tokens[:, :1])
    assert walk.grid == grid and walk.sizes is None


@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_sizes_add_up_to_all_tokens_where_a_method_has_them(name, options):
    for grid in GRIDS:
        reducer, learned = built(name, options=options)
        walk, after = walked(reducer, learned, tokens_of(grid, 2), grid, 2)
        if walk.sizes is None:
            assert not reducer.weighs_sizes
        else:
            assert walk.sizes.shape == after.shape[:2] and walk.sizes.dtype == torch.float32
            assert (walk.sizes[:, :2] == 1).all() and (walk.sizes >= 1).all()
            assert walk.sizes.sum(1).tolist() == [2 + grid[0] * grid[1]] * 3


@pytest.mark.parametrize("name", BRANCH_METHODS)
def test_keep_rate_one_changes_nothing(name):
    reducer, learned = built(name, keep_rate=1.0)
    tokens = tokens_of(GRIDS[0])
    walk, after = walked(reducer, learned, tokens, GRIDS[0])
    assert reducer.counts(GRIDS[0]) == [30] * 4 and torch.equal(after, tokens)
    assert torch.equal(walk.restore(after), tokens) and walk.grid == GRIDS[0]


@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_passes_repeat_and_leave_nothing_behind(name, options):
    reducer, learned = built(name, options=options)
    before = dict(vars(reducer))
    tokens = tokens_of(GRIDS[0])
    first = walked(reducer, learned, tokens, GRIDS[0])[1]
    assert not torch.equal(walked(reducer, learned, tokens_of(GRIDS[0], seed=1), GRIDS[0])[1], first)
    walked(reducer, learned, tokens_of(GRIDS[1], rows=1), GRIDS[1])
    assert torch.equal(walked(reducer, learned, tokens, GRIDS[0])[1], first)
    assert vars(reducer) == before


@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_a_row_is_reduced_alike_whatever_is_beside_it(name, options):
    reducer, learned = built(name, options=options)
    tokens = tokens_of(GRIDS[0], rows=4)
    together = walked(reducer, learned, tokens, GRIDS[0])[1]
    for row in range(4):
        alone = walked(reducer, learned, tokens[row : row + 1], GRIDS[0])[1]
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_gradients_reach_the_tokens_and_what_is_learned_but_no_scores(name, options):
    reducer, learned = built(name, options=options)
    tokens = tokens_of(GRIDS[0])
    attention = attention_of(reducer, tokens, 1)
    tokens.requires_grad_()
    if attention is not None:
        attention.requires_grad_()
    step = ReductionStep(BranchWalk(reducer, 1, GRIDS[0], learned), 0)
    after = step(tokens, attention)
    (after * torch.randn(after.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert (tokens.grad.abs().sum((0, 2)) > 0).any() and tokens.grad.isfinite().all()
    if not reducer.learns:
        assert attention is None or attention.grad is None
        # The map is linear in the tokens, so its gradient does not know of the tokens' own values.
        again = step.map.apply(2 * tokens[:, 1:].detach())
        torch.testing.assert_close(again, 2 * after[:, 1:].detach(), rtol=1e-5, atol=1e-6)
    else:
        assert any(parameter.grad is not None for parameter in learned.parameters())


@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_bf16_tokens_are_decided_on_in_fp32_and_stay_bf16(name, options):
    reducer, learned = built(name, options=options)
    if reducer.learns:
        pytest.skip("a learned module computes in the precision that it is run in")
    tokens = tokens_of(GRIDS[0]).bfloat16()
    attention = attention_of(reducer, tokens, 1)
    exact = decided(reducer, learned, tokens[:, 1:].float(), attention, GRIDS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decided(reducer, learned, tokens[:, 1:], attention, GRIDS[0])
        after = found.apply(tokens[:, 1:])
    assert torch.equal(found.groups(), exact.groups())
    assert after.dtype == torch.bfloat16
    expected = exact.apply(tokens[:, 1:].float())
    torch.testing.assert_close(after.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_a_decision_is_kept_where_activations_are_computed_again(name, options):
    """Attention of other numbers must not change what was decided, unless deciding has gradients itself."""
    reducer, learned = built(name, options=options)
    tokens = tokens_of(GRIDS[0])
    step = ReductionStep(BranchWalk(reducer, 1, GRIDS[0], learned), 0)
    first = step(tokens, attention_of(reducer, tokens, 1))
    other = tokens if reducer.learns else tokens.flip(1)
    assert torch.equal(step(tokens, attention_of(reducer, other, 1)), first)


@pytest.mark.parametrize(("name", "options"), BRANCH_CASES)
def test_the_overhead_is_an_integer_well_below_a_block(name, options):
    setting = ReductionSetting(grids=((14, 14), (6, 6)), layers=(3, 6, 9))
    options = {key: value for key, value in options.items() if key not in ("cluster_after", "restore_after", "grid")}
    reducer = build_reducer(name, 0.7, setting, options)
    for grid in setting.grids:
        for stage, count in enumerate(reducer.counts(grid)[:-1]):
            macs = reducer.overhead_macs(stage, count)
            assert isinstance(macs, int) and 0 <= macs < 12 * (count + 1) * 384**2 + 2 * (count + 1) ** 2 * 384


@pytest.mark.parametrize("name", BRANCH_METHODS)
def test_what_a_method_says_of_itself_is_what_blocks_understand(name):
    method = METHODS[name]
    assert method.name == name and method.needs in ("nothing", "cls_attention", "keys")
    assert method.site in ("attention", "middle", "after")


@pytest.mark.parametrize("name", METHODS)
def test_options_have_plain_types_and_can_be_written_as_text(name):
    for option, parameter in method_options(name).items():
        kinds = set(getattr(parameter.annotation, "__args__", (parameter.annotation,)))
        assert kinds <= {bool, int, float, str, types.NoneType}
        assert type(parameter.default) in kinds
        if parameter.default is not None:
            value = parse_options(name, f"{option}={parameter.default}")[option]
            assert value == parameter.default and type(value) is type(parameter.default)
    with pytest.raises(InputError, match=f"no_such_option.*{name}"):
        build_reducer(name, 0.7, options={"no_such_option": 1})


@pytest.mark.parametrize("keep_rate", [0.0, -0.5, 1.5, float("nan")])
@pytest.mark.parametrize("name", METHODS)
def test_a_keep_rate_out_of_range_is_refused(name, keep_rate):
    with pytest.raises(InputError, match="keep_rate"):
        METHODS[name](keep_rate)


@pytest.mark.parametrize("name", PAIR_METHODS)
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_pairs_keep_the_same_number_in_every_row_in_the_order_of_the_image(name, progress):
    reducer, learned = built(name, options=None)
    (student, teacher), at = (tokens_of(GRIDS[0], 0, rows=4, seed=s) for s in (0, 1)), torch.tensor(progress)
    pair = reducer.pair(student, teacher, at, 0, learned)
    local = reducer.local(tokens_of(GRIDS[1], 0, rows=6), teacher, at, 0, learned)
    keep = pair.student.shape[1]
    for kept, rows, count in ((pair.student, 4, 30), (pair.teacher, 4, 30), (local.indices, 6, 15)):
        assert kept.dtype == torch.int64 and kept.shape[0] == rows and 0 < kept.shape[1] <= count
        assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < count
    assert pair.teacher.shape[1] == keep
    if pair.factors is None:
        assert keep == keep_count(30, 0.7) and local.indices.shape[1] == keep_count(15, 0.7)
    else:
        # A count that is learned; the factors are there for their gradient.
        assert torch.equal(pair.factors, torch.ones(4, keep))


@pytest.mark.parametrize("name", PAIR_METHODS)
def test_pairs_at_keep_rate_one_keep_everything(name):
    reducer, learned = built(name, keep_rate=1.0)
    tokens, at = tokens_of(GRIDS[0], 0, rows=4), torch.tensor(0.5)
    pair = reducer.pair(tokens, tokens.flip(0), at, 0, learned)
    for kept in (pair.student, pair.teacher, reducer.local(tokens, tokens, at, 0, learned).indices):
        assert torch.equal(kept, torch.arange(30).expand(4, 30))
