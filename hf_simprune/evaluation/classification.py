# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a network's own classification head on labelled images, where the labels mean what the head means."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .knn import paired_bootstrap_interval


# Labels without names are believed to be the head's own only if a network that guesses would find as many of them as
# the original does less often than this.
GUESSED = 1e-3


@dataclass(frozen=True)
class LabelMatch:
    """Which of the head's classes each image belongs to.

    Attributes:
        targets: (N,) class indices of the head, or None where the labels mean something else.
        by_name: the classes were found by their names, not taken as indices.
        reason: why there are no targets; empty otherwise.
    """

    targets: Tensor | None
    by_name: bool
    reason: str = ""


@dataclass(frozen=True)
class HeadAccuracy:
    """Top-1 accuracies as fractions, or None with the reason; the difference is compressed - original.

    Attributes:
        original, compressed: accuracies.
        difference: (mean, low, high), the 95 % bootstrap interval over images.
        agreement: fraction of the images to which both networks give the same class; needs no labels.
        images: number of images.
        reason: why there is no accuracy; empty otherwise.
    """

    original: float | None
    compressed: float | None
    difference: tuple[float, float, float] | None
    agreement: float
    images: int
    reason: str = ""


def match_labels(labels: Tensor, id2label: Mapping[int, str], class_names: Sequence[str] | None = None) -> LabelMatch:
    """Find the head's class of every image.

    Names are compared without case, underscores and hyphens; a name may be any of the synonyms that a class of the
    head lists between commas. Labels without names, and those for a head whose classes have none (LABEL_0, …), are
    taken as class indices.

    Args:
        labels: (N,) integer labels of the data set.
        id2label: the head's classes, `model.config.id2label`.
        class_names: the data set's class names by label, if it has any.
    """
    lowest, highest = int(labels.min()), int(labels.max())
    heads = {int(index): name for index, name in id2label.items()}
    if class_names is None or all(name == f"LABEL_{index}" for index, name in heads.items()):
        if lowest < 0 or highest >= len(heads):
            return LabelMatch(None, False, f"labels {lowest} to {highest} are no classes of a head of {len(heads)}")
        return LabelMatch(labels.long(), False)
    if lowest < 0 or highest >= len(class_names):
        return LabelMatch(None, False, f"labels {lowest} to {highest} of {len(class_names)} named classes")
    classes, reason = _match_names(class_names, heads)
    if reason:
        return LabelMatch(None, False, reason)
    return LabelMatch(torch.tensor(classes, device=labels.device)[labels.long()], True)


@torch.inference_mode()
def predictions(
    networks: Mapping[str, Callable[[Tensor], Tensor]],
    pixel_values: Iterable[Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The class each network gives to every image; the images are read once, and only one batch is held.

    Args:
        networks: functions of pixels (B, C, H, W) that return logits (B, classes), by name.
        pixel_values: batches of pixels.

    Returns:
        (N,) class indices on the CPU, by the networks' names.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in networks}
    for batch in pixel_values:
        batch = batch.to(device, dtype)
        for name, network in networks.items():
            found[name].append(network(batch).argmax(dim=1).cpu())
    if not all(found.values()):
        raise InputError("there are no images to classify; at least one is needed")
    return {name: torch.cat(batches) for name, batches in found.items()}


def head_accuracy(
    original: Tensor, compressed: Tensor, match: LabelMatch, num_classes: int, seed: int = 0
) -> HeadAccuracy:
    """Accuracy of the head before and after compression.

    Labels without names need not be the head's classes: there is an accuracy only if the original network finds more
    of them than guessing among `num_classes` would (one-sided binomial test at 0.001).

    Args:
        original: (N,) classes that the original network gives, `compressed` those of the other, on the same images.
        match: what the images are, from [`match_labels`].
        num_classes: of the head.
        seed: of the bootstrap.
    """
    agreement = (original == compressed).double().mean().item()
    if match.targets is None:
        return HeadAccuracy(None, None, None, agreement, len(original), match.reason)
    before, after = ((given == match.targets.cpu()).double() for given in (original, compressed))
    reason = doubt(original, match, num_classes, "the original network")
    if reason:
        return HeadAccuracy(None, None, None, agreement, len(original), reason)
    difference = paired_bootstrap_interval(after, before, seed) if len(before) > 1 else None
    return HeadAccuracy(before.mean().item(), after.mean().item(), difference, agreement, len(original))


def doubt(given: Tensor, match: LabelMatch, num_classes: int, who: str = "the network") -> str:
    """Why labels without names are not believed to be the head's classes; empty where they are, or have names.

    Args:
        given: (N,) classes that a network gives to the images of `match`, which has targets.
        num_classes: of its head.
        who: what to call the network.
    """
    assert match.targets is not None
    hits = given == match.targets.cpu()
    share = 100 * hits.double().mean().item()
    if match.by_name or guessing_probability(int(hits.sum()), len(hits), num_classes) < GUESSED:
        return ""
    return (
        f"there are no names to match labels and classes by, and {who} finds {share:.1f} % of {len(hits)} labels, "
        f"which guessing among {num_classes} classes may too: they are probably not the classes of its head, or the "
        "images are too few to tell"
    )


def guessing_probability(hits: int, images: int, num_classes: int) -> float:
    """How probable it is that guessing among `num_classes` classes finds at least `hits` of `images` labels.

    0 for a head of one class, which leaves nothing to guess.
    """
    if num_classes < 2:
        return 0.0
    count = torch.arange(hits, images + 1, dtype=torch.float64)
    log_ways = math.lgamma(images + 1) - torch.lgamma(count + 1) - torch.lgamma(images - count + 1)
    log_odds = -count * math.log(num_classes) + (images - count) * math.log1p(-1 / num_classes)
    return min(1.0, (log_ways + log_odds).logsumexp(0).exp().item())


def classes_by_name(names: Sequence[str], classes: Mapping[int, str]) -> list[list[int]]:
    """The classes that each name may mean, as [`match_labels`] compares them; those of the whole name come first."""
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for index, name in classes.items():
        whole.setdefault(_plain(name), []).append(index)
        for part in name.split(","):
            parts.setdefault(_plain(part), []).append(index)
    return [whole.get(_plain(name)) or _any_synonym(name, parts) for name in names]


def _match_names(class_names: Sequence[str], heads: Mapping[int, str]) -> tuple[list[int], str]:
    """The head's class of each name, or the reason why there is none."""
    if [_plain(name) for name in class_names] == [_plain(heads.get(i, "")) for i in range(len(class_names))]:
        return list(range(len(class_names))), ""  # the same list, even where it holds a name twice
    classes = []
    for name, found in zip(class_names, classes_by_name(class_names, heads)):
        if not found:
            return [], f"the head has no class {name!r}"
        if len(found) > 1:
            return [], f"the head has {len(found)} classes {name!r}"
        classes.append(found[0])
    return classes, ""


def _any_synonym(name: str, parts: Mapping[str, list[int]]) -> list[int]:
    return sorted({index for part in name.split(",") for index in parts.get(_plain(part), [])})


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
