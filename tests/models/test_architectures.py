"""Networks by name."""

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.models import SimPruneDeiTModel, SimPruneViTModel
from hf_simprune.models.architectures import ARCHITECTURES, build_backbone


# Parameters of the published networks without classifier: ViT/DeiT-Ti, -S and -B at 224 px with patch 16.
PUBLISHED = {"tiny": 5_524_416, "small": 21_665_664, "base": 85_798_656}


@pytest.mark.parametrize("family", ["vit", "deit"])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_sizes_are_the_published_ones(family: str, size: str):
    with torch.device("meta"):
        model = build_backbone(f"{family}_{size}", image_size=224)
    width = ARCHITECTURES[f"{family}_{size}"]["hidden_size"]
    distillation = 2 * width if family == "deit" else 0  # the token and its position
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[size] + distillation
    assert model.pooler is None
    assert type(model) is (SimPruneDeiTModel if family == "deit" else SimPruneViTModel)
    assert model.config.layer_norm_eps == model.layernorm.eps == 1e-6


def test_vit_micro_is_for_small_images():
    model = build_backbone("vit_micro", image_size=32, drop_path_rate=0.1)
    assert model.config.hidden_size == 192 and len(model.layers) == 6 and model.config.num_attention_heads == 3
    assert model.embed(torch.zeros(1, 3, 32, 32)).shape == (1, 65, 192)
    assert model.layers[-1].drop_path_rate == 0.1


def test_settings_can_be_overridden():
    model = build_backbone("vit_tiny", 32, patch_size=8, hidden_size=48, num_hidden_layers=2, qkv_bias=False)
    assert model.config.intermediate_size == 192 and len(model.layers) == 2
    assert model.layers[0].attention.q_proj.bias is None
    assert build_backbone("vit_tiny", 32, hidden_size=48, intermediate_size=50).config.intermediate_size == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_huge"}, "architecture 'vit_huge' is unknown; choose one of vit_micro, .*dinov2_base$"),
        ({"hidden_sise": 48}, "architecture setting 'hidden_sise' is unknown; choose from .*hidden_size"),
        ({"image_size": 30}, "patch_size 4 does not divide image_size 30"),
        ({"patch_size": 5}, "patch_size 5 does not divide image_size 32"),
        ({"patch_size": 0}, "patch_size 0 must be a whole number of at least 1"),
        ({"image_size": 32.0}, "image_size 32.0 must be a whole number of at least 1"),
        ({"hidden_size": 100}, "num_attention_heads 3 does not divide hidden_size 100"),
        ({"drop_path_rate": 1.2}, "drop_path_rate must be at least 0 and below 1, got 1.2"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers 'four' must be a whole number"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict, message: str):
    with pytest.raises(InputError, match=message) as caught:
        build_backbone(**{"name": "vit_micro", "image_size": 32, **arguments})
    assert "\n" not in str(caught.value)
