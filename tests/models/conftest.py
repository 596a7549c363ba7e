"""Tiny random models of both families, stock and own."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_simprune import models


TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "pooler_output_size": 24,
}


@dataclass(frozen=True)
class Family:
    name: str
    stock_config: type[PreTrainedConfig]
    stock_model: type[PreTrainedModel]
    stock_classifier: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    classifier: type[PreTrainedModel]
    num_prefix: int

    def stock(self, kind: str = "model", **kwargs) -> PreTrainedModel:
        """A stock network in which every parameter is random, biases, norms and tokens too."""
        torch.manual_seed(0)
        network = (self.stock_model if kind == "model" else self.stock_classifier)(self.stock_config(**TINY, **kwargs))
        return randomise(network)

    def own(self, **kwargs) -> PreTrainedModel:
        torch.manual_seed(0)
        return randomise(self.model(self.config(**TINY, **kwargs), add_pooling_layer=False))


def randomise(network: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            offset = 1.0 if "layernorm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + 0.2 * torch.randn(parameter.shape))
    return network.eval()


VIT = Family(
    "vit",
    ViTConfig,
    ViTModel,
    ViTForImageClassification,
    models.SimPruneViTConfig,
    models.SimPruneViTModel,
    models.SimPruneViTForImageClassification,
    1,
)
DEIT = Family(
    "deit",
    DeiTConfig,
    DeiTModel,
    DeiTForImageClassification,
    models.SimPruneDeiTConfig,
    models.SimPruneDeiTModel,
    models.SimPruneDeiTForImageClassification,
    2,
)


@pytest.fixture(params=[VIT, DEIT], ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
