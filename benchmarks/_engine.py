# SPDX-License-Identifier: Apache-2.0
"""Random crops and a whole training step of this package, for the benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from hf_simprune.dino.allocator import keep_freed_memory
from hf_simprune.dino.build import default_attention
from hf_simprune.dino.dual_branch import Branch, DualBranch
from hf_simprune.dino.engine import DinoEngine, Views
from hf_simprune.dino.head import DinoHead
from hf_simprune.dino.schedules import StepValues
from hf_simprune.dino.sharding import Sharding
from hf_simprune.evaluation.profile import BackboneSpec
from hf_simprune.models.architectures import build_backbone
from hf_simprune.reduction import TokenReducer, build_reducer, default_reduction_layers


GLOBAL_SIZE, LOCAL_SIZE = 224, 96
# Mid-training values: nothing is warming up or frozen, the window is in the middle.
VALUES = StepValues(
    learning_rate=1.5e-5,
    weight_decay=0.04,
    momentum_teacher=0.996,
    teacher_temp=0.04,
    last_layer_frozen=False,
    window_progress=0.5,
)


@dataclass(frozen=True)
class Setting:
    """What all sides of a race share."""

    architecture: str
    batch: int
    local_crops_number: int
    out_dim: int
    drop_path_rate: float
    bf16: bool
    device: torch.device
    seed: int


def random_crops(setting: Setting) -> list[torch.Tensor]:
    """Two global crops and the local ones, each (B, 3, size, size), standard normal."""
    generator = torch.Generator().manual_seed(setting.seed)
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * setting.local_crops_number
    crops = [torch.randn(setting.batch, 3, size, size, generator=generator) for size in sizes]
    return [crop.to(setting.device) for crop in crops]


def build_benchmark_reducer(
    config: PretrainedConfig, keep_rate: float, reduction: str = "simprune", options: dict[str, Any] | None = None
) -> TokenReducer | None:
    """The reducer for a network of `config` on `random_crops` in the default layers; None at keep rate 1."""
    if keep_rate == 1.0:
        return None
    layers = default_reduction_layers(config.num_hidden_layers)
    spec = BackboneSpec.from_config(config)
    setting = spec.setting(layers, config.num_attention_heads, GLOBAL_SIZE, LOCAL_SIZE)
    return build_reducer(reduction, keep_rate, setting, options)


def build_engine(
    setting: Setting,
    keep_rate: float,
    clip_grad: float | None = None,
    reduction: str = "simprune",
    options: dict[str, Any] | None = None,
    sharding: Sharding | None = None,
) -> DinoEngine:
    """Model, optimiser and objective: dense at keep rate 1, with `reduction` below."""
    if setting.device.type == "cpu":
        keep_freed_memory()  # as a run does
    torch.manual_seed(setting.seed)
    student, teacher = (
        Branch(backbone, DinoHead(backbone.config.hidden_size, setting.out_dim))
        for backbone in (
            build_backbone(setting.architecture, GLOBAL_SIZE, drop_path_rate=rate)
            for rate in (setting.drop_path_rate, 0.0)
        )
    )
    for branch in (student, teacher):
        branch.backbone.set_attn_implementation(default_attention(setting.device.type, setting.bf16))
    reducer = build_benchmark_reducer(student.backbone.config, keep_rate, reduction, options)
    accelerator = Accelerator(cpu=setting.device.type == "cpu", mixed_precision="bf16" if setting.bf16 else "no")
    dual = DualBranch(student, teacher, reducer)
    return DinoEngine(dual, accelerator, clip_grad=clip_grad, sharding=sharding)


def build_step(
    setting: Setting,
    crops: list[torch.Tensor],
    keep_rate: float,
    clip_grad: float | None = None,
    reduction: str = "simprune",
    options: dict[str, Any] | None = None,
) -> Callable[[], float]:
    """A whole training step. Returns its loss."""
    engine = build_engine(setting, keep_rate, clip_grad, reduction, options)

    def step() -> float:
        local = torch.cat(crops[2:]) if len(crops) > 2 else None
        return engine.step([Views(torch.cat(crops[:2]), local)], VALUES).loss

    return step
