# SPDX-License-Identifier: Apache-2.0
"""Self-slimmed ViT: learned soft merging of tokens (arXiv 2111.12624).

The token slimming module (TSM) makes K tokens of n: x' = W^T x with W = softmax over the n tokens of
scale * MLP(LN(x)), an MLP D -> D/2 -> K. Every new token is a convex mix of all old ones. K is the shape of a
parameter, so each stage has one TSM for each crop size. Reported is the TSM alone: that is what `self_slimmed` is
unless feature recalibration is asked for.

Feature recalibration, optional: the reverse module (RTSM) rebuilds all N patch tokens of a global crop from those that
the last stage leaves, tokens K -> 4N -> N and then channels D -> 4D -> D with a residual; its mean squared error
against the features of the unpruned teacher at that depth, both layer-normalised, is added to the loss. The paper does
so at every layer, which costs more than the slimming saves. Here it is the last stage alone, and still costs, of the
student's forward, about 7% for the RTSM, and a dense forward of the teacher up to that stage for each global crop.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .base import BranchReducer, ReductionSetting, Seen, keep_count
from .token_maps import TokenMap, Unchanged, mix_tokens, to_full_precision


class Slimmed(TokenMap):
    """Every output token is a mix of all tokens with `weights` (R, K, n), rows that sum to 1."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.count = weights.shape[-1]

    def apply(self, patches: Tensor) -> Tensor:
        return mix_tokens(self.weights, patches)

    def groups(self) -> Tensor:
        """The output token that has the most of each token; the lower index where two have as much."""
        return self.weights.detach().argmax(1)


class TokenSlimming(nn.Module):
    """TSM: patch tokens (R, n, D) to the weights (R, K, n) of K mixes, fp32."""

    def __init__(self, width: int, keep: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = two_layers(width, max(1, width // 2), keep)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, patches: Tensor) -> Tensor:
        logits = to_full_precision(self.mlp(self.norm(patches)))
        return (logits * self.scale.to(logits.dtype)).softmax(1).transpose(1, 2)


class ReverseSlimming(nn.Module):
    """RTSM: K tokens (R, K, D) to N, (R, N, D)."""

    def __init__(self, width: int, keep: int, count: int) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        self.tokens = two_layers(keep, 4 * count, count)
        self.norm_channels = nn.LayerNorm(width)
        self.channels = two_layers(width, 4 * width, width)

    def forward(self, patches: Tensor) -> Tensor:
        rebuilt = self.tokens(self.norm_tokens(patches).transpose(1, 2)).transpose(1, 2)
        return rebuilt + self.channels(self.norm_channels(rebuilt))


class SlimmingModules(nn.Module):
    """A TSM for every stage and number of tokens that enters it, and the RTSM where there is one."""

    def __init__(self, slimming: dict[str, nn.Module], reverse: nn.Module | None) -> None:
        super().__init__()
        self.slimming = nn.ModuleDict(slimming)
        self.reverse = reverse


class SelfSlimmedReducer(BranchReducer):
    """K = ceil(keep_rate * n) learned mixes of the n patch tokens behind each stage's block; CLS bypasses them.

    The teacher's modules are the moving average of the student's. recalibration: weight of the recalibration loss, 0
    for none.
    """

    name = "self_slimmed"
    merges = True
    site = "after"
    learns = True

    def __init__(
        self,
        keep_rate: float,
        setting: ReductionSetting = ReductionSetting(),
        *,
        recalibration: float = 0.0,
    ) -> None:
        """Raises InputError for a keep rate outside (0, 1], or a negative weight."""
        super().__init__(keep_rate, setting)
        if not 0 <= recalibration < float("inf"):
            raise InputError(f"recalibration {recalibration} is out of range: give 0 or more.")
        # Behind the last block there is nothing left that a loss would see.
        before_last = [stage for stage, layer in enumerate(self.layers) if layer < setting.depth - 1]
        rebuilds = recalibration > 0 and keep_rate < 1 and bool(before_last)
        if rebuilds and setting.grids[:1] and setting.grids[0] in setting.grids[1:]:
            raise InputError(
                f"recalibration {recalibration}: global and local crops must differ in size, both have "
                f"{sizes_in_words(setting.grids[:1])} patches; change one of them or give 0."
            )
        self.recalibration = recalibration
        self._rebuilt_stage = before_last[-1] if rebuilds else None
        # Of the pass under way: the unpruned teacher's features (2B, N, D), and the loss until it is taken.
        self._features: Tensor | None = None
        self._loss: Tensor | None = None

    def build_learned(self) -> nn.Module | None:
        """Raises InputError where the crop sizes are not known."""
        if self.keep_rate == 1.0 or not self.layers:
            return None
        width = self.setting.hidden_size
        if not self.setting.grids:
            raise InputError("token_reduction self_slimmed: the sizes of all crops must be known when it is built.")
        slimming: dict[str, nn.Module] = {}
        for grid in self.setting.grids:
            for stage, count in enumerate(self.counts(grid)[:-1]):
                if module_name(stage, count) not in slimming:
                    slimming[module_name(stage, count)] = TokenSlimming(width, keep_count(count, self.keep_rate))
        reverse = None
        if self._rebuilt_stage is not None:
            counts = self.counts(self.setting.grids[0])
            reverse = ReverseSlimming(width, counts[self._rebuilt_stage + 1], counts[0])
        return SlimmingModules(slimming, reverse)

    def decide(self, seen: Seen) -> TokenMap:
        """Raises InputError at a crop size that the modules were not built for."""
        count = seen.patches.shape[1]
        if self.keep_rate == 1.0:
            return Unchanged(seen.patches)
        if seen.learned is None:
            raise ValueError("self_slimmed needs the branch's own modules: pass the module of build_learned")
        name = module_name(seen.stage, count)
        if name not in seen.learned.slimming:
            given = f"{count} tokens at stage {seen.stage}" if seen.grid is None else sizes_in_words([seen.grid])
            raise InputError(
                f"token_reduction self_slimmed: a crop of {given} patches, but it was built for "
                f"{sizes_in_words(self.setting.grids)}; give a crop of one of these sizes, or build it for this one."
            )
        found = Slimmed(seen.learned.slimming[name](seen.patches))
        if self._is_rebuilt(seen):
            # Computed at every call, kept where there is a pass to take it: activations may be computed again.
            loss = self._recalibration_loss(seen.learned.reverse(found.apply(seen.patches)))
            self._loss = loss if self._loss is None else self._loss
        return found

    def before_pass(self, global_crops: Tensor, dual: Any) -> None:
        """The dense forward of the teacher that recalibration compares with."""
        self._features, self._loss = None, None
        if self._rebuilt_stage is None:
            return
        net = dual.teacher.backbone
        with torch.no_grad():
            tokens = net.embed(global_crops)
            for layer in net.layers[: self.layers[self._rebuilt_stage] + 1]:
                tokens = layer(tokens)
            self._features = tokens[:, net.num_prefix_tokens :]

    def take_auxiliary_loss(self) -> Tensor | None:
        loss, self._loss = self._loss, None
        return None if loss is None else self.recalibration * loss

    def overhead_macs(self, stage: int, num_patches: int) -> int:
        """TSM and the mixing. With recalibration also, at its stage, the RTSM of the student's forward and backward
        and the dense forward of the teacher, spread over the four passes of a global crop in a step: three of the
        student (backward counts two), one of the teacher."""
        keep, width = keep_count(num_patches, self.keep_rate), self.setting.hidden_size
        if self.keep_rate == 1.0:
            return 0
        macs = num_patches * (width * (width // 2) + (width // 2) * keep) + keep * num_patches * width
        if stage != self._rebuilt_stage or not self.setting.grids:
            return macs
        counts = self.counts(self.setting.grids[0])
        if num_patches != counts[stage]:
            return macs
        reverse = width * 4 * counts[0] * (keep + counts[0]) + counts[0] * 8 * width**2
        tokens = counts[0] + self.setting.num_prefix
        dense = (self.layers[stage] + 1) * (12 * tokens * width**2 + 2 * tokens**2 * width)
        return macs + (3 * reverse + dense) // 4

    def _is_rebuilt(self, seen: Seen) -> bool:
        """Whether this is the student's global crops at the stage that is rebuilt, in a training pass."""
        return (
            seen.stage == self._rebuilt_stage
            and self._features is not None
            and seen.learned.training
            and torch.is_grad_enabled()
            and seen.patches.shape[1] == self.counts(self.setting.grids[0])[seen.stage]
        )

    def _recalibration_loss(self, rebuilt: Tensor) -> Tensor:
        width = rebuilt.shape[-1:]
        assert self._features is not None  # which `_is_rebuilt` has asked
        with torch.autocast(rebuilt.device.type, enabled=False):
            rebuilt, target = to_full_precision(rebuilt), to_full_precision(self._features)
            return F.mse_loss(F.layer_norm(rebuilt, width), F.layer_norm(target, width))


def two_layers(given: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, GELU, linear, with the initialisation of ViT."""
    first, second = nn.Linear(given, hidden), nn.Linear(hidden, out)
    for layer in (first, second):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.GELU(), second)


def module_name(stage: int, count: int) -> str:
    return f"stage{stage}_tokens{count}"


def sizes_in_words(grids: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{rows}x{columns}" for rows, columns in grids)
