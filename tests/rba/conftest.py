"""A tiny random model of every family and kind that can be compressed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_simprune import models


DEPTH = 6
WIDTH = 24
IMAGE_SIZE = 32
LABELS = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "elk"}

_TOWER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
_VIT = {**_TOWER, "intermediate_size": 40, "pooler_output_size": WIDTH}
_DINOV2 = {**_TOWER, "mlp_ratio": 2}
_DINOV3 = {**_TOWER, "intermediate_size": 40, "num_register_tokens": 2}
_CLIP = {**_TOWER, "intermediate_size": 40, "projection_dim": 16}
_SIGLIP = {**_TOWER, "intermediate_size": 40}
_TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_LABELLED = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}


def _clip(**settings) -> CLIPConfig:
    return CLIPConfig(text_config=_TEXT, vision_config=_CLIP, projection_dim=16, **settings)


def _siglip(**settings) -> SiglipConfig:
    return SiglipConfig(text_config={**_TEXT, "projection_size": WIDTH}, vision_config=_SIGLIP, **settings)


def _own(family: str, **settings) -> PreTrainedModel:
    if family == "dinov2":
        return models.SimPruneDinov2Model(models.SimPruneDinov2Config(**_DINOV2, **settings))
    config = {"vit": models.SimPruneViTConfig, "deit": models.SimPruneDeiTConfig}[family](**_VIT, **settings)
    kinds = {"vit": models.SimPruneViTModel, "deit": models.SimPruneDeiTModel}
    return kinds[family](config, add_pooling_layer=False)


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTModel(ViTConfig(**_VIT)),
    "vit-masked": lambda: ViTModel(ViTConfig(**_VIT), add_pooling_layer=False, use_mask_token=True),
    "vit-classifier": lambda: ViTForImageClassification(ViTConfig(**_VIT, **_LABELLED)),
    "vit-no-labels": lambda: ViTForImageClassification(ViTConfig(**_VIT, num_labels=0)),
    "vit-own": lambda: _own("vit"),
    "vit-own-classifier": lambda: models.SimPruneViTForImageClassification(
        models.SimPruneViTConfig(**_VIT, **_LABELLED, drop_path_rate=0.1)
    ),
    "deit": lambda: DeiTModel(DeiTConfig(**_VIT)),
    "deit-classifier": lambda: DeiTForImageClassification(DeiTConfig(**_VIT, **_LABELLED)),
    "deit-teacher": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**_VIT, **_LABELLED)),
    "deit-own": lambda: _own("deit"),
    "deit-own-classifier": lambda: models.SimPruneDeiTForImageClassification(
        models.SimPruneDeiTConfig(**_VIT, **_LABELLED)
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_DINOV2, drop_path_rate=0.1)),
    "dinov2-swiglu": lambda: Dinov2Model(Dinov2Config(**_DINOV2, use_swiglu_ffn=True, use_mask_token=False)),
    "dinov2-classifier": lambda: Dinov2ForImageClassification(Dinov2Config(**_DINOV2, **_LABELLED)),
    "dinov2-own": lambda: _own("dinov2", drop_path_rate=0.1),
    "dinov2-own-classifier": lambda: models.SimPruneDinov2ForImageClassification(
        models.SimPruneDinov2Config(**_DINOV2, **_LABELLED, use_swiglu_ffn=True)
    ),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_DINOV2)),
    "dinov2_with_registers-swiglu": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**_DINOV2, use_swiglu_ffn=True)
    ),
    "dinov2_with_registers-classifier": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**_DINOV2, **_LABELLED)
    ),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**_DINOV3)),
    "dinov3_vit-gated": lambda: DINOv3ViTModel(DINOv3ViTConfig(**_DINOV3, use_gated_mlp=True)),
    "clip": lambda: CLIPModel(_clip()),
    "clip-vision": lambda: CLIPVisionModel(CLIPVisionConfig(**_CLIP)),
    "clip-projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**_CLIP)),
    "clip-classifier": lambda: CLIPForImageClassification(_clip(**_LABELLED)),
    "siglip": lambda: SiglipModel(_siglip()),
    "siglip-vision": lambda: SiglipVisionModel(SiglipVisionConfig(**_SIGLIP)),
    "siglip-headless": lambda: SiglipVisionModel(SiglipVisionConfig(**_SIGLIP, vision_use_head=False)),
    "siglip-classifier": lambda: SiglipForImageClassification(_siglip(**_LABELLED)),
}


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model of one of `KINDS` in eval mode, every parameter random: biases, norms, LayerScale and tokens too."""
    torch.manual_seed(seed)
    model = KINDS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.dim() == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_((1.0 if is_gain else 0.0) + 0.2 * torch.randn(parameter.shape))
            if "layer_scale" in name:
                parameter.mul_(3.0)
    return model.eval()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> PreTrainedModel:
    return make_model(kind)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
