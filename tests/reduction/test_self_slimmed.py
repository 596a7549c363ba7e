# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from hf_simprune.errors import InputError
from hf_simprune.reduction import ReductionSetting, Seen, SelfSlimmedReducer

from .published_cost import DEPTH, WIDTH


SETTING = ReductionSetting((1, 2, 3), 6, 6, 2, 1, grids=((4, 4), (3, 3)))


def build(keep_rate=0.7, seed=0, **options):
    torch.manual_seed(seed)
    reducer = SelfSlimmedReducer(keep_rate, SETTING, **options)
    return reducer, reducer.build_learned()


def seen(patches, stage, learned, grid=None):
    return Seen(patches, None, None, grid, stage, 1, learned)


def patches(count, rows=2, dtype=torch.float32):
    return torch.randn(rows, count, 6, generator=torch.Generator().manual_seed(count)).to(dtype)


def linear(layer, x):
    return [
        sum(w * v for w, v in zip(weights, x, strict=True)) + bias
        for weights, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def layer_norm(x, module=None):
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    normed = [(v - mean) / deviation for v in x]
    if module is None:
        return normed
    return [v * w + b for v, w, b in zip(normed, module.weight.tolist(), module.bias.tolist(), strict=True)]


def two_layers(mlp, x):
    return linear(mlp[2], [gelu(v) for v in linear(mlp[0], x)])


def naive_slimming(tokens, tsm):
    """One row, list of tokens; returns the mixes and the weights (K, n)."""
    logits = [[v * tsm.scale.item() for v in two_layers(tsm.mlp, layer_norm(token, tsm.norm))] for token in tokens]
    weights = []
    for slot in range(len(logits[0])):
        powers = [math.exp(token[slot]) for token in logits]
        weights.append([power / sum(powers) for power in powers])
    mixed = [
        [sum(w * token[d] for w, token in zip(row, tokens, strict=True)) for d in range(len(tokens[0]))]
        for row in weights
    ]
    return mixed, weights


@pytest.mark.parametrize(("stage", "count", "keep"), [(0, 16, 12), (1, 12, 9), (2, 9, 7), (0, 9, 7), (1, 7, 5)])
def test_slimming_equals_a_naive_loop(stage, count, keep):
    reducer, learned = build()
    torch.manual_seed(1)
    for parameter in learned.parameters():
        nn.init.normal_(parameter)  # at its own start the softmax is all but uniform
    tokens = patches(count)
    found = reducer.decide(seen(tokens, stage, learned))
    expected = [naive_slimming(row, learned.slimming[f"stage{stage}_tokens{count}"]) for row in tokens.tolist()]
    assert found.count == count
    mixed = found.apply(tokens)
    assert mixed.shape == (2, keep, 6)
    torch.testing.assert_close(mixed, torch.tensor([row[0] for row in expected]), rtol=1e-4, atol=1e-4)
    for row, (_, weights) in zip(found.groups().tolist(), expected, strict=True):
        assert row == [max(range(keep), key=lambda slot: weights[slot][token]) for token in range(count)]
    restored = found.restore(mixed, tokens)
    for row in range(2):
        for token, slot in enumerate(found.groups()[row]):
            assert torch.equal(restored[row, token], mixed[row, slot])


def test_every_stage_and_crop_size_has_a_module_of_its_own():
    _, learned = build()
    sizes = {name: module.mlp[2].out_features for name, module in learned.slimming.items()}
    assert sizes == {
        "stage0_tokens16": 12, "stage1_tokens12": 9, "stage2_tokens9": 7,
        "stage0_tokens9": 7, "stage1_tokens7": 5, "stage2_tokens5": 4,
    }  # fmt: skip
    assert learned.reverse is None


def test_all_of_a_module_learns():
    reducer, learned = build()
    tokens = patches(16).requires_grad_()
    reducer.decide(seen(tokens, 0, learned)).apply(tokens).square().sum().backward()
    assert tokens.grad.abs().sum() > 0
    for name, parameter in learned.slimming["stage0_tokens16"].named_parameters():
        # one bias a slot is the same for all tokens, which a softmax over tokens does not see
        assert parameter.grad.abs().max() > (0 if name != "mlp.2.bias" else -1), name


def test_mixes_are_convex_in_bf16_and_under_autocast():
    reducer, learned = build()
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        tokens = patches(16, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = reducer.decide(seen(tokens, 0, learned.to(dtype)))
            mixed = found.apply(tokens)
        assert found.weights.dtype == torch.float32 and mixed.dtype == dtype
        torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 12))
        assert (mixed <= tokens.amax(1, keepdim=True)).all() and (mixed >= tokens.amin(1, keepdim=True)).all()


def test_keep_rate_one_changes_nothing_and_learns_nothing():
    reducer, learned = build(1.0)
    tokens = patches(16)
    assert learned is None and reducer.overhead_macs(0, 16) == 0
    assert torch.equal(reducer.decide(seen(tokens, 0, None)).apply(tokens), tokens)


def test_another_crop_size_is_refused_by_name():
    reducer, learned = build()
    with pytest.raises(InputError, match=r"^token_reduction self_slimmed: .*5x5 patches.*built for 4x4, 3x3"):
        reducer.decide(seen(patches(25), 0, learned, grid=(5, 5)))
    with pytest.raises(InputError, match="11 tokens at stage 1"):
        reducer.decide(seen(patches(11), 1, learned))
    with pytest.raises(InputError, match="sizes of all crops"):
        SelfSlimmedReducer(0.7, ReductionSetting((1,))).build_learned()


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_bad_weight_is_refused(weight):
    with pytest.raises(InputError, match="recalibration .*0 or more"):
        SelfSlimmedReducer(0.7, SETTING, recalibration=weight)


def test_recalibration_tells_crops_by_their_size():
    same = ReductionSetting((1,), 6, 6, 2, 1, grids=((4, 4), (4, 4)))
    with pytest.raises(InputError, match="recalibration 1.0.*4x4"):
        SelfSlimmedReducer(0.7, same, recalibration=1.0)
    SelfSlimmedReducer(0.7, same)


class Dense(nn.Module):
    """Stands in for the teacher: a backbone whose blocks mix channels in a way that is easily followed."""

    num_prefix_tokens = 1

    class Block(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index = index

        def forward(self, tokens):
            return tokens + (1 + self.index) * tokens.roll(1, -1)

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.layers = nn.ModuleList(self.Block(index) for index in range(6))

    def embed(self, crops):
        return self.tokens


class Dual(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.teacher = nn.Module()
        self.teacher.backbone = net


def test_recalibration_equals_a_naive_loop():
    reducer, learned = build(recalibration=0.5)
    torch.manual_seed(2)
    for parameter in learned.parameters():
        nn.init.normal_(parameter, std=0.5)
    dense = torch.randn(2, 17, 6)
    reducer.before_pass(torch.zeros(2), Dual(Dense(dense)))
    tokens = patches(9)
    reducer.decide(seen(patches(16), 0, learned))
    reducer.decide(seen(tokens, 2, learned))
    reducer.decide(seen(patches(5), 2, learned))  # local crops: not rebuilt
    loss = reducer.take_auxiliary_loss()
    assert reducer.take_auxiliary_loss() is None

    reverse, total = learned.reverse, 0.0
    for row, target in zip(tokens.tolist(), dense[:, 1:].tolist(), strict=True):
        slim = naive_slimming(row, learned.slimming["stage2_tokens9"])[0]
        normed = [layer_norm(token, reverse.norm_tokens) for token in slim]
        columns = [two_layers(reverse.tokens, [token[d] for token in normed]) for d in range(6)]
        for place, wanted in enumerate(target):
            rebuilt = [column[place] for column in columns]
            update = two_layers(reverse.channels, layer_norm(rebuilt, reverse.norm_channels))
            rebuilt = layer_norm([a + b for a, b in zip(rebuilt, update, strict=True)])
            for block in range(4):  # the last stage is behind block 3
                wanted = [v + (1 + block) * wanted[d - 1] for d, v in enumerate(wanted)]
            wanted = layer_norm(wanted)
            total += sum((a - b) ** 2 for a, b in zip(rebuilt, wanted, strict=True))
    assert loss.item() == pytest.approx(0.5 * total / (2 * 16 * 6), rel=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in reverse.parameters())


def test_recalibration_is_of_training_passes_only():
    reducer, learned = build(recalibration=1.0)
    reducer.before_pass(torch.zeros(2), Dual(Dense(torch.randn(2, 17, 6))))
    with torch.no_grad():
        reducer.decide(seen(patches(9), 2, learned))
    reducer.decide(seen(patches(9), 2, learned.eval()))
    assert reducer.take_auxiliary_loss() is None


@pytest.mark.parametrize(("keep_rate", "share"), [(0.8, 77.3), (0.7, 68.4)])
def test_cost_of_the_published_setting(keep_rate, share):
    setting = ReductionSetting((3, 6, 9), DEPTH, WIDTH, 6, 1, ((14, 14),))
    reducer = SelfSlimmedReducer(keep_rate, setting)
    counts = reducer.counts((14, 14))
    full = 4_598_000_000
    overhead = sum(reducer.overhead_macs(stage, count) for stage, count in enumerate(counts[:-1]))
    assert 1.25 < 100 * overhead / full < 1.65  # the TSM: +1.3 to +1.6 %
    # behind the block: all of a stage's block still runs on the tokens that enter it
    tokens = [counts[sum(layer < block for layer in setting.layers)] + 1 for block in range(DEPTH)]
    blocks = sum(12 * n * WIDTH**2 + 2 * n**2 * WIDTH for n in tokens) + 196 * 768 * WIDTH
    assert 100 * blocks / full == pytest.approx(share, abs=0.5)
    recalibrated = SelfSlimmedReducer(keep_rate, setting, recalibration=1.0)
    more = sum(recalibrated.overhead_macs(stage, count) for stage, count in enumerate(counts[:-1])) - overhead
    learned = recalibrated.build_learned()
    reverse = 196 * (2 * 384 * 4 * 384) + 384 * (4 * 196) * (counts[-1] + 196)
    assert 6 < 100 * reverse / full < 8  # one RTSM: +7 %
    assert sum(p.numel() for p in learned.reverse.parameters() if p.ndim == 2) == (
        2 * 384 * 4 * 384 + 4 * 196 * (counts[-1] + 196)
    )
    dense = 10 * (12 * 197 * 384**2 + 2 * 197**2 * 384)
    # in a step, the student's forward and backward count three times, the teacher's forward once
    assert 4 * more == pytest.approx(3 * reverse + dense, abs=4)
