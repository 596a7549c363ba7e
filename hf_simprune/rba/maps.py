# SPDX-License-Identifier: Apache-2.0
"""Maps that stand in for removed blocks or halves, and their closed-form fit from second moments."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from .moments import Moments
from .plan import Half, Span
from .solve import LeftSolver


TRAINED = ("mlp", "res_mlp")


@dataclass(frozen=True)
class IdentityMap:
    """The span is dropped and nothing put in its place."""

    def __call__(self, x: Tensor) -> Tensor:
        """`x` of any shape, unchanged."""
        return x


@dataclass(frozen=True, eq=False)
class AffineMap:
    """`x @ weight + bias`; weight (D_in, D_out) and bias (D_out,), fp32.

    For a fold, `x` is the MLP write M of the block before the span and the result replaces that write.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out), in the dtype and on the device of `x`."""
        return torch.nn.functional.linear(x, self.weight.to(x).mT, self.bias.to(x))


@dataclass(frozen=True, eq=False)
class LowRankMap:
    """`x + (x @ down) @ up + bias`; down (D, r), up (r, D), bias (D,), fp32."""

    down: Tensor
    up: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the dtype and on the device of `x`."""
        return x + torch.nn.functional.linear(x @ self.down.to(x), self.up.to(x).mT, self.bias.to(x))


@dataclass(frozen=True, eq=False)
class ConstMap:
    """The same vector for every token; bias (D,), fp32."""

    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., any) -> (..., D), in the dtype and on the device of `x`."""
        return self.bias.to(x).expand(*x.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class ModuleMap:
    """A trained map: a module in eval mode, fp32, that takes and returns (..., D)."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the dtype of `x`; the module's own weights keep their precision."""
        parameter = next(self.module.parameters())
        if parameter.device != x.device:
            self.module.to(x.device)
        return self.module(x.to(parameter.dtype)).to(x.dtype)


FittedMap = IdentityMap | AffineMap | LowRankMap | ConstMap | ModuleMap
FittedMaps = dict[Span | Half, FittedMap]


def fit(item: Span | Half, moments: Moments, ridge: float = 1e-4, bias: bool = True) -> FittedMap:
    """The least-squares map of one span or half; see `fit_all`."""
    return fit_all([item], moments, ridge, bias)[item]


def fit_all(items: Iterable[Span | Half], moments: Moments, ridge: float = 1e-4, bias: bool = True) -> FittedMaps:
    """Closed-form maps of many spans and halves; one eigendecomposition serves all that read the same variable.

    Kinds: spans "fold", "linear", "identity", "low_rank"; halves "linear", "const". With bias, moments are centred.
    `ridge` is in units of the mean variance of the input, lambda = ridge * tr(S) / D, and pulls a span's map towards
    identity and a half's towards a constant. `bias=False, ridge=0` is the least squares of RBA and TOAST (arXiv
    2410.04941): uncentred, no penalty. A low-rank map is the reduced-rank regression of `h_j - h_i` on `h_i`. A
    layernormed input always lacks one direction: without a ridge, a half's map is the smallest of those that fit best.

    Raises:
        InputError: fewer tokens than features; non-finite activations; for a span with `ridge=0`, input that lies in
            fewer directions than it has features (constant images); a negative ridge; a rank above D; an item that
            reaches beyond the network or that no products were accumulated for.
        ValueError: a kind that is trained ("mlp", "res_mlp": see `trained_maps`).
    """
    items = list(items)
    if not (math.isfinite(ridge) and ridge >= 0):
        raise InputError(f"ridge: {ridge}, accepted is a finite number of at least 0")
    for item in items:
        _check_item(item, moments)
    moments.check_finite()
    if any(needs_regression(item) for item in items):
        check_enough_tokens(moments)
    by_input: dict[str, list[Span | Half]] = {}
    for item in items:
        by_input.setdefault(_input_name(item), []).append(item)
    fitted = {}
    for name, group in by_input.items():
        solver, solved = None, [item for item in group if needs_regression(item)]
        if solved:
            solver = LeftSolver(moments.cov(name, name) if bias else moments.second(name, name), ridge)
            if ridge == 0 and solver.deficient and isinstance(solved[0], Span):
                raise InputError(
                    f"ridge: {ridge} with singular moments: the input of {solved[0]} ({name}) varies in fewer "
                    f"directions than its {moments.width} features; accepted are a ridge above 0 or images that differ"
                )
        for item in group:
            fitted[item] = _fit_one(item, moments, solver, bias)
    return {item: fitted[item] for item in items}


def needs_regression(item: Span | Half) -> bool:
    """Whether the item's map is a least-squares solution, and not a mean or nothing at all."""
    return item.map not in ("identity", "const")


def check_enough_tokens(moments: Moments) -> None:
    """InputError where there are fewer tokens than features, so that a least-squares map would mean nothing."""
    if moments.count < moments.width:
        needed = math.ceil(moments.width * moments.images / moments.count)
        raise InputError(
            f"calibration_images: {moments.images} images give {moments.count} tokens, fewer than the {moments.width} "
            f"features of one token; accepted are at least {needed} images, and hundreds are better"
        )


def _check_item(item: Span | Half, moments: Moments) -> None:
    if item.map in TRAINED:
        raise ValueError(f"{item}: this map is trained on activations, not solved from moments")
    if isinstance(item, Half):
        inside, pair = item.block < moments.depth, (_input_name(item), _write_name(item))
    else:
        inside, pair = item.end <= moments.depth, (_input_name(item), f"h{item.end}")
        if item.rank is not None and item.rank > moments.width:
            raise InputError(f"rank: {item.rank} in {item}, accepted is at most {moments.width}, the model's width")
    if not inside:
        raise InputError(f"plan: {item} reaches beyond the model's {moments.depth} blocks")
    if item.map == "const":
        missing = pair[1] not in moments.names
    else:
        missing = not moments.has(*pair)
    if missing:
        raise InputError(f"plan: {item} has no moments: the pass was not asked for it (max_span, kinds or halves)")


def _input_name(item: Span | Half) -> str:
    """The variable that the item's map reads."""
    if isinstance(item, Half):
        return f"an{item.block}" if item.half == "attention" else f"mn{item.block}"
    return f"m{item.start - 1}" if item.map == "fold" else f"h{item.start}"


def _write_name(item: Half) -> str:
    return f"a{item.block}" if item.half == "attention" else f"m{item.block}"


def _fit_one(item: Span | Half, moments: Moments, solver: LeftSolver | None, bias: bool) -> FittedMap:
    product = moments.cov if bias else moments.second
    name = _input_name(item)
    if item.map == "identity":
        return IdentityMap()
    if isinstance(item, Half):
        mean = moments.mean(_write_name(item))
        if item.map == "const":
            return ConstMap(mean.float())
        assert solver is not None  # as for every map but identity and const
        weight = solver.solve(product(name, _write_name(item)))
        offset = mean - moments.mean(name) @ weight
        return _affine(weight, offset if bias else torch.zeros_like(offset))
    # A span's map is identity plus the regression of what the span adds, h_j - h_i, on what the map reads: for a
    # fold too, whose target is h_j minus the residual stream before the MLP, that is M + (h_j - h_i).
    change = product(name, f"h{item.end}") - product(name, f"h{item.start}")
    assert solver is not None
    delta = solver.solve(change)
    if item.map == "low_rank":
        assert item.rank is not None
        # Of all maps of that rank these lose least of the fit: the loss is the quadratic form of S + lambda I in the
        # difference to delta, and delta' (S + lambda I) delta = delta' change.
        _, vectors = torch.linalg.eigh(_symmetric(delta.mT @ change))
        up = vectors[:, -item.rank :].mT
        down = delta @ up.mT
        delta = down @ up
    mean_change = moments.mean(f"h{item.end}") - moments.mean(f"h{item.start}")
    offset = mean_change - moments.mean(name) @ delta
    if not bias:
        offset = torch.zeros_like(offset)
    if item.map == "low_rank":
        return LowRankMap(down.float(), up.float(), offset.float())
    return _affine(torch.eye(len(delta), dtype=delta.dtype) + delta, offset)


def _affine(weight: Tensor, bias: Tensor) -> AffineMap:
    return AffineMap(weight.float(), bias.float())


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
