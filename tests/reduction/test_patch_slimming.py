# SPDX-License-Identifier: Apache-2.0
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_simprune.errors import InputError
from hf_simprune.models.architectures import build_backbone
from hf_simprune.reduction import PatchSlimmingReducer, ReductionSetting, Seen, token_counts


LAYERS, DEPTH, WIDTH, HEADS = (1, 2, 4), 6, 8, 2
GRIDS = ((4, 4), (3, 3))


def build(keep_rate=0.7, layers=LAYERS, **options):
    setting = ReductionSetting(layers, DEPTH, WIDTH, HEADS, 1, GRIDS)
    reducer = PatchSlimmingReducer(keep_rate, setting, **options)
    return reducer, reducer.build_learned()


def backbone(seed=0, architecture="vit_micro", std=0.6):
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 16}
    net = build_backbone(architecture, 16, 4, **sizes).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)  # far from uniform attention
    return net


def dual(reducer, **changes):
    """Both branches with a module of their own; the teacher's backbone is what is looked at."""
    branches = [nn.Module(), nn.Module()]
    for branch in branches:
        branch.reduction = reducer.build_learned()
    branches[1].backbone = backbone(**changes)
    return SimpleNamespace(student=branches[0], teacher=branches[1])


def batch(seed, local=True, images=2):
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randn(2 * images, 3, 16, 16, generator=generator)
    small = torch.randn(3 * images, 3, 12, 12, generator=generator) if local else None
    return SimpleNamespace(global_crops=crops, local_crops=small)


# The naive method: loops over images, blocks, tokens. Attention from the projections, without the package's blocks.


def naive_maps(net, image):
    """Of every block the tokens that enter it, as lists, and its head-mean attention."""
    tokens = net.embed(image[None])
    found = []
    for layer in net.layers:
        attention = layer.attention
        normed = layer.layernorm_before(tokens)[0]
        queries, keys = attention.q_proj(normed), attention.k_proj(normed)
        size = WIDTH // HEADS
        mean = torch.zeros(len(normed), len(normed))
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            for i in range(len(normed)):
                scores = [
                    torch.dot(queries[i, part], keys[j, part]).item() / math.sqrt(size) for j in range(len(normed))
                ]
                total = sum(math.exp(score) for score in scores)
                for j, score in enumerate(scores):
                    mean[i, j] += math.exp(score) / total / HEADS
        found.append((tokens[0].tolist(), mean.tolist()))
        tokens = layer(tokens)
    return found


def naive_read(read, maps, alive):
    """What is read of each token before the blocks with `maps`; only tokens in `alive` read and are read."""
    length = len(read)
    read = [value if i in alive else 0.0 for i, value in enumerate(read)]
    for found in reversed(maps):
        read = [sum(read[i] * found[i][j] for i in range(length)) if j in alive else 0.0 for j in range(length)]
    return read


def naive_written(tokens, attention, patch):
    normed = []
    for token in tokens:
        mean = sum(token) / WIDTH
        deviation = math.sqrt(sum((v - mean) ** 2 for v in token) / WIDTH + 1e-5)
        normed.append([abs((v - mean) / deviation) for v in token])
    row = attention[patch]
    return sum(sum(row[j] * normed[j][d] for j in range(len(tokens))) ** 2 for d in range(WIDTH))


@torch.no_grad()
def naive_calibration(net, images, layers, keeps, scores=None):
    """Kept positions of every stage and the scores, after one more batch of `images`."""
    prefix = net.num_prefix_tokens
    maps = [naive_maps(net, image) for image in images]
    length = len(maps[0][0][0])
    scores = scores or [[0.0] * (length - prefix) for _ in layers]
    read = [[1.0] + [0.0] * (length - 1) for _ in images]
    kept, above, chosen = {}, DEPTH, []
    for stage in reversed(range(len(layers))):
        block = layers[stage]
        between = [[found[index][1] for index in range(block + 1, above)] for found in maps]
        for image, found in enumerate(maps):
            looked = [found[block][1]] if block == DEPTH - 1 else between[image]
            free = naive_read(read[image], looked, range(length))
            for patch in range(length - prefix):
                written = naive_written(*found[block], patch + prefix)
                scores[stage][patch] += free[patch + prefix] ** 2 * written
        others = sorted((p for p in range(length - prefix) if p not in chosen), key=lambda p: (-scores[stage][p], p))
        chosen = sorted(chosen + others[: keeps[stage] - len(chosen)])
        kept[stage] = chosen
        alive = [*range(prefix), *(p + prefix for p in chosen)]
        read = [naive_read(read[image], between[image], alive) for image in range(len(images))]
        above = block + 1
    return [kept[stage] for stage in range(len(layers))], scores


@pytest.mark.parametrize(
    ("layers", "architecture"), [(LAYERS, "vit_micro"), ((0, 5), "vit_micro"), ((2, 3), "deit_tiny")]
)
def test_positions_equal_a_naive_loop_over_two_batches(layers, architecture):
    reducer, _ = build(layers=layers, calibration_batches=2)
    both = dual(reducer, architecture=architecture)
    first, second = batch(1), batch(2)
    reducer.before_step(0, 10, [first], both)
    reducer.before_step(1, 10, [second], both)
    net = both.teacher.backbone
    for name, count in (("global_crops", 16), ("local_crops", 9)):
        keeps = token_counts(count, 0.7, len(layers))[1:]
        _, scores = naive_calibration(net, getattr(first, name), layers, keeps)
        kept, scores = naive_calibration(net, getattr(second, name), layers, keeps, scores)
        for positions in (both.teacher.reduction, both.student.reduction):
            assert [positions.kept(count, stage).tolist() for stage in range(len(layers))] == kept
            found = positions.scores(count)
            torch.testing.assert_close(found, torch.tensor(scores, dtype=torch.float64), rtol=1e-3, atol=1e-9)


def test_masks_are_nested_and_follow_attention():
    reducer, evenly = build()
    both = dual(reducer)
    reducer.before_step(0, 10, [batch(1)], both)
    for count, *after in evenly.counts:
        kept = [set(range(count))] + [set(both.teacher.reduction.kept(count, s).tolist()) for s in range(3)]
        for larger, smaller, size in zip(kept[:-1], kept[1:], after, strict=True):
            assert smaller < larger and len(smaller) == size
    assert both.teacher.reduction.kept(16, 2).tolist() != evenly.kept(16, 2).tolist()


def test_all_rows_keep_the_chosen_positions():
    reducer, _ = build()
    positions = dual(reducer).teacher.reduction
    positions.kept(16, 0).copy_(torch.tensor([0, 1, 2, 4, 5, 7, 8, 9, 11, 13, 14, 15]))
    positions.kept(16, 1).copy_(torch.tensor([1, 2, 4, 5, 8, 9, 13, 14, 15]))
    positions.kept(16, 2).copy_(torch.tensor([1, 4, 5, 9, 13, 14, 15]))
    tokens = torch.arange(16.0)[None, :, None].repeat(3, 1, 2)
    for stage in range(3):
        tokens = reducer.decide(Seen(tokens, None, None, None, stage, 1, positions)).apply(tokens)
        assert tokens[:, :, 0].tolist() == [positions.kept(16, stage).tolist()] * 3


def test_positions_are_spread_evenly_before_the_first_calibration():
    _, positions = build(0.5)
    assert positions.kept(16, 0).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert positions.kept(16, 1).tolist() == [0, 4, 8, 12]


def test_calibrations_come_at_their_epochs_and_last_their_batches():
    reducer, _ = build(calibrate_epochs=2.5, calibration_batches=2)
    both = dual(reducer)
    changed, fresh = [], []
    for step in range(24):
        before = both.teacher.reduction.scores(16).clone()
        reducer.before_step(step, 4, [batch(step)], both)
        after = both.teacher.reduction.scores(16)
        if not torch.equal(before, after):
            changed.append(step)
            if not (after >= before).all() or step == 0:
                fresh.append(step)
    assert changed == [0, 1, 10, 11, 20, 21]
    assert fresh == [0, 10, 20]


def test_micro_batches_count_as_batches_and_no_local_crops_are_needed():
    reducer, _ = build(calibration_batches=1)
    at_once, one_by_one = dual(reducer), dual(reducer)
    views = [batch(1, local=False), batch(2, local=False)]
    reducer.before_step(0, 10, views, at_once)
    summed = sum(
        torch.tensor(naive_calibration(one_by_one.teacher.backbone, v.global_crops, (4,), [6])[1]) for v in views
    )
    torch.testing.assert_close(at_once.teacher.reduction.scores(16)[2:].float(), summed, rtol=1e-3, atol=1e-9)
    assert at_once.teacher.reduction.scores(9).abs().sum() == 0


def test_equal_scores_go_by_index():
    reducer, _ = build()
    both = dual(reducer, std=0.0)  # uniform attention, all tokens alike
    reducer.before_step(0, 10, [batch(1)], both)
    assert both.teacher.reduction.kept(16, 2).tolist() == list(range(7))
    assert both.teacher.reduction.kept(16, 0).tolist() == list(range(12))


def test_calibrating_draws_nothing_and_leaves_no_gradient():
    reducer, _ = build()
    both = dual(reducer)
    state = torch.get_rng_state()
    reducer.before_step(0, 10, [batch(1)], both)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(buffer.requires_grad for buffer in both.teacher.reduction.buffers())
    assert not list(both.teacher.reduction.parameters())


def test_a_calibration_goes_on_from_its_buffers():
    reducer, _ = build(calibration_batches=3)
    straight, before = dual(reducer), dual(reducer)
    for step in range(3):
        reducer.before_step(step, 10, [batch(step)], straight)
    reducer.before_step(0, 10, [batch(0)], before)
    resumed_reducer, _ = build(calibration_batches=3)
    resumed = dual(resumed_reducer)
    for name in ("student", "teacher"):
        getattr(resumed, name).load_state_dict(getattr(before, name).state_dict(), strict=False)
    for step in (1, 2):
        resumed_reducer.before_step(step, 10, [batch(step)], resumed)
    for name, buffer in straight.teacher.reduction.named_buffers():
        assert torch.equal(buffer, resumed.teacher.reduction.get_buffer(name)), name


def test_keep_rate_one_keeps_all_and_remembers_nothing():
    reducer, learned = build(1.0)
    tokens = torch.randn(2, 16, 4)
    assert learned is None
    reducer.before_step(0, None, [], None)
    assert torch.equal(reducer.decide(Seen(tokens, None, None, (4, 4), 0, 1, None)).apply(tokens), tokens)


def test_bad_input_is_refused():
    reducer, positions = build()
    with pytest.raises(InputError, match="25 patches at stage 0.*built for 4x4, 3x3"):
        reducer.decide(Seen(torch.zeros(1, 25, 4), None, None, (5, 5), 0, 1, positions))
    with pytest.raises(InputError, match="calibrate_epochs 5.*how long an epoch is"):
        reducer.before_step(0, None, [], dual(reducer))
    with pytest.raises(InputError, match="calibrate_epochs 0.*above 0"):
        build(calibrate_epochs=0.0)
    with pytest.raises(InputError, match="calibration_batches 0.*1 or more"):
        build(calibration_batches=0)
    with pytest.raises(InputError, match=r"patch_slimming follows what the \[CLS\] token reads"):
        PatchSlimmingReducer(0.7, ReductionSetting((1,), num_prefix=0, grids=((4, 4),)))
    with pytest.raises(InputError, match="sizes of all crops"):
        PatchSlimmingReducer(0.7, ReductionSetting((1,))).build_learned()
    alike = ReductionSetting((1, 2), 6, 8, 2, 1, ((4, 4), (3, 5)))
    with pytest.raises(InputError, match="16 and 15 patches.*stage 1"):
        PatchSlimmingReducer(0.5, alike).build_learned()
