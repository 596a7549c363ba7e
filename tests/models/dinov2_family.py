"""Tiny random DINOv2 models, stock and own, for the tests that all families share and for those of this one."""

from dataclasses import dataclass

import torch
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model, PreTrainedModel

from hf_simprune import models

from .conftest import Family


SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Dinov2Family(Family):
    def stock(self, kind: str = "model", **kwargs) -> PreTrainedModel:
        torch.manual_seed(0)
        network = self.stock_model if kind == "model" else self.stock_classifier
        return randomise(network(self.stock_config(**{**SIZES, **kwargs})))

    def own(self, kind: str = "model", **kwargs) -> PreTrainedModel:
        torch.manual_seed(0)
        network = self.model if kind == "model" else self.classifier
        return randomise(network(self.config(**{**SIZES, **kwargs})))


def randomise(network: PreTrainedModel) -> PreTrainedModel:
    """Every parameter random: LayerScale, biases, norms and tokens too."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_gain = parameter.dim() == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_((1.0 if is_gain or "layer_scale" in name else 0.0) + 0.2 * torch.randn(parameter.shape))
    return network.eval()


DINOV2 = Dinov2Family(
    "dinov2",
    Dinov2Config,
    Dinov2Model,
    Dinov2ForImageClassification,
    models.SimPruneDinov2Config,
    models.SimPruneDinov2Model,
    models.SimPruneDinov2ForImageClassification,
    1,
)
