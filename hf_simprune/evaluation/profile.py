# SPDX-License-Identifier: Apache-2.0
"""What a network and a training step cost, counted from their shapes.

All numbers are MACs (multiply-accumulates); FLOPs = 2 * MACs. Only matrix products and the patch convolution count.
Normalisation, activations, sorting, gathers, optimizer and EMA are left out: they are below one percent.

Token reduction is given as a keep rate with its layers, or as a reducer. `patches` are (rows, columns), or a number of
patches, which is taken for a square where it is one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import DeiTConfig, Dinov2Config, PretrainedConfig, ViTConfig

from ..errors import InputError
from ..reduction import (
    BranchReducer,
    PairReducer,
    RandomReducer,
    ReductionSetting,
    SimPruneReducer,
    TokenReducer,
    validate_reduction_layers,
)


Patches = int | tuple[int, int]


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
        """Read a ViT, DeiT or DINOv2 config, or one derived from them; raises InputError for any other.

        A gated MLP (SwiGLU) counts as the plain one of as many MACs.
        """
        if not isinstance(config, ViTConfig | DeiTConfig | Dinov2Config):
            raise InputError(
                f"config is a {type(config).__name__}: FLOPs are counted for ViT, DeiT and DINOv2 configs."
            )
        if not isinstance(config.patch_size, int):
            raise InputError(
                f"patch_size {config.patch_size} of the config is not a whole number: give square patches."
            )
        return cls(
            hidden_size=config.hidden_size,
            depth=config.num_hidden_layers,
            intermediate_size=_dinov2_mlp(config) if isinstance(config, Dinov2Config) else config.intermediate_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            num_prefix_tokens=2 if isinstance(config, DeiTConfig) else 1,
        )

    def num_patches(self, image_size: int) -> int:
        """Patches of a square image of `image_size` pixels."""
        return (image_size // self.patch_size) ** 2

    def setting(self, layers: Sequence[int], num_heads: int, *image_sizes: int) -> ReductionSetting:
        """What a reducer is built for; `image_sizes` of square images, in pixels a side."""
        grids = tuple((size // self.patch_size,) * 2 for size in image_sizes)
        return ReductionSetting(tuple(layers), self.depth, self.hidden_size, num_heads, self.num_prefix_tokens, grids)


def _dinov2_mlp(config: Dinov2Config) -> int:
    """Width of the plain MLP with as many MACs as DINOv2's: its gated one has three products in place of two."""
    width = int(config.hidden_size * config.mlp_ratio)
    if not config.use_swiglu_ffn:
        return width
    return 3 * ((int(width * 2 / 3) + 7) // 8 * 8) // 2


@dataclass(frozen=True)
class HeadSpec:
    """The sizes of a DINO projection head: three linear layers down to a bottleneck, then the prototypes."""

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    out_dim: int = 65536


@dataclass(frozen=True)
class StepMacs:
    """MACs of one training step per image, by part. `heads` holds student and teacher heads with their prototypes;
    `matching` is the token reduction's own work: matching, merging, gates."""

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
    num_patches: Patches,
    keep_rate: float | TokenReducer = 1.0,
    reduction_layers: Sequence[int] = (),
    cls_only: bool = False,
) -> int:
    """Forward MACs of one image of `num_patches` patches, without head, pooler or `overhead_macs`.

    With a keep rate the patches fall to ceil(keep_rate * n) between attention and MLP of each of `reduction_layers`
    (0-based). `cls_only`: the last block computes CLS alone, as in training; it still attends to all tokens.
    Raises InputError for a keep rate outside (0, 1] or a bad layer list.
    """
    reducer = _reducer(spec, keep_rate, reduction_layers)
    prefix, full = spec.num_prefix_tokens, math.prod(_grid(num_patches))
    counts = iter(reducer.counts(_grid(num_patches))[1:])
    total = full * spec.hidden_size * spec.num_channels * spec.patch_size**2
    tokens = full + prefix
    for block in range(spec.depth):
        after = next(counts) + prefix if block in reducer.layers else tokens
        if cls_only and block == spec.depth - 1:
            return total + _last_block_macs(spec, tokens, after, reducer)
        total += _block_macs(spec, tokens, after, reducer)
        tokens = full + prefix if block == getattr(reducer, "restore_after", None) else after
    return total


def overhead_macs(spec: BackboneSpec, num_patches: Patches, reducer: TokenReducer, cls_only: bool = False) -> int:
    """What `reducer` itself adds to one image's forward: evidence, merging, restoring; not matching across branches.

    `cls_only` as in `backbone_macs`: a stage in the last block is left out where CLS does not depend on it.
    """
    stages = list(enumerate(zip(reducer.layers, reducer.counts(_grid(num_patches)), strict=False)))
    return sum(
        reducer.overhead_macs(stage, patches)
        for stage, (block, patches) in stages
        if not (cls_only and block == spec.depth - 1) or _runs_for_cls(reducer)
    )


def head_macs(hidden_size: int, head: HeadSpec = HeadSpec()) -> int:
    """Forward MACs of the DINO head for one view."""
    mlp = hidden_size * head.hidden_dim + head.hidden_dim**2 + head.hidden_dim * head.bottleneck_dim
    return mlp + head.bottleneck_dim * head.out_dim


def matching_macs(
    spec: BackboneSpec,
    num_patches: Patches,
    keep_rate: float | TokenReducer,
    reduction_layers: Sequence[int] = (),
    num_local_patches: Patches = 0,
    num_local_crops: int = 0,
) -> int:
    """MACs of SimPrune's cosine matching per image in one training step; with a reducer that compares nothing, 0.

    Two pairs of global views, and each local crop against both teacher views. Where all tokens stay nothing is
    matched.
    """
    reducer = _reducer(spec, keep_rate, reduction_layers, matching=True)
    if not isinstance(reducer, PairReducer) or not reducer.compares:
        return 0
    counts = reducer.counts(_grid(num_patches))
    pairs = sum(2 * n * n for n, kept in zip(counts, counts[1:], strict=False) if kept < n)
    if num_local_crops:
        local = reducer.counts(_grid(num_local_patches))
        stages = zip(local, local[1:], counts, strict=False)
        pairs += num_local_crops * sum(2 * m * n for m, kept, n in stages if kept < m)
    return pairs * spec.hidden_size


def training_step_macs(
    spec: BackboneSpec,
    num_patches: Patches,
    keep_rate: float | TokenReducer = 1.0,
    reduction_layers: Sequence[int] = (),
    num_local_patches: Patches = 0,
    num_local_crops: int = 0,
    head: HeadSpec = HeadSpec(),
    matching: bool = True,
) -> StepMacs:
    """MACs per image of one DINO step on two global views of `num_patches` and `num_local_crops` local crops.

    The student sees all crops, forward and backward (three forwards); the teacher sees the global views, forward only.
    Of the last block only CLS is computed. `matching`: the keep rate is SimPrune's, not that of a method which
    compares nothing. Of the token reduction's own work what is learned counts three times in the student too.
    """
    reducer = _reducer(spec, keep_rate, reduction_layers, matching)
    student = teacher = 2 * backbone_macs(spec, num_patches, reducer, cls_only=True)
    own_student = own_teacher = 2 * overhead_macs(spec, num_patches, reducer, cls_only=True)
    if num_local_crops:
        student += num_local_crops * backbone_macs(spec, num_local_patches, reducer, cls_only=True)
        own_student += num_local_crops * overhead_macs(spec, num_local_patches, reducer, cls_only=True)
    if isinstance(reducer, PairReducer):  # what it adds to a row is done for the student alone, and is learned
        own = 3 * own_student
    else:
        own = (3 if isinstance(reducer, BranchReducer) and reducer.learns else 1) * own_student + own_teacher
    own += matching_macs(spec, num_patches, reducer, (), num_local_patches, num_local_crops)
    return StepMacs(
        student=3 * student,
        teacher=teacher,
        heads=(3 * (2 + num_local_crops) + 2) * head_macs(spec.hidden_size, head),
        # (sum of targets) . (sum of log-probabilities) and two same-view products, then the student's gradient.
        loss=2 * 3 * head.out_dim,
        matching=own,
    )


def step_flop_ratio(
    spec: BackboneSpec,
    num_patches: Patches,
    keep_rate: float | TokenReducer,
    reduction_layers: Sequence[int] = (),
    num_local_patches: Patches = 0,
    num_local_crops: int = 0,
    head: HeadSpec = HeadSpec(),
    matching: bool = True,
) -> float:
    """Cost of a training step with token reduction over that of the dense step, all parts of `StepMacs` included."""
    crops = (num_local_patches, num_local_crops, head, matching)
    reduced = training_step_macs(spec, num_patches, keep_rate, reduction_layers, *crops)
    return reduced.total / training_step_macs(spec, num_patches, 1.0, (), *crops).total


def _grid(patches: Patches) -> tuple[int, int]:
    if not isinstance(patches, int):
        return patches
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, patches)


def _reducer(
    spec: BackboneSpec, keep_rate: float | TokenReducer, layers: Sequence[int], matching: bool = False
) -> TokenReducer:
    if isinstance(keep_rate, TokenReducer):
        return keep_rate
    setting = ReductionSetting(validate_reduction_layers(layers, spec.depth), spec.depth, spec.hidden_size)
    return (SimPruneReducer if matching else RandomReducer)(keep_rate, setting)


def _block_macs(spec: BackboneSpec, tokens: int, after: int, reducer: TokenReducer) -> int:
    """A block that `tokens` enter and `after` leave, prefix included: they change at the reducer's site."""
    width, site = spec.hidden_size, getattr(reducer, "site", "middle")
    mlp = 2 * (tokens if site == "after" else after) * width * spec.intermediate_size
    if site == "attention":
        # q, k, v and scores of all tokens, then what is left of them times the values, and the output projection
        return (3 * tokens + after) * width**2 + (tokens**2 + after**2) * width + mlp
    return _attention_macs(spec, tokens) + mlp


def _attention_macs(spec: BackboneSpec, tokens: int) -> int:
    """q, k, v and output projections; scores and their product with the values."""
    return 4 * tokens * spec.hidden_size**2 + 2 * tokens**2 * spec.hidden_size


def _last_block_macs(spec: BackboneSpec, tokens: int, after: int, reducer: TokenReducer) -> int:
    """The last block for CLS alone: keys and values of all tokens, the rest of CLS."""
    width, reduces = spec.hidden_size, spec.depth - 1 in reducer.layers
    if reduces and isinstance(reducer, BranchReducer) and _runs_for_cls(reducer):
        return _block_macs(spec, tokens, after, reducer)
    # tokens that are matched here are attended in full first
    matched = _attention_macs(spec, tokens) if reduces and isinstance(reducer, PairReducer) else 0
    return matched + (2 * tokens + 2) * width**2 + 2 * tokens * width + 2 * width * spec.intermediate_size


def _runs_for_cls(reducer: TokenReducer) -> bool:
    """Whether a stage in the last block runs although only CLS is read of it."""
    return isinstance(reducer, PairReducer) or (isinstance(reducer, BranchReducer) and reducer.site == "attention")


def dinov2_patch_macs(
    spec: BackboneSpec,
    num_patches: Patches,
    masked_patches: float,
    keep_rate: float | TokenReducer = 1.0,
    reduction_layers: Sequence[int] = (),
    head: HeadSpec = HeadSpec(),
) -> float:
    """MACs per image that DINOv2's loss on masked patches adds to `training_step_macs`.

    Both branches compute the last block for all tokens of their two global views rather than for CLS alone, and
    project `masked_patches` of each view, the mean number that reaches the loss (`masked_tokens_kept` in the metrics).
    """
    reducer = _reducer(spec, keep_rate, reduction_layers)
    last_block = backbone_macs(spec, num_patches, reducer) - backbone_macs(spec, num_patches, reducer, cls_only=True)
    # two views; the student's forward and backward pass count three times, the teacher's forward pass once
    return 2 * (3 + 1) * (last_block + masked_patches * head_macs(spec.hidden_size, head))
