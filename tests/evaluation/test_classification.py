"""Accuracy of a network's own head, where labels mean what the head means."""

import math

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.evaluation.classification import guessing_probability, head_accuracy, match_labels, predictions
from hf_simprune.evaluation.label_names import numbers_by_name


HEAD = {0: "tench, Tinca tinca", 1: "great white shark, white shark", 2: "sports_car", 3: "crane", 4: "crane"}


def test_classes_are_found_by_any_name_the_head_lists():
    names = ["Sports-Car", "WHITE shark", "tinca_tinca"]
    match = match_labels(torch.tensor([0, 1, 2, 0]), HEAD, names)
    assert match.by_name
    assert match.targets.tolist() == [2, 1, 0, 2]


def test_the_same_list_matches_by_place_even_with_a_name_twice():
    match = match_labels(torch.tensor([4, 3, 0]), HEAD, list(HEAD.values()))
    assert match.targets.tolist() == [4, 3, 0]


@pytest.mark.parametrize(
    ("names", "reason"), [(["tench", "airplane"], "no class 'airplane'"), (["crane", "tench"], "2 classes 'crane'")]
)
def test_names_that_do_not_fit_give_a_reason(names, reason):
    match = match_labels(torch.tensor([0, 1]), HEAD, names)
    assert match.targets is None
    assert reason in match.reason


def test_labels_without_names_are_indices_of_the_head():
    assert match_labels(torch.tensor([4, 0]), HEAD).targets.tolist() == [4, 0]
    match = match_labels(torch.tensor([5, 0]), HEAD)
    assert match.targets is None
    assert "0 to 5" in match.reason


def test_a_head_without_names_takes_labels_as_indices():
    unnamed = {0: "LABEL_0", 1: "LABEL_1"}
    match = match_labels(torch.tensor([1, 0]), unnamed, ["cat", "dog"])
    assert match.targets.tolist() == [1, 0]
    assert not match.by_name


def test_predictions_read_the_images_once_for_all_networks():
    images = torch.randn(7, 3, 4, 4)
    read = []

    def batches():
        for batch in images.split(3):
            read.append(len(batch))
            yield batch

    weight = torch.randn(48, 5)
    networks = {"a": lambda x: x.flatten(1) @ weight, "b": lambda x: -(x.flatten(1) @ weight)}
    found = predictions(networks, batches())
    assert read == [3, 3, 1]
    assert torch.equal(found["a"], (images.flatten(1) @ weight).argmax(1))
    assert torch.equal(found["b"], (images.flatten(1) @ weight).argmin(1))


def test_no_images_are_refused():
    with pytest.raises(InputError, match="no images"):
        predictions({"a": lambda x: x}, [])


def test_accuracies_and_their_difference():
    targets = torch.arange(100)
    before, after = targets.clone(), targets.clone()
    before[:10] = 0  # 91 right (image 0 too)
    after[:30] = 0  # 71 right
    result = head_accuracy(before, after, match_labels(targets, dict(enumerate(map(str, range(100))))), 100)
    assert (result.original, result.compressed) == pytest.approx((0.91, 0.71))
    mean, low, high = result.difference
    assert mean == pytest.approx(-0.2)
    assert -0.30 < low < mean < high < -0.11
    assert result.agreement == pytest.approx(0.8)


def test_labels_without_names_that_the_original_does_not_find_are_not_believed():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(100, (400,), generator=generator)
    guesses = torch.randint(100, (400,), generator=generator)
    names = {index: f"class {index}" for index in range(100)}
    result = head_accuracy(guesses, guesses, match_labels(labels, names), 100)
    assert result.original is None and result.compressed is None and result.difference is None
    assert "no names" in result.reason
    assert result.agreement == 1.0
    by_name = head_accuracy(guesses, guesses, match_labels(labels, names, list(names.values())), 100)
    assert by_name.original is not None


def test_without_targets_the_reason_is_passed_on():
    match = match_labels(torch.tensor([0, 1]), HEAD, ["cat", "dog"])
    result = head_accuracy(torch.tensor([0, 1]), torch.tensor([0, 2]), match, 5)
    assert result.original is None
    assert result.reason == match.reason
    assert result.agreement == 0.5


@pytest.mark.parametrize("classes", [2, 4, 5, 1000])
def test_labels_without_names_are_believed_for_any_number_of_classes(classes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (300,), generator=generator)
    names = {index: f"class {index}" for index in range(classes)}
    guesses = torch.randint(classes, (300,), generator=generator)
    right = torch.rand(300, generator=generator) < 0.8
    found = torch.where(right, labels, guesses)
    good = head_accuracy(found, found, match_labels(labels, names), classes)
    assert good.original == pytest.approx((found == labels).double().mean().item())
    bad = head_accuracy(guesses, guesses, match_labels(labels, names), classes)
    assert bad.original is None and f"guessing among {classes} classes" in bad.reason
    # three right answers of three prove nothing where one in two is right by chance
    if classes == 2:
        assert head_accuracy(labels[:3], labels[:3], match_labels(labels[:3], names), 2).original is None


def test_the_probability_of_guessing_is_that_of_the_binomial_distribution():
    def exact(hits: int, images: int, classes: int) -> float:
        chance = 1 / classes
        return sum(math.comb(images, k) * chance**k * (1 - chance) ** (images - k) for k in range(hits, images + 1))

    for hits, images, classes in [(0, 7, 3), (5, 20, 4), (7, 7, 2), (3, 50, 1000)]:
        assert guessing_probability(hits, images, classes) == pytest.approx(exact(hits, images, classes), rel=1e-9)
    assert guessing_probability(2000, 5000, 3) < 1e-15
    assert guessing_probability(4, 9, 1) == 0


def test_classes_of_two_data_sets_are_numbered_by_name():
    numbers, missing = numbers_by_name(["tench, Tinca tinca", "crane", "owl"], ["owl", "Tench", "jay"])
    assert numbers.tolist() == [1, 4, 0] and missing == [2]
    assert numbers_by_name(["crane", "crane"], ["crane", "crane"])[0].tolist() == [0, 1]  # the very same list
    for names, other in ((["crane", "Crane"], ["crane"]), (["crane"], ["crane", "CRANE"])):
        with pytest.raises(InputError, match="means several classes"):
            numbers_by_name(names, other)
