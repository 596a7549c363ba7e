# SPDX-License-Identifier: Apache-2.0
"""The weighted k-NN classifier against a loop over queries and neighbours, and the statistics built on it."""

import math

import numpy as np
import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.evaluation.knn import (
    accuracy_interval,
    draw_few_labels,
    few_label_knn,
    knn_accuracy,
    knn_predict,
    paired_bootstrap_interval,
)


def naive_predict(bank, labels, queries, k, temperature):
    """One query at a time, in plain Python floats."""
    predictions = []
    for query in queries.tolist():
        scored = []
        for position, row in enumerate(bank.tolist()):
            dot = sum(q * b for q, b in zip(query, row))
            norm = math.sqrt(sum(q * q for q in query)) * math.sqrt(sum(b * b for b in row))
            scored.append((-dot / norm, position))
        votes = {}
        for negative, position in sorted(scored)[:k]:
            label = int(labels[position])
            votes[label] = votes.get(label, 0.0) + math.exp(-negative / temperature)
        best = max(votes.values())
        predictions.append(min(label for label, vote in votes.items() if vote == best))
    return predictions


def clustered(count, classes, width, seed, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + spread * torch.randn(count, width, generator=generator, dtype=torch.float64)
    return features * torch.rand(count, 1, generator=generator, dtype=torch.float64).add(0.1), labels


@pytest.mark.parametrize(("query_block", "bank_block"), [(1024, 16384), (7, 13), (1, 3), (40, 101), (9, 1)])
def test_agrees_with_a_loop_over_queries_whatever_the_blocks(query_block, bank_block):
    bank, labels = clustered(101, 5, 6, seed=0)
    queries, query_labels = clustered(40, 5, 6, seed=1)
    expected = naive_predict(bank, labels, queries, k=20, temperature=0.07)
    predicted = knn_predict(bank, labels, queries, query_block=query_block, bank_block=bank_block)
    assert predicted.tolist() == expected
    accuracy = knn_accuracy(bank, labels, queries, query_labels)
    assert accuracy == np.mean(np.array(expected) == query_labels.numpy())
    assert 0.3 < accuracy < 1.0  # neither trivial nor hopeless, so that a wrong vote shows


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (3, 0.5), (10, 0.01), (101, 0.07)])
def test_neighbours_and_temperature_are_used(k, temperature):
    bank, labels = clustered(101, 5, 6, seed=2)
    queries, _ = clustered(30, 5, 6, seed=3)
    expected = naive_predict(bank, labels, queries, k, temperature)
    assert knn_predict(bank, labels, queries, k, temperature, query_block=11, bank_block=17).tolist() == expected


def test_a_dense_fp32_product_gives_the_same_labels():
    bank, labels = clustered(700, 10, 16, seed=4)
    queries, _ = clustered(250, 10, 16, seed=5)
    a = bank / bank.norm(dim=1, keepdim=True)
    b = queries / queries.norm(dim=1, keepdim=True)
    similarity, index = (b @ a.T).topk(20, dim=1)
    votes = torch.zeros(250, 10, dtype=torch.float64).scatter_add_(1, labels[index], (similarity / 0.07).exp())
    predicted = knn_predict(bank.float(), labels, queries.float(), query_block=64, bank_block=96)
    assert torch.equal(predicted, votes.argmax(dim=1))


@pytest.mark.parametrize("bank_block", [1, 2, 3, 5, 100])
def test_of_equal_similarities_the_first_in_the_bank_counts(bank_block):
    # Three directions, each many times over: most of the similarities are equal, bit for bit.
    directions = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    bank = directions[torch.tensor([1, 0, 0, 2, 0, 1, 0, 0, 2, 0, 0])]
    labels = torch.tensor([3, 8, 5, 3, 5, 3, 8, 8, 3, 8, 8])
    queries = torch.tensor([[1.0, 0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1.0]])
    for k in range(1, 12):
        expected = naive_predict(bank, labels, queries, k, 0.07)
        assert knn_predict(bank, labels, queries, k, bank_block=bank_block).tolist() == expected, k


def test_of_equal_votes_the_smaller_label_wins():
    bank = torch.eye(4)
    predicted = knn_predict(bank, torch.tensor([9, 4, 7, 2]), torch.ones(1, 4), k=4)
    assert predicted.tolist() == [2]


def test_labels_may_have_any_values():
    bank, labels = clustered(90, 3, 4, seed=6)
    queries, _ = clustered(20, 3, 4, seed=7)
    names = torch.tensor([-5, 1_000_000, 12])
    expected = [int(names[label]) for label in knn_predict(bank, labels, queries).tolist()]
    assert knn_predict(bank, names[labels], queries).tolist() == expected
    assert len(set(expected)) == 3


def test_a_sharp_temperature_does_not_overflow():
    bank, labels = clustered(50, 3, 4, seed=8)
    predicted = knn_predict(bank.float(), labels, bank.float(), k=5, temperature=1e-3)
    assert torch.equal(predicted, labels)  # each finds itself


def test_half_precision_features_are_compared_in_fp32():
    bank, labels = clustered(200, 4, 8, seed=9)
    queries, _ = clustered(50, 4, 8, seed=10)
    predicted = knn_predict(bank.bfloat16(), labels, queries.bfloat16())
    assert torch.equal(predicted, knn_predict(bank.bfloat16().float(), labels, queries.bfloat16().float()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "knn_k=0"),
        ({"k": 11}, "between 1 and the number of labelled images, here 10"),
        ({"temperature": 0.0}, "knn_temperature=0.0"),
        ({"bank_labels": torch.zeros(9, dtype=torch.long)}, "bank of 10 features"),
        ({"queries": torch.ones(4, 2)}, "same width"),
        ({"queries": torch.ones(0, 3)}, "no query features"),
        ({"queries": torch.full((4, 3), float("nan"))}, "not finite"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {
        "bank": torch.ones(10, 3),
        "bank_labels": torch.zeros(10, dtype=torch.long),
        "queries": torch.ones(4, 3),
        "k": 5,
        "temperature": 0.07,
    }
    with pytest.raises(InputError, match=words):
        knn_predict(**{**arguments, **change})


def test_draws_hold_every_class_equally_and_repeat_with_the_seed():
    labels = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0)) * 3
    draws = draw_few_labels(labels, labels_per_class=10, draws=6, seed=1)
    assert draws.shape == (6, 40)
    for draw in draws:
        assert len(set(draw.tolist())) == 40
        assert torch.equal(labels[draw].unique(return_counts=True)[1], torch.full((4,), 10))
    assert torch.equal(draws, draw_few_labels(labels, 10, 6, seed=1))
    assert not torch.equal(draws, draw_few_labels(labels, 10, 6, seed=2))
    assert len({tuple(sorted(draw.tolist())) for draw in draws}) == 6


def test_few_label_accuracy_is_that_of_each_drawn_bank():
    bank, labels = clustered(300, 5, 6, seed=11)
    queries, query_labels = clustered(60, 5, 6, seed=12)
    accuracies = few_label_knn(bank, labels, queries, query_labels, labels_per_class=10, draws=5, seed=3)
    for accuracy, draw in zip(accuracies, draw_few_labels(labels, 10, 5, seed=3)):
        expected = naive_predict(bank[draw], labels[draw], queries, 20, 0.07)
        assert accuracy.item() == np.mean(np.array(expected) == query_labels.numpy())
    assert accuracies.std() > 0
    # Same draws for another network: features that say the same thing give the same accuracies.
    assert torch.equal(accuracies, few_label_knn(3 * bank, labels, 2 * queries, query_labels, draws=5, seed=3))


def test_a_class_with_too_few_labels_is_named():
    labels = torch.tensor([0] * 12 + [1] * 4)
    with pytest.raises(InputError, match="labels_per_class=10: a class has only 4"):
        draw_few_labels(labels, 10, 2, seed=0)


def test_bootstrap_interval_matches_an_independent_one():
    generator = np.random.default_rng(0)
    b = generator.normal(0.5, 0.1, 20)
    a = b + generator.normal(0.02, 0.03, 20)
    mean, low, high = paired_bootstrap_interval(torch.tensor(a), torch.tensor(b), seed=0)
    resampled = [np.mean((a - b)[generator.integers(0, 20, 20)]) for _ in range(10_000)]
    assert mean == pytest.approx(np.mean(a - b), abs=1e-12)
    assert low == pytest.approx(np.quantile(resampled, 0.025), abs=1e-3)
    assert high == pytest.approx(np.quantile(resampled, 0.975), abs=1e-3)
    assert (mean, low, high) == paired_bootstrap_interval(torch.tensor(a), torch.tensor(b), seed=0)
    narrow = paired_bootstrap_interval(torch.tensor(a), torch.tensor(b), seed=0, level=0.5)
    assert low < narrow[1] < mean < narrow[2] < high


def test_bootstrap_uses_the_pairing():
    # The draws differ much from one another; the networks differ little and always in the same direction.
    b = torch.linspace(0.1, 0.9, 20)
    mean, low, high = paired_bootstrap_interval(b + 0.01, b, seed=0)
    assert mean == pytest.approx(0.01, abs=1e-6)
    assert low == pytest.approx(0.01, abs=1e-6) and high == pytest.approx(0.01, abs=1e-6)


def test_bootstrap_refuses_unpaired_results():
    with pytest.raises(InputError, match="same n"):
        paired_bootstrap_interval(torch.ones(3), torch.ones(4), seed=0)


def test_the_evaluate_metric_agrees(tmp_path):
    from hf_simprune.evaluation.knn_metric import KNNAccuracy

    bank, labels = clustered(120, 4, 6, seed=13)
    queries, query_labels = clustered(50, 4, 6, seed=14)
    metric = KNNAccuracy(cache_dir=str(tmp_path))
    for start in range(0, 50, 20):
        stop = start + 20
        metric.add_batch(predictions=queries[start:stop].float(), references=query_labels[start:stop])
    result = metric.compute(bank=bank.float(), bank_labels=labels, k=7, temperature=0.1)
    assert result == {"knn_accuracy": knn_accuracy(bank.float(), labels, queries.float(), query_labels, 7, 0.1)}
    assert 0 < result["knn_accuracy"] < 1


@pytest.mark.parametrize(("count", "hits"), [(14, 0), (14, 14), (1, 1), (1, 0)])
def test_an_accuracy_of_none_or_all_has_wilsons_interval(count, hits):
    from scipy.stats import binomtest

    found = accuracy_interval(torch.arange(count) < hits, seed=0)
    assert found == pytest.approx(tuple(binomtest(hits, count).proportion_ci(method="wilson")), abs=1e-9)


def test_an_accuracy_between_has_the_bootstraps_interval():
    hits = torch.rand(50) < 0.6
    assert accuracy_interval(hits, 3) == paired_bootstrap_interval(hits, torch.zeros_like(hits), 3)[1:]
