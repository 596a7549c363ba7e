# SPDX-License-Identifier: Apache-2.0
"""Patch slimming (arXiv 2106.02852), adapted to self-supervised training: fixed positions, chosen from the top down.

The paper prunes a trained network block by block and fine-tunes it. Adapted, because here the network is still to be
trained: every few epochs the unpruned teacher passes over a few batches; in between, all rows of a crop size keep the
same positions. For one crop size, blocks l = 0 .. L-1 and a batch of R rows:

    Z_l   (T, D)  the tokens that enter block l, layer-normalised without parameters
    A_l   (T, T)  its attention, averaged over heads
    r_l   (T)     what CLS still reads of each token after the blocks l .. L-1, from the top:
                  r_L = CLS alone,  r_l = r_(l+1) A_l, where patches that have left by block l count for nothing
    s_b,i = mean over rows of r_(b+1),i^2 * || sum_j A_b,ij |Z_b,j| ||^2     significance at a stage in block b

(s_b,i is the paper's ||A[:,i]||^2 ||U[i,:]||^2 with U = P|Z| for the one output that DINO reads, CLS; in the last
block, behind which nothing is read, r_b takes the place of r_(b+1).) The deepest stage keeps its K most significant
patches. Every stage above keeps those and the most significant of the others, so that masks are nested and what stays
is what later blocks use. Scores are sums over the batches of a calibration, in all processes; equal ones go by index.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ..errors import InputError
from .base import BranchReducer, ReductionSetting, Seen
from .token_maps import Kept, TokenMap, Unchanged
from .walk import BranchWalk


class Positions(nn.Module):
    """Kept positions and scores of one branch, as buffers: checkpoints carry them.

    For each number N of patches of a crop: `kept_<N>_<stage>` (K,) int64, ascending, counted in the crop, and
    `scores_<N>` (stages, N) fp64, sums over the calibration under way or last done. Before the first calibration the
    positions are spread evenly.
    """

    def __init__(self, counts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.counts = [list(of_size) for of_size in counts]
        for count, *after in self.counts:
            self.register_buffer(f"scores_{count}", torch.zeros(len(after), count, dtype=torch.float64))
            kept = torch.arange(count)
            for stage, keep in enumerate(after):
                kept = kept[torch.arange(keep) * len(kept) // keep]
                self.register_buffer(f"kept_{count}_{stage}", kept)

    def scores(self, count: int) -> Tensor:
        return self.get_buffer(f"scores_{count}")

    def kept(self, count: int, stage: int) -> Tensor:
        """Positions in a crop of `count` patches that `stage` keeps; stage -1 keeps all."""
        scores = self.scores(count)
        return torch.arange(count, device=scores.device) if stage < 0 else self.get_buffer(f"kept_{count}_{stage}")


class PatchSlimmingReducer(BranchReducer):
    """Patch slimming, adapted: each crop size keeps fixed positions that follow the teacher's attention.

    calibrate_epochs: epochs from the start of one calibration to that of the next; the first is at step 0.
    calibration_batches: batches, one an optimiser step; the positions are chosen anew after each, from the scores so
    far, and stay as they are until the next calibration.
    """

    name = "patch_slimming"
    counts_epochs = True

    def __init__(
        self,
        keep_rate: float,
        setting: ReductionSetting = ReductionSetting(),
        *,
        calibrate_epochs: float = 5.0,
        calibration_batches: int = 4,
    ) -> None:
        """Raises InputError for a keep rate outside (0, 1], a network without a [CLS] token, no time between
        calibrations, or no batches."""
        super().__init__(keep_rate, setting)
        if setting.num_prefix < 1:
            raise InputError(
                "token_reduction patch_slimming follows what the [CLS] token reads and this model has none: use a"
                " model with a [CLS] token, or a method that needs none, such as tome."
            )
        if not 0 < calibrate_epochs < float("inf"):
            raise InputError(f"calibrate_epochs {calibrate_epochs} is out of range: give a number above 0.")
        if calibration_batches < 1:
            raise InputError(f"calibration_batches {calibration_batches} is out of range: give 1 or more.")
        self.calibrate_epochs = calibrate_epochs
        self.calibration_batches = calibration_batches

    def build_learned(self) -> nn.Module | None:
        """Raises InputError where the crop sizes are not known, or would look alike at some stage."""
        if self.keep_rate == 1.0 or not self.layers:
            return None
        if not self.setting.grids:
            raise InputError("token_reduction patch_slimming: the sizes of all crops must be known when it is built.")
        # A crop size is known by the number of its patches, and that must be so at every stage.
        counts = {rows * columns: self.counts((rows, columns)) for rows, columns in self.setting.grids}
        for stage in range(len(self.layers)):
            entering = [of_size[stage] for of_size in counts.values()]
            if len(set(entering)) < len(entering):
                raise InputError(
                    f"token_reduction patch_slimming: crops of {' and '.join(map(str, counts))} patches have as many "
                    f"left at stage {stage}; choose crop sizes that differ more, or a higher keep_rate."
                )
        return Positions(list(counts.values()))

    def decide(self, seen: Seen) -> TokenMap:
        """Raises InputError at a crop size that there are no positions for."""
        rows, entering = seen.patches.shape[:2]
        if self.keep_rate == 1.0:
            return Unchanged(seen.patches)
        if seen.learned is None:
            raise ValueError("patch_slimming needs the branch's own positions: pass the module of build_learned")
        counts = next((found for found in seen.learned.counts if found[seen.stage] == entering), None)
        if counts is None:
            built_for = ", ".join(f"{height}x{width}" for height, width in self.setting.grids)
            raise InputError(
                f"token_reduction patch_slimming: a crop of {entering} patches at stage {seen.stage}, but it was "
                f"built for {built_for}; give a crop of one of these sizes, or build it for this one."
            )
        kept = seen.learned.kept(counts[0], seen.stage)
        # Of the tokens that enter, those at the kept positions.
        indices = torch.searchsorted(seen.learned.kept(counts[0], seen.stage - 1), kept)
        return Kept(indices.expand(rows, -1), entering)

    def before_step(self, step: int, steps_per_epoch: int | None, views: Sequence[Any], dual: Any) -> None:
        """Calibrate in the first `calibration_batches` steps of every `calibrate_epochs` epochs.

        Raises InputError where the length of an epoch is not known.
        """
        if self.keep_rate == 1.0 or not self.layers:
            return
        since = step % self.period(steps_per_epoch)
        if since >= self.calibration_batches:
            return
        positions: Positions = dual.teacher.reduction
        net = dual.teacher.backbone
        if since == 0:
            for count, *_ in positions.counts:
                positions.scores(count).zero_()
        for batch in views:
            for crops in (batch.global_crops, batch.local_crops):
                if crops is not None:
                    calibrate(positions, net, crops, self.layers)
        dual.student.reduction.load_state_dict(positions.state_dict())

    def period(self, steps_per_epoch: int | None) -> int:
        """Steps from the start of one calibration to that of the next."""
        if steps_per_epoch is None:
            raise InputError(
                f"calibrate_epochs {self.calibrate_epochs}: patch_slimming must know how long an epoch is; train on "
                "data of known length."
            )
        return max(1, round(self.calibrate_epochs * steps_per_epoch))


class AttentionRecorder(BranchReducer):
    """Reduces nothing: keeps the attention map (R, T, T) of each of its blocks."""

    name = "attention_recorder"
    site = "attention"

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__(1.0, ReductionSetting(tuple(layers)))
        self.attention: dict[int, Tensor] = {}

    def decide(self, seen: Seen) -> TokenMap:
        assert seen.attention is not None  # as at every `site` "attention"
        self.attention[self.layers[seen.stage]] = seen.attention
        return Unchanged(seen.patches)


@torch.no_grad()
def calibrate(positions: Positions, net: Any, crops: Tensor, layers: Sequence[int]) -> None:
    """Add the scores of `crops` (R, C, H, W), of one size, in all processes to `positions`, and choose anew.

    net: the unpruned teacher's backbone. layers: the blocks of the stages, ascending. The maps of all blocks from the
    first stage on are in memory at once, R T^2 fp32 numbers each.
    """
    attention, written = dense_pass(net, crops, layers)
    prefix, depth = net.num_prefix_tokens, len(net.layers)
    rows, length, _ = attention[depth - 1].shape
    scores = positions.scores(length - prefix)
    read = attention[depth - 1].new_zeros(rows, length)
    read[:, 0] = 1
    above, chosen = depth, None
    for stage in reversed(range(len(layers))):
        block = layers[stage]
        maps = [attention[index] for index in range(block + 1, above)]
        everything = torch.ones_like(read[0])
        free = propagate(read, maps if block < depth - 1 else [attention[block]], everything)
        found = (free[:, prefix:].square() * written[block]).sum(0, dtype=scores.dtype)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(found)
        scores[stage] += found
        kept = positions.kept(length - prefix, stage)
        chosen = kept.copy_(top_positions(scores[stage], len(kept), chosen))
        present = torch.cat([everything[:prefix], torch.zeros_like(everything[prefix:]).index_fill(0, chosen, 1)])
        read = propagate(read, maps, present)
        above = block + 1


def dense_pass(net: Any, crops: Tensor, layers: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Attention maps (R, T, T) from the first of `layers` on, and in `layers` what attention writes to each patch:
    || sum_j A_ij |Z_j| ||^2, (R, N)."""
    recorder = AttentionRecorder(range(layers[0], len(net.layers)))
    walk = BranchWalk(recorder, net.num_prefix_tokens, None)
    written = {}
    tokens = net.embed(crops)
    for index, layer in enumerate(net.layers):
        entering, tokens = tokens, walk.block(index, layer, tokens)
        if index in layers:
            normed = F.layer_norm(entering.float(), entering.shape[-1:]).abs()
            patches = recorder.attention[index][:, net.num_prefix_tokens :]
            written[index] = (patches @ normed).square().sum(-1)
    return recorder.attention, written


def propagate(read: Tensor, maps: Sequence[Tensor], present: Tensor) -> Tensor:
    """What is read of each token, (R, T), before the blocks with attention `maps` (R, T, T), from `read` behind them.

    Tokens that are not `present`, (T,) of 0 and 1, neither read nor are read.
    """
    read = read * present
    for attention in reversed(maps):
        read = (read.unsqueeze(1) @ attention).squeeze(1) * present
    return read


def top_positions(scores: Tensor, keep: int, chosen: Tensor | None) -> Tensor:
    """`keep` positions, ascending: those `chosen` before and the highest scores (N,) of the others, lower index first
    where they are equal."""
    if chosen is not None:
        scores = scores.index_fill(0, chosen, float("inf"))
    return scores.argsort(descending=True, stable=True)[:keep].sort().values
