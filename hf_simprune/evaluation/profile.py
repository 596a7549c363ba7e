# SPDX-License-Identifier: Apache-2.0
"""What a network and a training step cost, counted from their shapes.

All numbers are MACs (multiply-accumulates); FLOPs = 2 * MACs. Only matrix products and the patch convolution count.
Normalisation, activations, sorting, gathers, optimizer and EMA are left out: they are below one percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import DeiTConfig, PretrainedConfig, ViTConfig

from ..errors import InputError
from ..reduction import token_counts, validate_reduction_layers


@dataclass(frozen=True)
class BackboneSpec:
    """The sizes of a ViT that decide its cost. `num_prefix_tokens` is 1 for ViT ([CLS]) and 2 for DeiT."""

    hidden_size: int
    depth: int
    intermediate_size: int
    patch_size: int
    num_channels: int = 3
    num_prefix_tokens: int = 1

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "BackboneSpec":
        """Read a ViT or DeiT config, or one derived from them; raises InputError for any other."""
        if not isinstance(config, ViTConfig | DeiTConfig):
            raise InputError(f"config is a {type(config).__name__}: FLOPs are counted for ViT and DeiT configs.")
        if not isinstance(config.patch_size, int):
            raise InputError(
                f"patch_size {config.patch_size} of the config is not a whole number: give square patches."
            )
        return cls(
            hidden_size=config.hidden_size,
            depth=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            num_prefix_tokens=2 if isinstance(config, DeiTConfig) else 1,
        )

    def num_patches(self, image_size: int) -> int:
        """Patches of a square image of `image_size` pixels."""
        return (image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class HeadSpec:
    """The sizes of a DINO projection head: three linear layers down to a bottleneck, then the prototypes."""

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    out_dim: int = 65536


@dataclass(frozen=True)
class StepMacs:
    """MACs of one training step per image, by part. `heads` holds student and teacher heads with their prototypes."""

    student: int
    teacher: int
    heads: int
    loss: int
    matching: int

    @property
    def total(self) -> int:
        return self.student + self.teacher + self.heads + self.loss + self.matching


def backbone_macs(
    spec: BackboneSpec,
    num_patches: int,
    keep_rate: float = 1.0,
    reduction_layers: Sequence[int] = (),
    cls_only: bool = False,
) -> int:
    """Forward MACs of one image of `num_patches` patches, without head or pooler.

    At each of `reduction_layers` (0-based) the patches fall to ceil(keep_rate * n) between attention and MLP.
    `cls_only`: the last block computes CLS alone, as in training; it still attends to all tokens.
    Raises InputError for a keep rate outside (0, 1] or a bad layer list.
    """
    layers = validate_reduction_layers(reduction_layers, spec.depth)
    width, prefix = spec.hidden_size, spec.num_prefix_tokens
    stages = iter(token_counts(num_patches, keep_rate, len(layers)))
    total = num_patches * width * spec.num_channels * spec.patch_size**2
    tokens = next(stages) + prefix
    for block in range(spec.depth):
        # q, k, v and output projections; scores and their product with the values.
        attention = 4 * tokens * width**2 + 2 * tokens**2 * width
        if cls_only and block == spec.depth - 1:
            # keys and values of all tokens, the rest of CLS; tokens that are matched here are attended in full first
            total += attention if block in layers else 0
            return total + (2 * tokens + 2) * width**2 + 2 * tokens * width + 2 * width * spec.intermediate_size
        total += attention
        if block in layers:
            tokens = next(stages) + prefix
        total += 2 * tokens * width * spec.intermediate_size
    return total


def head_macs(hidden_size: int, head: HeadSpec = HeadSpec()) -> int:
    """Forward MACs of the DINO head for one view."""
    mlp = hidden_size * head.hidden_dim + head.hidden_dim**2 + head.hidden_dim * head.bottleneck_dim
    return mlp + head.bottleneck_dim * head.out_dim


def matching_macs(
    spec: BackboneSpec,
    num_patches: int,
    keep_rate: float,
    reduction_layers: Sequence[int],
    num_local_patches: int = 0,
    num_local_crops: int = 0,
) -> int:
    """MACs of SimPrune's cosine matching per image in one training step.

    Two pairs of global views, and each local crop against both teacher views. Nothing is matched at keep rate 1.
    """
    if keep_rate == 1.0:
        return 0
    stages = len(validate_reduction_layers(reduction_layers, spec.depth))
    global_counts = token_counts(num_patches, keep_rate, stages)[:stages]
    local_counts = token_counts(num_local_patches, keep_rate, stages)[:stages] if num_local_crops else [0] * stages
    pairs = zip(global_counts, local_counts, strict=True)
    return sum(2 * (n + num_local_crops * m) * n * spec.hidden_size for n, m in pairs)


def training_step_macs(
    spec: BackboneSpec,
    num_patches: int,
    keep_rate: float = 1.0,
    reduction_layers: Sequence[int] = (),
    num_local_patches: int = 0,
    num_local_crops: int = 0,
    head: HeadSpec = HeadSpec(),
    matching: bool = True,
) -> StepMacs:
    """MACs per image of one DINO step on two global views of `num_patches` and `num_local_crops` local crops.

    The student sees all crops, forward and backward (three forwards); the teacher sees the global views, forward only.
    Of the last block only CLS is computed. `matching` is False for reducers that compare nothing.
    """
    student = teacher = 2 * backbone_macs(spec, num_patches, keep_rate, reduction_layers, cls_only=True)
    if num_local_crops:
        student += num_local_crops * backbone_macs(spec, num_local_patches, keep_rate, reduction_layers, cls_only=True)
    return StepMacs(
        student=3 * student,
        teacher=teacher,
        heads=(3 * (2 + num_local_crops) + 2) * head_macs(spec.hidden_size, head),
        # (sum of targets) . (sum of log-probabilities) and two same-view products, then the student's gradient.
        loss=2 * 3 * head.out_dim,
        matching=matching_macs(spec, num_patches, keep_rate, reduction_layers, num_local_patches, num_local_crops)
        if matching
        else 0,
    )


def step_flop_ratio(
    spec: BackboneSpec,
    num_patches: int,
    keep_rate: float,
    reduction_layers: Sequence[int],
    num_local_patches: int = 0,
    num_local_crops: int = 0,
    head: HeadSpec = HeadSpec(),
    matching: bool = True,
) -> float:
    """Cost of a training step with token reduction over that of the dense step, head, loss and matching included."""
    crops = (num_local_patches, num_local_crops, head, matching)
    reduced = training_step_macs(spec, num_patches, keep_rate, reduction_layers, *crops)
    return reduced.total / training_step_macs(spec, num_patches, 1.0, (), *crops).total
