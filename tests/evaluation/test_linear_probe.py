"""The re-trained linear head against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_simprune.errors import InputError
from hf_simprune.evaluation.linear_probe import fit_linear, probe_features


def clusters(rows: int, classes: int = 4, width: int = 12, seed: int = 0, noise: float = 2.0):
    generator = torch.Generator().manual_seed(100)
    centres = torch.randn(classes, width, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    scales = torch.logspace(-2, 2, width)  # features of very different size
    features = (centres[labels] + noise * torch.randn(rows, width, generator=generator)) * scales + 5 * scales
    return features, labels * 10 + 3  # labels need not be 0, 1, 2, …


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_the_head_is_that_of_scikit_learn(l2):
    features, labels = clusters(300)
    ours = fit_linear(features.double(), labels, l2)
    inputs = ((features.double() - features.double().mean(0)) / features.double().std(0, correction=0)).numpy()
    theirs = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-9, max_iter=5000).fit(inputs, labels.numpy())
    torch.testing.assert_close(ours.weight.T, torch.from_numpy(theirs.coef_), atol=2e-4, rtol=1e-3)
    test, _ = clusters(200, seed=1)
    standard = (test.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    probabilities = ours.logits(test.double()).softmax(1)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(standard.numpy()), atol=1e-3)
    assert ours.predict(test).tolist() == theirs.predict(standard.numpy()).tolist()


def test_single_precision_finds_the_same_classes():
    features, labels = clusters(300)
    test, _ = clusters(200, seed=1)
    single, double = fit_linear(features, labels, 1e-2), fit_linear(features.double(), labels, 1e-2)
    assert (single.predict(test) == double.predict(test)).float().mean() > 0.99


def test_the_scale_of_a_feature_does_not_matter():
    train, labels = clusters(300)
    test, test_labels = clusters(300, seed=1)
    factors = torch.logspace(-3, 3, train.shape[1]).flip(0)
    plain = probe_features(train, labels, test, test_labels)
    scaled = probe_features(train * factors, labels, test * factors, test_labels)
    assert (plain.predictions == scaled.predictions).float().mean() > 0.99


def test_strong_decay_is_chosen_where_features_are_mostly_noise():
    generator = torch.Generator().manual_seed(0)
    train, labels = clusters(150)
    test, test_labels = clusters(1000, seed=1)
    noise = [torch.randn(len(rows), 200, generator=generator) for rows in (train, test)]
    noisy = probe_features(torch.cat([train, noise[0]], 1), labels, torch.cat([test, noise[1]], 1), test_labels)
    worst = fit_linear(torch.cat([train, noise[0]], 1), labels, 1e-4).predict(torch.cat([test, noise[1]], 1))
    assert noisy.l2 >= 1e-2
    assert noisy.accuracy > (worst == test_labels).double().mean().item()


def test_accuracy_hits_and_interval_belong_together():
    train, labels = clusters(300)
    test, test_labels = clusters(400, seed=1)
    result = probe_features(train, labels, test, test_labels)
    assert torch.equal(result.hits, result.predictions == test_labels)
    assert result.accuracy == pytest.approx(result.hits.double().mean().item())
    low, high = result.interval
    spread = 1.96 * (result.accuracy * (1 - result.accuracy) / 400) ** 0.5
    assert (low, high) == pytest.approx((result.accuracy - spread, result.accuracy + spread), abs=0.01)
    again = probe_features(train, labels, test, test_labels)
    assert again.interval == result.interval


def test_a_feature_that_never_changes_is_harmless():
    train, labels = clusters(200)
    test, test_labels = clusters(200, seed=1)
    padded = [torch.cat([rows, torch.full((len(rows), 1), 0.1)], 1) for rows in (train, test)]
    plain, with_constant = (
        probe_features(train, labels, test, test_labels),
        probe_features(padded[0], labels, padded[1], test_labels),
    )
    assert torch.equal(plain.predictions, with_constant.predictions)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4), "shape"),
        (torch.full((4, 2), float("nan")), torch.arange(4), "not finite"),
        (torch.randn(4, 2), torch.zeros(4), "one class only"),
    ],
)
def test_bad_input_is_named(features, labels, message):
    with pytest.raises(InputError, match=message):
        fit_linear(features, labels, 0.1)


def test_of_a_single_test_row_the_interval_is_wide():
    train, labels = clusters(100)
    result = probe_features(train, labels, train[:1], labels[:1])
    low, high = result.interval
    assert low <= result.accuracy <= high and high - low > 0.79
    assert result.accuracy == float(result.hits[0])


def test_a_class_that_only_the_held_out_fifth_shows_is_no_error():
    train, labels = clusters(10)
    labels = torch.zeros_like(labels)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    labels[order[0]] = 1  # in the fifth that seed 0 holds out
    result = probe_features(train, labels, train, labels, seed=0)
    assert result.predictions.tolist() == labels.tolist()
