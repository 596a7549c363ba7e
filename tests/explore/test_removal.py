"""Blocks that are picked, and what is shown of the network without them."""

import copy

import numpy as np
import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.explore.attention import attention_map
from hf_simprune.explore.redundancy_map import redundancy_of
from hf_simprune.explore.removal import maps_for, plan_without, removable_blocks, removal_effect
from hf_simprune.rba.adapters import adapter_for

from ..rba.conftest import IMAGE_SIZE, make_model
from .conftest import picture


@pytest.mark.parametrize(
    ("blocks", "spans"),
    [([], []), ([4], [(4, 5)]), ([3, 1, 2], [(1, 4)]), ([1, 3, 4], [(1, 2), (3, 5)]), ([1, 2, 3, 4, 5], [(1, 6)])],
)
def test_neighbours_that_are_picked_become_one_span(blocks, spans):
    plan = plan_without(6, blocks)
    assert [(span.start, span.end) for span in plan.spans] == spans
    assert plan.removed_blocks == tuple(sorted(blocks))


@pytest.mark.parametrize("block", [0, 6, -1])
def test_the_first_block_and_blocks_that_are_not_there_are_refused(block):
    with pytest.raises(InputError, match=f"block {block}: blocks 1 to 5 can be removed"):
        plan_without(6, [2, block])


def test_what_is_shown_is_that_of_the_network_without_the_blocks(checkpoint, explorer):
    pixels = explorer.prepare(picture(1))
    effect = removal_effect(explorer.adapter, *_identity(6, [2, 3, 5]), pixels, timed_seconds=0.0)
    naive = copy.deepcopy(checkpoint.model)
    for block in (5, 3, 2):
        del naive.vit.layers[block]
    with torch.no_grad():
        before, after = (model(pixels).logits[0].softmax(-1) for model in (checkpoint.model, naive))
    assert effect.blocks == (6, 3)
    assert effect.parameters == tuple(
        sum(p.numel() for p in model.parameters()) for model in (checkpoint.model, naive)
    )
    assert effect.macs[1] < 0.6 * effect.macs[0]
    order = before.argsort(descending=True).tolist()
    names = checkpoint.model.config.id2label
    assert [found.label for found in effect.classes] == [names[index] for index in order]
    assert [found.after for found in effect.classes] == pytest.approx([after[index].item() for index in order])
    assert [found.before for found in effect.classes] == pytest.approx([before[index].item() for index in order])
    assert not np.allclose(*effect.attention)


def test_removing_nothing_changes_nothing(explorer):
    effect = removal_effect(explorer.adapter, *_identity(6, []), explorer.prepare(picture()), timed_seconds=0.0)
    assert effect.parameters[0] == effect.parameters[1] and effect.macs[0] == effect.macs[1]
    assert effect.cosine == pytest.approx(1.0)
    assert all(found.before == found.after for found in effect.classes)


def test_a_fold_needs_images_to_fit_it_on():
    with pytest.raises(InputError, match="measure on a data set first"):
        maps_for(plan_without(6, [2], "fold"), None)


def test_all_blocks_but_the_first_can_be_picked(explorer):
    assert removable_blocks(explorer.adapter) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("kind", ["vit-classifier", "deit-own", "dinov2", "dinov3_vit", "clip", "siglip"])
def test_attention_is_that_of_the_last_block_and_leaves_the_model_as_it_was(kind):
    model = make_model(kind)
    adapter = adapter_for(model)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    usual = adapter.tower.config._attn_implementation
    found = attention_map(adapter, pixels)
    assert adapter.tower.config._attn_implementation == usual == "sdpa"

    seen = []  # an attention's input, from which its weights follow by their definition
    attention = next(m for n, m in adapter.layers[-1].named_modules() if hasattr(m, "q_proj"))
    if kind == "dinov3_vit":  # rotary positions: only the layout is checked
        assert found.shape == (4, 4) and found.sum() == pytest.approx(1)
        return
    attention.register_forward_pre_hook(
        lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        adapter.tower(pixels)
        x = seen[0]
        query, key = (p(x).unflatten(-1, (3, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)[0].mean(0)
    prefix = adapter.num_prefix_tokens
    row = (weights[0] if prefix else weights.mean(0))[prefix:]
    torch.testing.assert_close(torch.from_numpy(found).flatten(), row / row.sum(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_redundancy_is_the_mean_squared_change_of_cls(kind):
    model = make_model(kind)
    adapter = adapter_for(model)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        states = adapter.tower(pixels, output_hidden_states=True).hidden_states
    token = [s[:, 0] if adapter.num_prefix_tokens else s.mean(1) for s in states]
    found = redundancy_of(adapter, pixels)
    for first in range(6):
        for last in range(6):
            if last < first:
                assert np.isnan(found[first, last])
            elif last < 5:  # the last entry that transformers gives may be behind the final norm
                assert found[first, last] == pytest.approx(
                    (token[last + 1] - token[first]).square().mean().item(), rel=1e-4
                )


def _identity(depth, blocks):
    plan = plan_without(depth, blocks)
    return plan, maps_for(plan, None)
