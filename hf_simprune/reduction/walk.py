# SPDX-License-Identifier: Apache-2.0
"""One pass of one branch through its blocks while a single-branch reducer makes its tokens fewer."""

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import BranchReducer, Seen
from .token_maps import TokenMap


class ReductionStep:
    """One stage of one pass, handed to a block as its `reduction`.

    The block calls it once at its site; where activations are computed again in the backward pass it calls it again,
    and gets the same decision. `tokens` are (R, prefix + n, D). It holds no reference to the walk: a cycle would keep
    activations alive until the garbage collector comes round.
    """

    def __init__(self, walk: "BranchWalk", stage: int) -> None:
        self.reducer = walk.reducer
        self.prefix = walk.num_prefix
        self.learned = walk.learned
        self.records_before = walk.records_before
        self.stage = stage
        self.sizes = walk.sizes
        self.grid = walk.grid
        self.full_grid = walk.full_grid
        self.map: TokenMap | None = None
        self.before: Tensor | None = None
        self._tracked = torch.is_grad_enabled()

    @property
    def found(self) -> TokenMap:
        """What became of the patch tokens, once the block has called."""
        assert self.map is not None
        return self.map

    @property
    def site(self) -> str:
        return self.reducer.site

    @property
    def needs(self) -> str:
        return self.reducer.needs

    @property
    def learns(self) -> bool:
        return self.reducer.learns

    def decide(self, tokens: Tensor, attention: Tensor | None) -> TokenMap:
        """What becomes of the patch tokens; `attention` is what the reducer needs of the block's attention."""
        if self.map is not None and not self.learns:
            return self.map
        sizes = None if self.sizes is None else self.sizes[:, self.prefix :]
        patches = tokens[:, self.prefix :]
        place = (self.grid, self.stage, self.prefix, self.learned, self.full_grid)
        if self.learns:
            self.map = self.reducer.decide(Seen(patches, attention, sizes, *place))
        else:
            with torch.no_grad():
                self.map = self.reducer.decide(Seen(patches.detach(), attention, sizes, *place))
        return self.map

    def apply(self, found: TokenMap, tokens: Tensor) -> Tensor:
        """The decided map on any tokens (R, prefix + n, E), such as values of all heads; the prefix is untouched."""
        return torch.cat([tokens[:, : self.prefix], found.apply(tokens[:, self.prefix :])], dim=1)

    def __call__(self, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
        """Decide and apply: (R, prefix + n, D) to (R, prefix + m, D)."""
        found = self.decide(tokens, attention)
        if self.records_before and self.before is None:
            if self._tracked and not torch.is_grad_enabled():
                raise InputError(
                    "gradient checkpointing with use_reentrant=True loses gradients where tokens are restored: "
                    "give use_reentrant=False"
                )
            self.before = tokens[:, self.prefix :]
        return self.apply(found, tokens)


class BranchWalk:
    """The state of one pass: the sizes of merged tokens, the grid, and the maps of the stages so far.

    Args:
        reducer: decides.
        num_prefix: prefix tokens of the network.
        grid: (rows, columns) of patches, None where unknown.
        learned: the branch's module from `reducer.build_learned`.
        records_before: keep what `restore` needs, the patch tokens that entered every stage.
    """

    def __init__(
        self,
        reducer: BranchReducer,
        num_prefix: int,
        grid: tuple[int, int] | None,
        learned: nn.Module | None = None,
        records_before: bool = False,
    ) -> None:
        self.reducer = reducer
        self.num_prefix = num_prefix
        self.grid = self.full_grid = grid
        self.learned = learned
        self.records_before = records_before or reducer.restore_after is not None
        self.sizes: Tensor | None = None
        self.steps: list[ReductionStep] = []
        self._open: list[ReductionStep] = []  # those not restored yet

    @property
    def maps(self) -> list[TokenMap]:
        """What every stage so far did, in order."""
        return [step.found for step in self.steps]

    def block(self, index: int, layer: nn.Module, tokens: Tensor, **kwargs) -> Tensor:
        """Tokens after block `index`, reduced if the reducer has a stage there; `kwargs` go to the block."""
        bias = self.key_bias(tokens)
        if index not in self.reducer.layers:
            tokens = layer(tokens, bias, **kwargs)
        else:
            step = ReductionStep(self, self.reducer.layers.index(index))
            tokens = layer(tokens, bias, reduction=step, **kwargs)
            self._take_over(step)
        return self.restore(tokens) if index == self.reducer.restore_after else tokens

    def key_bias(self, tokens: Tensor) -> Tensor | None:
        """(R, 1, 1, T), added to attention scores: the logarithm of the sizes where merged tokens count for more."""
        if self.sizes is None or not self.reducer.weighs_sizes:
            return None
        return self.sizes.log().to(tokens.dtype)[:, None, None, :]

    def restore(self, tokens: Tensor) -> Tensor:
        """All patch tokens again, (R, prefix + N, D), each from the token that stands for it now."""
        if not self._open:
            return tokens
        patches = tokens[:, self.num_prefix :]
        for step in reversed(self._open):
            assert step.before is not None  # a walk that restores records it
            patches = step.found.restore(patches, step.before)
        self.grid, self.sizes = self._open[0].grid, self._open[0].sizes
        self._open = []
        return torch.cat([tokens[:, : self.num_prefix], patches], dim=1)

    def _take_over(self, step: ReductionStep) -> None:
        prefix, found = self.num_prefix, step.found
        patches = found.sizes(None if self.sizes is None else self.sizes[:, prefix:])
        if patches is not None:
            patches = torch.cat([patches.new_ones(patches.shape[0], prefix), patches], dim=1)
        self.sizes = patches
        self.grid = found.grid(self.grid)
        self.steps.append(step)
        self._open.append(step)
