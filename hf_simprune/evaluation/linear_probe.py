# SPDX-License-Identifier: Apache-2.0
"""A re-trained linear head: multinomial logistic regression on frozen features, solved to its optimum."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .knn import accuracy_interval


L2_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class LinearClassifier:
    """Logits of standardised features: ((x - mean) / deviation) @ weight + bias.

    Attributes:
        mean, deviation: (D,) of the training features.
        weight: (D, classes); bias: (classes,).
        labels: (classes,) the label that each column stands for.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, classes) of features (N, D)."""
        return ((features.to(self.weight) - self.mean) / self.deviation) @ self.weight + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """(N,) labels of features (N, D)."""
        return self.labels[self.logits(features).argmax(dim=1)]


@dataclass(frozen=True)
class ProbeResult:
    """What a re-trained head finds on the test rows.

    Attributes:
        predictions: (N,) labels.
        hits: (N,) booleans, for paired comparisons of networks on the same rows.
        accuracy: top-1 as a fraction, and (low, high) its 95 % interval, as of `accuracy_interval`.
        l2: the weight decay that was chosen.
    """

    predictions: Tensor
    hits: Tensor
    accuracy: float
    interval: tuple[float, float]
    l2: float


def fit_linear(
    features: Tensor, labels: Tensor, l2: float, start: LinearClassifier | None = None, steps: int = 500
) -> LinearClassifier:
    """Minimise mean cross-entropy + l2 / 2 * |weight|^2 on standardised features by L-BFGS; the bias is not decayed.

    Args:
        features: (N, D); labels: (N,) integers of any values.
        l2: at least 0.
        start: classifier of the same labels and features to begin from.
        steps: most iterations; it stops earlier once the gradient is flat.

    Raises:
        InputError: if the shapes do not fit, a feature is not finite or there is only one class.
    """
    _check(features, labels)
    classes, targets = torch.unique(labels.to(features.device), return_inverse=True)
    if len(classes) < 2:
        raise InputError("the training labels hold one class only; a linear head needs at least 2")
    features = features if features.dtype == torch.float64 else features.float()
    mean = features.mean(dim=0)
    spread = features.std(dim=0, correction=0)
    # a feature that never changes carries nothing; dividing by rounding noise would blow it up
    deviation = torch.where(spread > 1e-6 * (1 + mean.abs()), spread, torch.ones_like(spread))
    inputs = (features - mean) / deviation
    weight = features.new_zeros(features.shape[1], len(classes)) if start is None else start.weight.clone()
    bias = features.new_zeros(len(classes)) if start is None else start.bias.clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, targets) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearClassifier(mean, deviation, weight.detach(), bias.detach(), classes)


def probe_features(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    l2_grid: Sequence[float] = L2_GRID,
    seed: int = 0,
) -> ProbeResult:
    """Train a linear head on frozen features and test it once.

    The weight decay is the one that is best on a seeded fifth of the training rows that the others do not see; of
    equally good ones the strongest. Where that fifth leaves one class only, it is the first of the grid. The head is
    then fitted to all training rows.

    Args:
        train_features: (M, D); train_labels: (M,).
        test_features: (N, D); test_labels: (N,).
        seed: of the fifth and of the bootstrap.
    """
    _check(train_features, train_labels)
    _check(test_features, test_labels)
    if not l2_grid:
        raise InputError("l2_grid is empty; at least one weight decay is needed")
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    best, best_accuracy, classifier = l2_grid[0], -1.0, None
    if len(l2_grid) > 1 and len(held) and len(torch.unique(train_labels[rest])) > 1:
        for l2 in sorted(l2_grid, reverse=True):
            classifier = fit_linear(train_features[rest], train_labels[rest], l2, classifier)
            predicted = classifier.predict(train_features[held])
            accuracy = (predicted == train_labels[held].to(predicted.device)).double().mean().item()
            if accuracy > best_accuracy:
                best, best_accuracy = l2, accuracy
    predicted = fit_linear(train_features, train_labels, best).predict(test_features).cpu()
    hits = predicted == test_labels.cpu()
    return ProbeResult(predicted, hits, hits.double().mean().item(), accuracy_interval(hits, seed), best)


def _check(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise InputError(
            f"linear probe: features of shape {tuple(features.shape)} with labels of shape {tuple(labels.shape)}; "
            "(N, width) and (N,) with N above 0 are needed"
        )
    if not features.isfinite().all():
        raise InputError("linear probe: the features hold values that are not finite")
