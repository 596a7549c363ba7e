# SPDX-License-Identifier: Apache-2.0
"""Expedit: cluster the token grid to a smaller one and rebuild the full one later (arXiv 2210.01035)."""

import math

import torch
from torch import Tensor

from ..errors import InputError
from .base import BranchReducer, ReductionSetting, Seen
from .token_maps import Mixed, TokenMap, Unchanged, to_full_precision


SCHEDULES = ("stages", "published")
WINDOW = 5
# Keep rate: share of the grid's side that stays, and of the blocks at whose end all tokens are back. They are 11 x 11
# after block 4 until block 11, and 8 x 8 after block 4 until block 10, for 14 x 14 patches and 12 blocks.
PUBLISHED = {0.8: (11 / 14, 11 / 12), 0.7: (8 / 14, 10 / 12)}


class ExpeditReducer(BranchReducer):
    """Local clustering of the token grid behind a block, and reconstruction from the nearest clusters.

    Centroids start as the adaptive average pool of the grid. In every iteration each token spreads over the centroids
    in the 5 x 5 window around its own place by softmax(-squared distance), and a centroid becomes the mean of the
    tokens by what they give to it; one that nothing is given to stays. The result is linear in the tokens, the
    affinities have no gradient. To restore, each token mixes the `neighbours` centroids nearest to its features
    before clustering, by exp(-temperature * squared distance). These weights sum to 1, where the original code divides
    them by their Euclidean norm. Prefix tokens are left alone.

    schedule="stages" clusters at the setting's layers. Behind stage k = 1, 2, ... the keep rate leaves a share of
    keep_rate^k, so there are ceil(sqrt(share) * side) rows and columns, of the sides of the full grid: rounding up
    again and again would leave small grids as they are.
    schedule="published" clusters once, after block `cluster_after`, to `grid` centroids along the shorter side of the
    first of the setting's grids (of each crop's own grid where the setting has none); all other sides keep the same
    share of theirs. Behind block `restore_after` the full grid is back. Left out, these come from the keep rate: 11 of
    14 until block 10 of 0 to 11 at 0.8, 8 of 14 until block 9 at 0.7, both after a third of the blocks; at another
    rate ceil(keep_rate^1.5 * side), the share of tokens that three stages would leave, until eleven twelfths.
    """

    name = "expedit"
    merges = True
    site = "after"

    def __init__(
        self,
        keep_rate: float,
        setting: ReductionSetting = ReductionSetting(),
        *,
        schedule: str = "stages",
        grid: int | None = None,
        cluster_after: int | None = None,
        restore_after: int | None = None,
        iterations: int = 5,
        temperature: float = 0.02,
        neighbours: int = 20,
    ) -> None:
        """Raises InputError for an option out of range, or one that the schedule does not have."""
        super().__init__(keep_rate, setting)
        if schedule not in SCHEDULES:
            raise InputError(
                f"reduction option schedule {schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}."
            )
        for name, value in (("iterations", iterations), ("neighbours", neighbours)):
            if value < 1:
                raise InputError(f"reduction option {name} {value} is out of range: give 1 or more.")
        if not 0 < temperature < math.inf:
            raise InputError(f"reduction option temperature {temperature} is out of range: give a number above 0.")
        for name, given in (("grid", grid), ("cluster_after", cluster_after), ("restore_after", restore_after)):
            if schedule == "stages" and given is not None:
                raise InputError(f"reduction option {name} {given} goes with schedule=published, not stages.")
        self.schedule = schedule
        self.iterations = iterations
        self.temperature = temperature
        self.neighbours = neighbours
        self._layers, self._share = setting.layers, math.sqrt(self.keep_rate)
        self._grid = grid
        if schedule == "published":
            self._share, until = PUBLISHED.get(self.keep_rate, (self.keep_rate**1.5, 11 / 12))
            self._layers, self.restore_after = published_blocks(setting.depth, until, cluster_after, restore_after)
        if grid is not None and setting.grids:
            self._share = self._share_of(min(setting.grids[0]))

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based blocks behind which tokens are clustered, ascending."""
        return self._layers

    def smaller_grid(self, grid: tuple[int, int], stage: int = 0) -> tuple[int, int]:
        """(rows, columns) that a full grid of patch tokens is clustered to at a stage.

        Raises InputError when the option is larger.
        """
        share = self._share
        if self._grid is not None and not self.setting.grids:
            share = self._share_of(min(grid))
        rows, columns = (max(1, math.ceil(share ** (stage + 1) * side - 1e-9)) for side in grid)
        return rows, columns

    def counts(self, grid: tuple[int, int]) -> list[int]:
        return [rows * columns for rows, columns in self._grids(grid)]

    @torch.no_grad()
    def decide(self, seen: Seen) -> TokenMap:
        grid, count = seen.grid, seen.patches.shape[1]
        if grid is None or grid[0] * grid[1] != count:
            found = "there is none" if grid is None else f"{grid[0]} x {grid[1]} is not that of {count} tokens"
            raise InputError(
                f"token_reduction expedit needs the grid (rows, columns) of the patch tokens, and {found}: "
                "give images whose patches form a grid, and no method before it that drops or merges tokens."
            )
        target = self.smaller_grid(seen.full_grid or grid, seen.stage)
        if target == tuple(grid):
            return Unchanged(seen.patches)
        down, up, assigned = cluster(seen.patches, grid, target, self.iterations, self.temperature, self.neighbours)
        return Mixed(down, up, assigned, target)

    def overhead_macs(self, stage: int, num_patches: int) -> int:
        """Products of all tokens with all centroids in every iteration and for the reconstruction's weights, and the
        final means; with the published schedule the reconstruction too.

        Raises InputError when neither the setting's grids nor a square have `num_patches` tokens at this stage.
        """
        clusters = self._clusters(stage, num_patches)
        if clusters == num_patches:
            return 0
        width = self.setting.hidden_size
        mixes = 1 if self.restore_after is None else 2
        return product_macs(num_patches, clusters, width, self.iterations + 1) + mixes * num_patches * clusters * width

    def _share_of(self, side: int) -> float:
        """The share of a grid's shorter side that the option leaves. Raises InputError when it is more than all."""
        assert self._grid is not None
        if not 1 <= self._grid <= side:
            raise InputError(
                f"reduction option grid {self._grid}: the token grid has {side} patches a side, give 1 to {side}."
            )
        return self._grid / side

    def _grids(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        rows, columns = grid
        return [(rows, columns), *(self.smaller_grid(grid, stage) for stage in range(len(self.layers)))]

    def _clusters(self, stage: int, num_patches: int) -> int:
        for grid in self.setting.grids:
            counts = self.counts(grid)
            if counts[stage] == num_patches:
                return counts[stage + 1]
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise InputError(f"grids {self.setting.grids}: none has {num_patches} tokens at stage {stage} of expedit.")
        full = side  # the smallest square that comes down to this one
        while stage and self.smaller_grid((full, full), stage - 1)[0] < side:
            full += 1
        return math.prod(self.smaller_grid((full, full), stage))


def published_blocks(
    depth: int, until: float, cluster_after: int | None, restore_after: int | None
) -> tuple[tuple[int], int]:
    """The layers of the published schedule and its last block on centroids; `until` is a share of the depth.

    Raises InputError when a block is out of range, or no block runs on centroids.
    """
    if depth < 2:
        raise InputError(
            f"reduction option schedule published: give a model of 2 blocks or more, this one has {depth}."
        )
    start = max(1, depth // 3) - 1 if cluster_after is None else cluster_after
    if not 0 <= start < depth - 1:
        raise InputError(
            f"reduction option cluster_after {start}: a model of {depth} blocks can cluster after 0 to {depth - 2}."
        )
    end = restore_after
    if end is None:
        end = min(depth - 1, max(start + 1, math.floor(until * depth + 1e-9) - 1))
    if not start < end < depth:
        raise InputError(
            f"reduction option restore_after {end}: clustered after block {start}, a model of {depth} blocks can "
            f"restore after {start + 1} to {depth - 1}."
        )
    return (start,), end


def cluster(
    patches: Tensor,
    grid: tuple[int, int],
    target: tuple[int, int],
    iterations: int,
    temperature: float,
    neighbours: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster patch tokens (R, n, D) of `grid` to the m = rows * columns of `target`, in fp32 at least.

    Returns the weights (R, m, n) of the centroids' means, the weights (R, n, m) of the reconstruction, and the
    centroid (R, n) that each token gives most to.
    """
    tokens = to_full_precision(patches)
    with torch.autocast(patches.device.type, enabled=False):
        tokens = tokens - tokens.mean(1, keepdim=True)  # differences of distances lose fewer digits
        means = torch.kron(pooling(grid[0], target[0], tokens), pooling(grid[1], target[1], tokens))
        means = means.T.expand(tokens.shape[0], -1, -1)
        gram = None
        count, width = tokens.shape[1:]
        if products_by_gram(count, width, means.shape[2], iterations + 1):
            gram = tokens @ tokens.transpose(1, 2)
        outside = ~window(grid, target, tokens.device)
        for _ in range(iterations):
            affinities = nearness(tokens, means, gram).masked_fill_(outside, -math.inf).softmax(-1)
            totals = affinities.sum(1, keepdim=True)
            # Softmax can leave a centroid nothing, in fp32: it stays where it is.
            empty = totals < torch.finfo(totals.dtype).tiny
            means = torch.where(empty, means, affinities / totals.masked_fill(empty, 1))
        up = reconstruction_weights(nearness(tokens, means, gram).mul_(temperature), neighbours)
    return means.transpose(1, 2), up, affinities.argmax(-1)


def nearness(tokens: Tensor, means: Tensor, gram: Tensor | None) -> Tensor:
    """Minus the squared distance of tokens (R, n, D) from centroids, (R, n, m), but for the tokens' own lengths,
    which softmax over the centroids and their order do not depend on.

    means: (R, n, m), the tokens' weights in each centroid. gram: the tokens' products with each other, (R, n, n), None
    to take those with the centroids themselves.
    """
    if gram is None:
        products = tokens @ (means.transpose(1, 2) @ tokens).transpose(1, 2)
    else:
        products = gram @ means
    # A mean's product with itself is the mean, by the same weights, of the tokens' products with it.
    lengths = (means * products).sum(1, keepdim=True)
    return products.mul_(2).sub_(lengths)


def product_macs(count: int, clusters: int, width: int, times: int) -> int:
    """MACs of `times` rounds of products of tokens and centroids, by whichever way takes fewer."""
    if products_by_gram(count, width, clusters, times):
        return count**2 * (width + times * clusters)
    return 2 * times * count * clusters * width


def products_by_gram(count: int, width: int, clusters: int, times: int) -> bool:
    """Whether the tokens' products with each other, mixed `times` times, take fewer MACs than means and products."""
    return count * (width + times * clusters) < 2 * times * clusters * width


def reconstruction_weights(near: Tensor, neighbours: int) -> Tensor:
    """Softmax of the `neighbours` largest of `near` (R, n, m) in each row, 0 for the others. Those that equal the last
    of them count too: no order decides."""
    last = near.topk(min(neighbours, near.shape[-1]), dim=-1).values[..., -1:]
    return near.masked_fill(near < last, -math.inf).softmax(-1)


def pooling(side: int, target: int, like: Tensor) -> Tensor:
    """Weights of an adaptive average pool along one axis, (target, side): cell i averages floor(i * side / target) to
    ceil((i + 1) * side / target) - 1."""
    cells = torch.arange(target, device=like.device).unsqueeze(1)
    places = torch.arange(side, device=like.device)
    inside = (places >= cells * side // target) & (places * target < (cells + 1) * side)
    weights = inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)


def window(grid: tuple[int, int], target: tuple[int, int], device: torch.device) -> Tensor:
    """(n, m) bool: the centroids at most two rows and two columns from the cell that each token lies in."""
    rows, columns = (
        (torch.arange(side, device=device) * cells // side).unsqueeze(1).sub(torch.arange(cells, device=device)).abs()
        <= WINDOW // 2
        for side, cells in zip(grid, target, strict=True)
    )
    return torch.kron(rows.to(torch.uint8), columns.to(torch.uint8)).bool()
