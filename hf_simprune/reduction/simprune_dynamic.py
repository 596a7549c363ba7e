# SPDX-License-Identifier: Apache-2.0
"""SimPrune's dynamic variant (ICLR 2025): learned gates choose, among half of the pairs, which ones leave.

At every stage SimPrune's sliding window always keeps N - N // 2 of N tokens; the N // 2 pairs outside of it are
candidates. A gate for each stage looks at the student's tokens: normalise, average the channels in groups of four, a
linear layer, a sigmoid. K is the always kept plus the mean number of candidates with a gate above 1/2, over all
rows of the pass in all processes, as a multiple of 4; so K follows the images, the stage and the training, and all
rows have the same. Each row keeps its best gates to exactly K. The kept candidates are multiplied by
1 + g - stopgrad(g), which is 1, so that the training loss reaches the gate; another term pulls the compute of the
pass to that of SimPrune at the same keep rate. The paper leaves gate, loss and K open: these are choices made here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ..errors import InputError
from .base import PairReducer, PairSelection, ReductionSetting, Selection, all_indices, token_counts
from .curriculum import window_offset
from .simprune import (
    cosine_similarity,
    descending_ranks,
    follow_student,
    local_scores,
    select_window,
    validate_matching,
)
from .token_maps import to_full_precision


MULTIPLE = 4
# A row of the global views goes through the student forward and backward and through the teacher; a local one only
# through the student. Backward costs two forwards.
_GLOBAL_PASSES, _LOCAL_PASSES = 4, 3
# Gates learn this much faster than their parameters move: AdamW moves each by the learning rate at most, and 1e-4 a
# step would not bring a gate from one side to the other within a short training.
_GAIN = 10.0


class Gate(nn.Module):
    """Tokens (R, n, D) to logits (R, n) in fp32; a token whose logit is above 0 wants to stay."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.groups = max(1, width // 4)
        self.linear = nn.Linear(self.groups, 1)
        # Averages of four normalised channels have a deviation of about 1/2, so that logits differ by about 1.
        nn.init.normal_(self.linear.weight, std=2 / (_GAIN * self.groups**0.5))
        nn.init.constant_(self.linear.bias, initial / _GAIN)

    def forward(self, patches: Tensor) -> Tensor:
        with torch.autocast(patches.device.type, enabled=False):
            normed = F.layer_norm(to_full_precision(patches), patches.shape[-1:])
            pooled = F.adaptive_avg_pool1d(normed, self.groups)
            weight, bias = self.linear.weight.to(pooled.dtype), self.linear.bias.to(pooled.dtype)
            return _GAIN * F.linear(pooled, weight, bias).squeeze(-1)


class Gates(nn.Module):
    """One gate for each stage."""

    def __init__(self, stages: int, width: int, initial: float) -> None:
        super().__init__()
        self.gates = nn.ModuleList(Gate(width, initial) for _ in range(stages))


class StageCount(NamedTuple):
    """What a stage did to one kind of crop: tokens before and after it, and the differentiable count after it."""

    before: int
    after: int
    soft: Tensor


class Chosen(NamedTuple):
    """Kept indices (R, K), ascending, what they are multiplied by, and the dropped indices (R, N - K)."""

    keep: Tensor
    factors: Tensor | None
    drop: Tensor


class SimPruneDynamicReducer(PairReducer):
    """SimPrune whose gates decide how many tokens stay and which, at the compute of SimPrune at `keep_rate`.

    matching: as in SimPrune; the teacher keeps K by the same rule. budget_weight: weight of the squared distance
    between the share of compute and its target. gate_init: what the logit of all gates starts around.
    """

    name = "simprune_dynamic"
    compares = True

    def __init__(
        self,
        keep_rate: float,
        setting: ReductionSetting = ReductionSetting(),
        *,
        matching: str = "one_way",
        budget_weight: float = 10.0,
        gate_init: float = 0.0,
    ) -> None:
        """Raises InputError for a keep rate outside [0.5, 1], an unknown matching, or a negative weight."""
        super().__init__(keep_rate, setting)
        validate_matching(matching)
        if keep_rate < 0.5:
            raise InputError(
                f"keep_rate {keep_rate}: simprune_dynamic keeps half of the tokens of every stage; give 0.5 or more."
            )
        if not 0 <= budget_weight < float("inf"):
            raise InputError(f"budget_weight {budget_weight} is out of range: give 0 or more.")
        if not abs(gate_init) < float("inf"):
            raise InputError(f"gate_init {gate_init} is not finite: give a number such as 0, -2 or 2.")
        self.matching = matching
        self.budget_weight = budget_weight
        self.gate_init = gate_init
        # Of the pass under way, until its loss is taken.
        self._global: list[StageCount] = []
        self._local: list[StageCount] = []
        self._rows = (0, 0)

    def build_learned(self) -> nn.Module | None:
        if self.keep_rate == 1.0 or not self.layers:
            return None
        return Gates(len(self.layers), self.setting.hidden_size, self.gate_init)

    def overhead_macs(self, stage: int, num_patches: int) -> int:
        """Those of the gate; the matching costs what SimPrune's does."""
        return 0 if self.keep_rate == 1.0 else num_patches * max(1, self.setting.hidden_size // 4)

    def pair(
        self, student: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: Any = None
    ) -> PairSelection:
        if stage == 0:
            self._forget()
        if self.keep_rate == 1.0:
            return PairSelection(all_indices(student), all_indices(teacher))
        images = teacher.shape[0] // 2
        with torch.no_grad():
            similarity = cosine_similarity(student, teacher.roll(images, 0))
            best, match = similarity.max(2)
        chosen, count = self._choose(student, best, progress, stage, learned)
        if learned.training:
            self._global.append(count)
            self._rows = (len(student), 0)
        with torch.no_grad():
            offset = window_offset(progress, count.before, count.after)
            if self.matching == "one_way":
                teacher_keep = follow_student(similarity, match, chosen.drop, offset)
            else:
                teacher_keep = select_window(similarity.amax(1), count.after, offset)
        return PairSelection(chosen.keep, teacher_keep.roll(images, 0), chosen.factors)

    def local(
        self, local: Tensor, teacher: Tensor, progress: Tensor, stage: int = 0, learned: Any = None
    ) -> Selection:
        if self.keep_rate == 1.0:
            return Selection(all_indices(local))
        with torch.no_grad():
            scores = local_scores(local, teacher)
        chosen, count = self._choose(local, scores, progress, stage, learned)
        if learned.training:
            self._local.append(count)
            self._rows = (self._rows[0], len(local))
        return Selection(chosen.keep, chosen.factors)

    def take_auxiliary_loss(self) -> Tensor | None:
        """budget_weight * (share of compute - target share)^2 of the training pass that just ended."""
        if not self._global:
            return None
        kinds, rows = [stages for stages in (self._global, self._local) if stages], self._rows
        self._forget()
        # As many as there are, with the gradient of the gates' sum.
        counts: list[list[int | Tensor]]
        counts = [[k[0].before, *(stage.after + stage.soft - stage.soft.detach() for stage in k)] for k in kinds]
        wanted = [token_counts(k[0].before, self.keep_rate, len(k)) for k in kinds]
        distance = pass_share(counts, rows, self.setting) - pass_share(wanted, rows, self.setting)
        assert isinstance(distance, Tensor)  # as the gates' sums are
        return self.budget_weight * distance**2

    def _choose(
        self, tokens: Tensor, scores: Tensor, progress: Tensor, stage: int, learned: Any
    ) -> tuple[Chosen, StageCount]:
        """Which of the student's tokens (R, N, D) with similarities `scores` (R, N) stay."""
        if learned is None:
            raise ValueError("simprune_dynamic needs the student's gates: pass the module of build_learned")
        rows, count = scores.shape
        always = count - count // 2
        logits = learned.gates[stage](tokens.detach())
        with torch.no_grad():
            edge = outside_window(scores, always, window_offset(progress, count, always))
            candidate = edge > 0
            keep = self._agree(((logits > 0) & candidate).sum(), rows, count, always, learned.training)
            kept, dropped = select_by_gates(edge, logits, keep)
        gates = logits.sigmoid()
        soft = always + (gates * candidate).sum() / rows
        factors = None
        if torch.is_grad_enabled():
            chosen = (gates * candidate).gather(1, kept)
            factors = (1 + (chosen - chosen.detach())).to(tokens.dtype)
        return Chosen(kept, factors, dropped), StageCount(count, keep, soft)

    def _agree(self, wanted: Tensor, rows: int, count: int, always: int, everywhere: bool) -> int:
        """K: `always` plus the mean number of wanted candidates, as a multiple of 4, from `always` to `count`."""
        totals = torch.stack([wanted, torch.full_like(wanted, rows)])
        # Outside of training a pass may run in one process alone.
        if everywhere and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(totals)
        total, rows = totals.tolist()
        # Halves go up; in integers, so that all processes agree whatever their rounding.
        keep = MULTIPLE * ((2 * (always * rows + total) + MULTIPLE * rows) // (2 * MULTIPLE * rows))
        return min(max(keep, always), count)

    def _forget(self) -> None:
        self._global, self._local, self._rows = [], [], (0, 0)


def outside_window(scores: Tensor, keep: int, offset: Tensor) -> Tensor:
    """How many ranks each score (R, N) is outside of the window of ranks offset .. offset + keep - 1; inside 0 or
    less. int64 (R, N)."""
    rank = descending_ranks(scores)
    return torch.maximum(offset - rank, rank - (offset + keep - 1))


def select_by_gates(edge: Tensor, logits: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices (R, keep), ascending, of the tokens that stay, and (R, N - keep) of the others.

    First those inside the window, with `edge` (R, N) at most 0; then the highest `logits` (R, N), of equal ones those
    nearer to the window, then the lower index.
    """
    order = edge.argsort(dim=-1, stable=True)
    wish = logits.masked_fill(edge <= 0, float("inf")).gather(1, order)
    order = order.gather(1, wish.argsort(dim=-1, descending=True, stable=True))
    return order[:, :keep].sort(dim=-1).values, order[:, keep:]


def blocks_macs(counts: Sequence[int | Tensor], setting: ReductionSetting) -> float | Tensor:
    """MACs of one row in all blocks over their width D, from patch counts before the first stage and after each.

    A block has 12 n D^2 + 2 n^2 D; where tokens leave, between attention and MLP, 4 n D^2 + 2 n^2 D + 8 n' D^2. MLPs
    four times as wide as tokens; the patch embedding, the same for all, is left out. Differentiable in the counts.
    """
    width, stages = setting.hidden_size, iter(counts)
    tokens = next(stages) + setting.num_prefix
    total: float | Tensor = 0.0
    for block in range(setting.depth):
        total = total + 4 * tokens * width + 2 * tokens * tokens
        if block in setting.layers:
            tokens = next(stages) + setting.num_prefix
        total = total + 8 * tokens * width
    return total


def pass_share(
    counts: Sequence[Sequence[int | Tensor]], rows: Sequence[int], setting: ReductionSetting
) -> float | Tensor:
    """Compute of a training pass over that of the dense one, as far as tokens go; differentiable in the counts.

    counts: of the global and then, if there are any, the local crops, patches before the first stage and after each.
    rows: number of crops of both kinds.
    """
    spent: float | Tensor = 0.0
    dense: float | Tensor = 0.0
    for of_kind, number, passes in zip(counts, rows, (_GLOBAL_PASSES, _LOCAL_PASSES), strict=False):
        spent = spent + number * passes * blocks_macs(of_kind, setting)
        dense += number * passes * blocks_macs([of_kind[0]] * len(of_kind), setting)
    return spent / dense
