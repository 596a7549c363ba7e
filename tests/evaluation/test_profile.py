# SPDX-License-Identifier: Apache-2.0
"""The analytic counter against PyTorch's operator-level one and the published totals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, DeiTConfig, DeiTModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_simprune.dino.dual_branch import Branch, DualBranch
from hf_simprune.dino.head import DinoHead
from hf_simprune.errors import InputError
from hf_simprune.evaluation.profile import (
    BackboneSpec,
    HeadSpec,
    backbone_macs,
    head_macs,
    matching_macs,
    step_flop_ratio,
    training_step_macs,
)
from hf_simprune.models.architectures import build_backbone
from hf_simprune.reduction import ReductionSetting, SimPruneReducer


LAYERS = (3, 6, 9)
DEIT_SMALL = BackboneSpec(hidden_size=384, depth=12, intermediate_size=1536, patch_size=16)
TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 80}


def counted_macs(run):
    """MACs of `run()` as FlopCounterMode sees its operators."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def pruned_forward(model, pixels, counts, layers):
    """A stock model's forward that keeps the first counts[i] patches in the middle of the i-th reduction block."""
    prefix, stage = (2 if isinstance(model, DeiTModel) else 1), 0
    hidden = model.embeddings(pixels)
    for index, layer in enumerate(model.layers):
        hidden = hidden + layer.attention(layer.layernorm_before(hidden))[0]
        if index in layers:
            hidden, stage = hidden[:, : prefix + counts[stage]], stage + 1
        hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
    return hidden


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (ViTConfig(image_size=32, patch_size=8, num_channels=1, **TINY), ViTModel),
        (DeiTConfig(image_size=32, patch_size=8, **TINY), DeiTModel),
        (ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536), ViTModel),
    ],
    ids=["tiny ViT", "tiny DeiT", "DeiT-S sized"],
)
def test_dense_and_reduced_counts_equal_the_operators_of_the_stock_model(config, model_class):
    with torch.device("meta"):
        config._attn_implementation = "eager"
        model = model_class(config, add_pooling_layer=False)
        pixels = torch.empty(1, config.num_channels, config.image_size, config.image_size)
    spec = BackboneSpec.from_config(config)
    patches = spec.num_patches(config.image_size)
    assert backbone_macs(spec, patches) == counted_macs(lambda: model(pixels))

    layers = (1, 3)
    counts = [-(-patches * 7 // 10)]
    counts.append(-(-counts[0] * 7 // 10))
    expected = counted_macs(lambda: pruned_forward(model, pixels, counts, layers))
    assert backbone_macs(spec, patches, 0.7, layers) == expected


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_counts_equal_the_operators_of_the_stock_model(gated):
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=3, image_size=42, use_swiglu_ffn=gated
    )
    with torch.device("meta"):
        config._attn_implementation = "eager"
        model = Dinov2Model(config)
        pixels = torch.empty(1, 3, 42, 42)
    assert backbone_macs(BackboneSpec.from_config(config), 9) == counted_macs(lambda: model(pixels))


def test_deit_small_costs_the_published_share():
    dense = backbone_macs(DEIT_SMALL, 196)
    assert dense / 1e9 == pytest.approx(4.598, abs=5e-4)
    for keep_rate, percent in ((0.8, 74.9), (0.7, 65.2)):
        reduced = backbone_macs(DEIT_SMALL, 196, keep_rate, LAYERS)
        assert 100 * reduced / dense == pytest.approx(percent, abs=0.1)
        step = training_step_macs(DEIT_SMALL, 196, keep_rate, LAYERS)
        # Three student forwards and one teacher forward on two views: matching adds less than a quarter of a point.
        assert 100 * (8 * reduced + step.matching) / (8 * dense) == pytest.approx(percent, abs=0.25)
        assert step.matching < 0.01 * step.total


def test_keeping_everything_costs_the_dense_price():
    assert backbone_macs(DEIT_SMALL, 196, 1.0, LAYERS) == backbone_macs(DEIT_SMALL, 196)
    assert step_flop_ratio(DEIT_SMALL, 196, 1.0, LAYERS, 36, 8) == 1


def test_head_counts_equal_the_operators_of_its_linear_layers():
    sizes = (48, 64, 64, 24)
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    head = torch.nn.Sequential(*layers, torch.nn.Linear(24, 100, bias=False))
    assert head_macs(48, HeadSpec(hidden_dim=64, bottleneck_dim=24, out_dim=100)) == counted_macs(
        lambda: head(torch.zeros(1, 48))
    )


def test_matching_counts_equal_the_operators_of_the_reducer():
    spec = BackboneSpec(hidden_size=8, depth=4, intermediate_size=16, patch_size=4)
    reducer, progress, images, crops = SimPruneReducer(0.7), torch.tensor(0.5), 3, 5

    def match(patches, local_patches):
        teacher, local = torch.randn(2 * images, patches, 8), torch.randn(crops * images, local_patches, 8)
        reducer.pair(teacher, teacher, progress)
        reducer.local(local, teacher, progress)

    counted = counted_macs(lambda: (match(16, 9), match(12, 7)))
    assert matching_macs(spec, 16, 0.7, (1, 2), 9, crops) * images == counted
    assert matching_macs(spec, 16, 1.0, (1, 2), 9, crops) == 0
    assert matching_macs(DEIT_SMALL, 196, 0.8, LAYERS) / 2 == pytest.approx(30e6, rel=0.02)


def test_a_training_step_adds_up_its_passes():
    head = HeadSpec(out_dim=1000)
    step = training_step_macs(DEIT_SMALL, 196, 0.7, LAYERS, 36, 8, head)
    view = backbone_macs(DEIT_SMALL, 196, 0.7, LAYERS, cls_only=True)
    crop = backbone_macs(DEIT_SMALL, 36, 0.7, LAYERS, cls_only=True)
    assert step.student == 3 * (2 * view + 8 * crop)
    assert step.teacher == 2 * view
    assert step.heads == (3 * 10 + 2) * head_macs(384, head)
    assert step.total == step.student + step.teacher + step.heads + step.loss + step.matching
    unmatched = training_step_macs(DEIT_SMALL, 196, 0.7, LAYERS, 36, 8, head, matching=False)
    assert unmatched.total == step.total - step.matching


@pytest.mark.parametrize("layers", [(), (1, 2), (1, 3)], ids=["dense", "reduced", "reduced in the last block too"])
def test_the_forward_of_a_training_step_equals_its_operators(layers):
    """Both branches as they are trained, with local crops, the last block for CLS alone, and the matching."""
    head, images, crops = HeadSpec(hidden_dim=20, bottleneck_dim=12, out_dim=40), 3, 5
    branches = [
        Branch(build_backbone("vit_micro", image_size=32, patch_size=8, **TINY), DinoHead(32, 40, 20, 12))
        for _ in range(2)
    ]
    for branch in branches:
        branch.backbone.set_attn_implementation("eager")
    dual = DualBranch(*branches, SimPruneReducer(0.7, ReductionSetting(layers)) if layers else None)
    views, local = torch.randn(2 * images, 3, 32, 32), torch.randn(crops * images, 3, 24, 24)
    spec = BackboneSpec.from_config(branches[0].backbone.config)
    step = training_step_macs(spec, 16, 0.7 if layers else 1.0, layers, 9, crops, head)
    forward = step.student // 3 + step.teacher + step.matching + (2 + crops + 2) * head_macs(32, head)
    assert images * forward == counted_macs(lambda: dual(views, local, torch.tensor(0.5)))


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="CLIPVisionConfig"):
        BackboneSpec.from_config(CLIPVisionConfig())
    with pytest.raises(InputError, match="patch_size"):
        BackboneSpec.from_config(ViTConfig(patch_size=[16, 8]))
    with pytest.raises(InputError, match="keep_rate"):
        backbone_macs(DEIT_SMALL, 196, 0.0, LAYERS)
    with pytest.raises(InputError, match="reduction_layers"):
        backbone_macs(DEIT_SMALL, 196, 0.8, (3, 12))
