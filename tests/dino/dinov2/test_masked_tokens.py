"""Which masked tokens are left after every stage, and which teacher tokens they are compared with, against loops."""

import pytest
import torch
from torch import nn

from hf_simprune.dino.dinov2.masked_tokens import MaskedTokens, moved_positions
from hf_simprune.dino.dinov2.masking import BlockMasking
from hf_simprune.errors import InputError
from hf_simprune.reduction.token_maps import Fused, Kept

from .tiny_dinov2 import masked_views, tiny_dinov2


ROWS, COUNT = 4, 12


def random_kept(generator, rows, count, keep):
    return torch.stack([torch.randperm(count, generator=generator)[:keep].sort().values for _ in range(rows)])


def random_map(generator, rows, count, keep, fused):
    indices = random_kept(generator, rows, count, keep)
    if not fused:
        return Kept(indices, count)
    dropped = torch.stack([torch.tensor([i for i in range(count) if i not in row]) for row in indices.tolist()])
    return Fused(indices, dropped, torch.ones(dropped.shape))


def naive_alive(maps, rows, count):
    """For every row the positions of the tokens left, None for a fused one."""
    alive = [list(range(count)) for _ in range(rows)]
    for found in maps:
        kept = [[alive[row][i] for i in found.indices[row].tolist()] for row in range(rows)]
        alive = [left + [None] * isinstance(found, Fused) for left in kept]
    return alive


def naive_pairs(masks, student, teacher):
    """(row, index in the student's tokens, index in the teacher's, pairs of the row), row by row."""
    pairs = []
    for row, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
        here = [(i, theirs.index(p)) for i, p in enumerate(mine) if p is not None and masks[row][p] and p in theirs]
        pairs += [(row, i, j, len(here)) for i, j in here]
    return pairs


def as_tuples(pairs):
    return list(zip(*(part.tolist() for part in pairs), strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_the_bookkeeping_equals_a_loop_at_every_stage(fused):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        masks = torch.rand(ROWS, COUNT, generator=generator) < 0.5
        masks[0] = False  # a view that is not masked
        tracked = MaskedTokens(masks)
        student_maps, teacher_maps = [], []
        expected = naive_pairs(masks.tolist(), *[naive_alive([], ROWS, COUNT)] * 2)
        assert as_tuples(tracked.pairs()) == expected
        count = COUNT
        for keep in (8, 6, 3):
            for maps in (student_maps, teacher_maps):
                maps.append(random_map(generator, ROWS, count, keep, fused))
            count = keep + fused
            tracked.reduce(student_maps[-1], teacher_maps[-1])
            student, teacher = (naive_alive(maps, ROWS, COUNT) for maps in (student_maps, teacher_maps))
            assert as_tuples(tracked.pairs()) == naive_pairs(masks.tolist(), student, teacher)
            for row, places in enumerate(tracked.partner().tolist()):
                for position, place in zip(student[row], places, strict=True):
                    together = position is not None and masks[row][position] and position in teacher[row]
                    assert place == (teacher[row].index(position) if together else -1)


def test_a_fused_token_has_no_position():
    found = Fused(torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), torch.ones(1, 2))
    assert moved_positions(torch.tensor([[7, 5, 3, 1]]), found).tolist() == [[7, 3, -1]]


class Passing(nn.Module):
    """A block that changes no token."""

    def forward(self, tokens, attention_mask=None, half=None, num_queries=None):
        return tokens if num_queries is None else tokens[:, :num_queries]


@pytest.mark.parametrize(
    ("reduction", "policy", "architecture"),
    [
        ("none", "pair", "dinov2_tiny"),
        ("random", "pair", "dinov2_tiny"),
        ("simprune", "pair", "dinov2_tiny"),
        ("simprune", "pair", "deit_tiny"),
        ("simprune", "keep", "vit_micro"),
    ],
)
def test_logits_belong_to_the_masked_positions_that_are_left_in_both_branches(reduction, policy, architecture):
    dual = tiny_dinov2(reduction, 0.8, architecture=architecture, masked_policy=policy)
    for branch in (dual.student, dual.teacher):
        for index in range(4):
            branch.backbone.layers[index] = Passing()
        branch.head = branch.patch_head = nn.Identity()
    net, views = dual.student.backbone, masked_views()
    output = dual(views.global_crops, views.local_crops, torch.tensor(0.5), views.masks)
    left = [naive_alive([stage[branch] for stage in output.maps], 6, 16) for branch in (0, 1)]
    expected = naive_pairs(views.masks.tolist(), *left)
    assert output.patches_per_view.tolist() == [number for *_, number in expected]
    assert output.masked_tokens == views.masks.sum()
    whole, prefix = net.embed(views.global_crops), net.num_prefix_tokens
    positions = net.embeddings.position_embeddings[0, prefix:]
    student, teacher = [], []
    for row, i, _, _ in expected:
        position = left[0][row][i]
        student.append(net.layernorm(net.embeddings.mask_token.flatten() + positions[position]))
        teacher.append(net.layernorm(whole[row, prefix + position]))
    assert (output.student_patch_logits - torch.stack(student)).abs().max() < 1e-12
    assert (output.teacher_patch_logits - torch.stack(teacher)).abs().max() < 1e-12
    if reduction == "simprune":  # together or not at all
        for row, mask in enumerate(views.masks.tolist()):
            mine, theirs = ({p for p in branch[row] if mask[p]} for branch in left)
            assert mine == theirs
            if policy == "keep":
                assert mine == {p for p in range(16) if mask[p]}


@pytest.mark.parametrize("reduction", ["random", "evit", "patch_slimming", "simprune_dynamic"])
def test_other_methods_train_on_the_masked_tokens_alive_in_both_branches(reduction):
    dual = tiny_dinov2(reduction, 0.75, layers=(0, 2, 3))
    views = masked_views(batch=6, masking=BlockMasking((4, 4), 0.5, 0.9, 1.0))
    output = dual(views.global_crops, views.local_crops, torch.tensor(0.5), views.masks)
    left = [naive_alive([stage[branch] for stage in output.maps], 12, 16) for branch in (0, 1)]
    expected = naive_pairs(views.masks.tolist(), *left)
    assert output.patches_per_view.tolist() == [number for *_, number in expected]
    assert 0 < len(expected) < views.masks.sum()
    assert len(output.maps) == 3
    output.student_patch_logits.sum().backward()


@pytest.mark.parametrize("reduction", ["tome", "mctf", "expedit", "self_slimmed"])
def test_methods_that_merge_are_refused_and_told_what_works(reduction):
    with pytest.raises(InputError, match=f"--token_reduction {reduction}: .*choose one of none, random, simprune, "):
        tiny_dinov2(reduction, 0.8)


def test_masked_policy_is_checked():
    with pytest.raises(InputError, match="--masked_policy drop is unknown"):
        tiny_dinov2("simprune", 0.8, masked_policy="drop")
