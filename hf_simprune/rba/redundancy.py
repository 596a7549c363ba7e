# SPDX-License-Identifier: Apache-2.0
"""How alike the hidden states of a network are, for every span: pure functions of its moments.

Each returns (L+1, L+1) fp64; entry [i, j], i < j, compares `hidden_states[i]` with `hidden_states[j]`, the rest is
nan. Covariances are those of all tokens of all images together.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .moments import Moments, added_up
from .solve import LeftSolver


TOKENS = ("all", "cls")


def block_redundancy(moments: Moments, tokens: str = "all") -> Tensor:
    """BR of RBA (arXiv 2410.04941): minus the mean, over dimensions and tokens, of (h_j - h_i)^2; 0 is the most.

    `tokens` is "all" or "cls" (CLS alone; the mean over tokens for models without one). ValueError for another.
    """
    _check_tokens(tokens)
    if tokens == "cls":
        return _upper(-moments.cls_squared_difference)
    result = _empty(moments)
    for i, j in spans(moments.depth):
        change = moments.mean(f"h{j}") - moments.mean(f"h{i}")
        result[i, j] = -(_change_variance(moments, i, j) + change.square().sum()) / moments.width
    return result


def cosine(moments: Moments, tokens: str = "all") -> Tensor:
    """Mean cosine similarity of h_i and h_j, token by token; `tokens` as in `block_redundancy`."""
    _check_tokens(tokens)
    return _upper(moments.cls_cosine if tokens == "cls" else moments.token_cosine)


def linear_cka(moments: Moments) -> Tensor:
    """Linear CKA (Kornblith et al., arXiv 1905.00414) over tokens: |C_ij|^2 / (|C_ii| |C_jj|), Frobenius norms."""
    norms = [torch.linalg.matrix_norm(moments.cov(f"h{i}", f"h{i}")) for i in range(moments.depth + 1)]
    result = _empty(moments)
    for i, j in spans(moments.depth):
        result[i, j] = moments.cov(f"h{i}", f"h{j}").square().sum() / (norms[i] * norms[j])
    return result


def svcca(moments: Moments, variance: float = 0.99) -> Tensor:
    """SVCCA (Raghu et al., arXiv 1706.05806) over tokens: mean canonical correlation of leading components.

    Of each hidden state the fewest principal components that hold `variance` of it are kept; the mean is over as many
    correlations as the smaller of the two has components.
    """
    whitening = [_leading_whitening(moments.cov(f"h{i}", f"h{i}"), variance) for i in range(moments.depth + 1)]
    result = _empty(moments)
    for i, j in spans(moments.depth):
        whitened = whitening[i].mT @ moments.cov(f"h{i}", f"h{j}") @ whitening[j]
        if whitened.shape[0] > whitened.shape[1]:
            whitened = whitened.mT
        squared = torch.linalg.eigvalsh(whitened @ whitened.mT).clamp(0, 1)
        result[i, j] = squared.sqrt().mean()
    return result


def explained_variance(moments: Moments, held_out: bool = True, ridge: float = 1e-4) -> Tensor:
    """1 - (squared error of the affine map h_i -> h_j) / (variance of h_j), over all tokens and dimensions.

    With `held_out` the map is fitted on the images of one parity and judged on the others, both ways, and the mean is
    given; else it is fitted and judged on all. nan where a side has no images or h_j does not vary.
    """
    if not held_out:
        return _explained(moments, moments, ridge)
    even, odd = moments.halved
    return (_explained(even, odd, ridge) + _explained(odd, even, ridge)) / 2


def spans(depth: int) -> Iterator[tuple[int, int]]:
    """All (i, j) with 0 <= i < j <= depth."""
    return ((i, j) for i in range(depth) for j in range(i + 1, depth + 1))


def _explained(fitted: Moments, judged: Moments, ridge: float) -> Tensor:
    result = _empty(fitted)
    if not fitted.count or not judged.count:
        return result
    for i in range(fitted.depth):
        source = f"h{i}"
        left, judged_left = fitted.cov(source, source), judged.cov(source, source)
        solver = LeftSolver(left, ridge)
        mean_gap = judged.mean(source) - fitted.mean(source)
        for j in range(i + 1, fitted.depth + 1):
            target = f"h{j}"
            # The map is identity plus delta, so its error is that of delta as a map of the change h_j - h_i.
            delta = solver.solve(fitted.cov(source, target) - left)
            change = judged.cov(source, target) - judged_left
            error = _change_variance(judged, i, j) + (delta * (judged_left @ delta - 2 * change)).sum()
            bias_gap = judged.mean(target) - fitted.mean(target) - mean_gap - mean_gap @ delta
            total = judged.cov(target, target).diagonal().sum()
            result[i, j] = 1 - (error + bias_gap.square().sum()) / total if total > 0 else torch.nan
    return result


def _change_variance(moments: Moments, i: int, j: int) -> Tensor:
    """Variance of h_j - h_i about its mean, summed over dimensions."""
    pairs = ((f"h{i}", f"h{i}", 1), (f"h{j}", f"h{j}", 1), (f"h{i}", f"h{j}", -2))
    return added_up(factor * moments.cov(a, b).diagonal().sum() for a, b, factor in pairs)


def _leading_whitening(covariance: Tensor, variance: float) -> Tensor:
    """(D, k): projects on the leading components that hold that much of the variance, each to variance 1."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    share = values.cumsum(0) / values.sum()
    kept = min(int((share < variance).sum()) + 1, len(values))
    return vectors[:, :kept] / values[:kept].sqrt()


def _check_tokens(tokens: str) -> None:
    if tokens not in TOKENS:
        raise ValueError(f"tokens: {tokens!r}, accepted are {TOKENS}")


def _empty(moments: Moments) -> Tensor:
    return torch.full((moments.depth + 1, moments.depth + 1), torch.nan, dtype=torch.float64)


def _upper(values: Tensor) -> Tensor:
    """The same above the diagonal, nan elsewhere."""
    return torch.where(torch.ones_like(values).triu(1) > 0, values, torch.nan)
