# SPDX-License-Identifier: Apache-2.0
"""95 % bootstrap intervals over images: of a mean, of a ratio, of a paired difference."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval of a difference excludes 0."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 3, sign: str = "") -> str:
        """`0.123 [0.101, 0.145]`; `sign="+"` shows the sign of positive values too."""
        value, low, high = (f"{number:{sign}.{digits}f}" for number in self)
        return f"{value} [{low}, {high}]"


@functools.lru_cache(maxsize=4)
def _weights(images: int, seed: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples) / images


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], images: int, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """95 % percentile interval over images; `statistic` takes weights (draws, images) with rows that sum to 1."""
    low, high = np.percentile(statistic(_weights(images, seed, resamples)), [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of (images,) values with its interval."""
    return Estimate(float(values.mean()), *bootstrap(lambda weights: weights @ values, len(values), seed))


def difference_interval(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of a minus mean of b, both (images,) on the same images, with the paired interval."""
    return mean_interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), seed)


def ratio_interval(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of a over mean of b, both (images,) on the same images, with the paired interval."""
    low, high = bootstrap(lambda weights: (weights @ a) / (weights @ b), len(a), seed)
    return Estimate(float(a.mean() / b.mean()), low, high)
