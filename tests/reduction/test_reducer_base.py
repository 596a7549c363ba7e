# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.reduction import (
    RandomReducer,
    SimPruneReducer,
    build_reducer,
    default_reduction_layers,
    gather_tokens,
    keep_count,
    token_counts,
    validate_reduction_layers,
)


def test_keep_count_rounds_up_without_float_dust():
    assert 0.55 * 100 > 55  # what a bare ceil would trip over
    assert keep_count(100, 0.55) == 55
    assert keep_count(196, 0.8) == 157
    assert keep_count(36, 0.8) == 29
    assert keep_count(7, 1.0) == 7
    assert keep_count(5, 1e-12) == 1


def test_keep_count_equals_exact_integer_arithmetic():
    for count in range(1, 401):
        for percent in range(1, 101):
            assert keep_count(count, percent / 100) == -(-percent * count // 100)


def test_token_counts_of_the_published_setting():
    assert token_counts(196, 0.8, 3) == [196, 157, 126, 101]
    assert token_counts(196, 0.7, 3) == [196, 138, 97, 68]
    assert token_counts(36, 0.8, 3) == [36, 29, 24, 20]
    assert token_counts(36, 0.8, 0) == [36]


def test_default_layers_are_quarters_of_the_depth():
    assert default_reduction_layers(12) == (3, 6, 9)
    assert default_reduction_layers(6) == (1, 3, 4)
    assert default_reduction_layers(24) == (6, 12, 18)
    for depth in range(1, 40):
        layers = default_reduction_layers(depth)
        assert validate_reduction_layers(layers, depth) == layers


def test_gather_keeps_the_prefix_and_the_chosen_patches():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 2 + 7, 4, generator=generator)
    keep = torch.stack([torch.randperm(7, generator=generator)[:5].sort().values for _ in range(3)])
    gathered = gather_tokens(tokens, keep, 2)
    assert gathered.shape == (3, 2 + 5, 4)
    for row in range(3):
        assert torch.equal(gathered[row], torch.stack([tokens[row, i] for i in [0, 1, *(keep[row] + 2).tolist()]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gather_sends_gradients_to_the_kept_tokens_only(dtype):
    tokens = torch.randn(2, 1 + 4, 3, dtype=dtype, requires_grad=True)
    keep = torch.tensor([[0, 2], [1, 3]])
    upstream = torch.randn(2, 1 + 2, 3, dtype=dtype)
    gather_tokens(tokens, keep, 1).backward(upstream)
    expected = torch.zeros(2, 5, 3, dtype=dtype)
    expected[0, [0, 1, 3]] = upstream[0]
    expected[1, [0, 2, 4]] = upstream[1]
    assert torch.equal(tokens.grad, expected)


def test_gather_accepts_a_view_that_is_not_contiguous():
    tokens = torch.randn(3, 2, 6).transpose(0, 1)
    assert torch.equal(
        gather_tokens(tokens, torch.tensor([[0], [1]]), 1)[:, 1], torch.stack([tokens[0, 1], tokens[1, 2]])
    )


def test_keeping_everything_gathers_the_same_tokens():
    tokens = torch.randn(2, 1 + 6, 3)
    assert torch.equal(gather_tokens(tokens, torch.arange(6).expand(2, 6), 1), tokens)


def test_reducers_are_built_by_name():
    assert build_reducer("none", 0.7) is None
    assert isinstance(build_reducer("random", 0.7), RandomReducer)
    reducer = build_reducer("simprune", 0.7, options={"matching": "symmetric"})
    assert isinstance(reducer, SimPruneReducer)
    assert (reducer.name, reducer.keep_rate, reducer.matching) == ("simprune", 0.7, "symmetric")


@pytest.mark.parametrize("keep_rate", [0.0, -0.1, 1.0001, 70, float("nan")])
def test_a_keep_rate_outside_its_range_is_refused(keep_rate):
    for make in (SimPruneReducer, RandomReducer, lambda k: keep_count(10, k), lambda k: build_reducer("none", k)):
        with pytest.raises(InputError, match=rf"^keep_rate {keep_rate} .*above 0 and at most 1"):
            make(keep_rate)


def test_unknown_names_are_refused_and_the_known_ones_listed():
    with pytest.raises(InputError, match="token_reduction 'evitt'.*none, random, simprune"):
        build_reducer("evitt", 0.7)
    with pytest.raises(InputError, match="matching 'hungarian'.*one_way, symmetric"):
        build_reducer("simprune", 0.7, options={"matching": "hungarian"})
    with pytest.raises(InputError, match="matching 'both'.*one_way, symmetric"):
        SimPruneReducer(0.7, matching="both")


@pytest.mark.parametrize(
    ("layers", "depth", "message"),
    [((3, 12), 12, "12.*0 to 11"), ((-1,), 12, "-1.*0 to 11"), ((3, 6, 3), 12, r"repeats \[3\]")],
)
def test_bad_reduction_layers_are_refused(layers, depth, message):
    with pytest.raises(InputError, match=f"reduction_layers.*{message}"):
        validate_reduction_layers(layers, depth)


def test_reduction_layers_come_back_in_order():
    assert validate_reduction_layers([9, 3, 6], 12) == (3, 6, 9)
    assert validate_reduction_layers([], 12) == ()
