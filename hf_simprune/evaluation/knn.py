# SPDX-License-Identifier: Apache-2.0
"""DINO's weighted k-nearest-neighbour classifier, and the statistics used to compare two networks with it.

The protocol is that of DINO (https://huggingface.co/papers/2104.14294): features are L2-normalised, the `k` bank
features with the highest cosine vote for their class with weight `exp(cosine / temperature)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


K = 20
TEMPERATURE = 0.07
_NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = K,
    temperature: float = TEMPERATURE,
    query_block: int = 1024,
    bank_block: int = 16384,
) -> Tensor:
    """Labels that the `k` nearest bank features vote for.

    Only `query_block x (k + bank_block)` similarities exist at a time, whatever the sizes of bank and queries. Equal
    similarities go to the feature that comes first in the bank, equal votes to the smaller label.

    Args:
        bank: (M, D) features of labelled images, any scale.
        bank_labels: (M,) integer labels of any values.
        queries: (Q, D) features to classify. The work is done on their device.
        k: number of neighbours.
        temperature: of the vote's weights.
        query_block: queries compared at a time.
        bank_block: bank features compared at a time.

    Returns:
        (Q,) labels, on the queries' device.

    Raises:
        InputError: if a size, `k` or `temperature` makes no sense, or a feature is not finite.
    """
    _check(bank, bank_labels, queries, k, temperature)
    classes, class_of = torch.unique(bank_labels.to(queries.device), return_inverse=True)
    predictions = []
    for block in queries.split(query_block):
        similarity, index = _nearest(bank, _normalise(block), k, bank_block)
        # Subtracting the best similarity scales all votes of a query alike and keeps exp() from overflowing.
        weights = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
        votes = weights.new_zeros(len(block), len(classes)).scatter_add_(1, class_of[index], weights)
        predictions.append(classes[votes.argmax(dim=1)])
    return torch.cat(predictions)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> float:
    """Fraction of the queries whose label the classifier finds. Arguments as in [`knn_predict`]."""
    predictions = knn_predict(bank, bank_labels, queries, k, temperature)
    return (predictions == query_labels.to(predictions.device)).double().mean().item()


def draw_few_labels(labels: Tensor, labels_per_class: int, draws: int, seed: int) -> Tensor:
    """Random labelled subsets with the same number of images of every class.

    Args:
        labels: (M,) integer labels.

    Returns:
        (draws, classes * labels_per_class) indices into `labels`. They depend on labels and seed alone, so different
        features of the same images are compared on the same draws.

    Raises:
        InputError: if a class has fewer than `labels_per_class` images.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [(labels.cpu() == label).nonzero().squeeze(1) for label in labels.cpu().unique()]
    fewest = min(map(len, members))
    if fewest < labels_per_class:
        raise InputError(
            f"labels_per_class={labels_per_class}: a class has only {fewest} labelled images; at most {fewest} works"
        )
    return torch.stack(
        [
            torch.cat([m[torch.randperm(len(m), generator=generator)[:labels_per_class]] for m in members])
            for _ in range(draws)
        ]
    )


def few_label_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    labels_per_class: int = 10,
    draws: int = 20,
    seed: int = 0,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Accuracy with only a few labelled images a class, once a draw of [`draw_few_labels`].

    Returns:
        (draws,) float64 accuracies as fractions, in the order of the draws.
    """
    subsets = draw_few_labels(bank_labels, labels_per_class, draws, seed).to(bank.device)
    labels = bank_labels.to(bank.device)
    accuracies = [knn_accuracy(bank[s], labels[s], queries, query_labels, k, temperature) for s in subsets]
    return torch.tensor(accuracies, dtype=torch.float64)


def paired_bootstrap_interval(
    a: Tensor, b: Tensor, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the paired differences `a - b` with its percentile bootstrap interval.

    Args:
        a: (n,) results, such as accuracies over draws or hits and misses over images.
        b: (n,) results of another network on the same draws or images.

    Returns:
        (mean difference, low, high)
    """
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise InputError(
            f"paired results of shapes {tuple(a.shape)} and {tuple(b.shape)}: both must be (n,) with the same n > 1"
        )
    difference = a.double().cpu() - b.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = torch.cat(
        [
            difference[torch.randint(len(difference), (size, len(difference)), generator=generator)].mean(dim=1)
            for size in _block_sizes(resamples, max(1, 1_000_000 // len(difference)))
        ]
    )
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


def accuracy_interval(hits: Tensor, seed: int) -> tuple[float, float]:
    """(low, high), the 95 % interval of the mean of (N,) hits: the bootstrap's over images.

    Where all or none are hits there is nothing to draw, and it is Wilson's.
    """
    count = int(hits.sum())
    if 0 < count < len(hits):
        return paired_bootstrap_interval(hits, torch.zeros_like(hits), seed)[1:]
    margin = _NORMAL_QUANTILE**2 / (len(hits) + _NORMAL_QUANTILE**2)
    return (0.0, margin) if count == 0 else (1 - margin, 1.0)


def _nearest(bank: Tensor, queries: Tensor, k: int, bank_block: int) -> tuple[Tensor, Tensor]:
    """The k highest cosines of normalised `queries` (q, D) and their bank indices, both (q, k), in bank order."""
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    start = 0
    for block in bank.split(bank_block):
        here = torch.arange(start, start + len(block), device=queries.device).expand(len(queries), -1)
        similarity = torch.cat([similarity, queries @ _normalise(block.to(queries.device)).T], dim=1)
        index = torch.cat([index, here], dim=1)
        start += len(block)
        if similarity.shape[1] > k:
            columns = _first_largest(similarity, k)
            similarity, index = similarity.gather(1, columns), index.gather(1, columns)
    return similarity, index


def _first_largest(values: Tensor, k: int) -> Tensor:
    """Columns (rows, k), ascending, of each row's k largest values; of equal values the leftmost."""
    top = values.topk(k, dim=1)
    threshold = top.values[:, -1:]
    # topk breaks ties as it likes; that shows only where the k-th value occurs once more outside the k.
    if ((values >= threshold).sum(dim=1) == k).all():
        return top.indices.sort(dim=1).values
    above, level = values > threshold, values == threshold
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (level & (level.cumsum(dim=1) <= room))
    return chosen.nonzero()[:, 1].view(len(values), k)


def _normalise(features: Tensor) -> Tensor:
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)


def _block_sizes(total: int, block: int) -> list[int]:
    return [min(block, total - start) for start in range(0, total, block)]


def _check(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise InputError(
            f"k-NN features of shapes {tuple(bank.shape)} (bank) and {tuple(queries.shape)} (queries): "
            "both must be (images, width) with the same width"
        )
    if bank_labels.shape != bank.shape[:1]:
        raise InputError(f"k-NN bank of {len(bank)} features has labels of shape {tuple(bank_labels.shape)}")
    if len(queries) == 0:
        raise InputError("k-NN has no query features; at least one is needed")
    if not 1 <= k <= len(bank):
        raise InputError(f"knn_k={k}: must be between 1 and the number of labelled images, here {len(bank)}")
    if not temperature > 0:
        raise InputError(f"knn_temperature={temperature}: must be above 0")
    if not (bank.isfinite().all() and queries.isfinite().all()):
        raise InputError("k-NN features hold values that are not finite; the network has diverged")
