# SPDX-License-Identifier: Apache-2.0
"""One network, or two on the same images: accuracies with paired intervals, parameters, FLOPs and latency."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .classification import LabelMatch, doubt, match_labels
from .frozen import FrozenResult, Seen, knn_result, known_classes, linear_result
from .knn import accuracy_interval, paired_bootstrap_interval
from .latency import interleave, median_ratio
from .model_cost import macs, parameters
from .outputs import Network


@dataclass(frozen=True)
class Score:
    """A top-1 accuracy as a fraction with its 95 % interval, both None where there is none and a reason for it.

    `hits` are (N,) booleans of the images; they are not part of the record.
    """

    accuracy: float | None
    interval: tuple[float, float] | None
    images: int
    hits: Tensor | None = None
    reason: str = ""
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Scores:
    """Everything measured of one network.

    Attributes:
        name: as it was given.
        parameters: held.
        macs: of one image.
        seconds: median wall time of one image.
        file_bytes: of the weights; 0 where they are not in a folder.
        accuracies: by what they are of: "k-NN", "linear probe", "own head".
    """

    name: str
    parameters: int
    macs: int
    seconds: float
    file_bytes: int
    accuracies: dict[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """One network, and perhaps a second to compare it with.

    Attributes:
        model, baseline: the networks.
        device: what latency was measured on.
        latency_ratio: model / baseline, (median, low, high), measured in turns.
        differences: model - baseline by accuracy, (mean, low, high) with the paired 95 % interval, as fractions.
        agreement: fraction of the images that both heads give the same class.
        images: how many were classified.
    """

    model: Scores
    baseline: Scores | None
    device: str
    images: int
    latency_ratio: tuple[float, float, float] | None = None
    differences: dict[str, tuple[float, float, float]] | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        record = {key: getattr(self, key) for key in ("device", "images", "latency_ratio", "differences", "agreement")}
        sides = {"model": self.model, "baseline": self.baseline}
        return {name: None if side is None else _plain(side) for name, side in sides.items()} | record

    def rows(self) -> list[list[str]]:
        """(quantity, model) as text, with a baseline (quantity, baseline, model, change)."""
        first = self.model
        sides = [first] if self.baseline is None else [self.baseline, first]
        table = [
            ["parameters, M", *(f"{side.parameters / 1e6:.4g}" for side in sides)],
            ["FLOPs an image, G", *(f"{2 * side.macs / 1e9:.4g}" for side in sides)],
            ["file, MB", *(f"{side.file_bytes / 1e6:.4g}" if side.file_bytes else "-" for side in sides)],
            [f"latency of one image, ms ({self.device})", *(f"{1e3 * side.seconds:.4g}" for side in sides)],
        ]
        for name in first.accuracies:
            scores = [side.accuracies[name] for side in sides]
            if any(score.accuracy is not None for score in scores):
                table.append([f"top-1, {name}", *(_accuracy(score) for score in scores)])
        if self.baseline is None:
            return table
        other = self.baseline
        pairs = ((other.parameters, first.parameters), (other.macs, first.macs), (other.file_bytes, first.file_bytes))
        changes = [f"{100 * (b / a - 1):+.1f} %" if a and b else "" for a, b in pairs]
        if self.latency_ratio is not None:
            changes.append("x{:.3f} [{:.3f}, {:.3f}]".format(*self.latency_ratio))
        shown = dict(zip((row[0] for row in table), changes))
        for name, (mean, low, high) in (self.differences or {}).items():
            shown[f"top-1, {name}"] = f"{100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        return [[*row, shown.get(row[0], "")] for row in table]


def match_heads(
    networks: Sequence[Network], seen: Sequence[Seen], class_names: Sequence[str] | None
) -> list[LabelMatch]:
    """Which of its head's classes the images show, for every network.

    Labels without names are judged once for all heads with the same classes: what one of them finds more often than
    guessing would are the classes of the others too, be these ever so bad.

    Args:
        seen: what each network made of the images.
        class_names: of the labels, where they have names.
    """
    matches, doubts = [], []
    heads = [
        {} if found.classes is None else {int(i): name for i, name in (network.model.config.id2label or {}).items()}
        for network, found in zip(networks, seen)
    ]
    for head, found in zip(heads, seen):
        match = LabelMatch(None, False, "the network has no classification head")
        if found.classes is not None:
            match = match_labels(found.labels, head, class_names)
        matches.append(match)
        why = ""
        if found.classes is not None and match.targets is not None:
            why = doubt(found.classes, match, len(head))
        doubts.append(why)
    believed = [head for head, match, why in zip(heads, matches, doubts) if match.targets is not None and not why]
    return [
        LabelMatch(None, False, why) if why and head not in believed else match
        for head, match, why in zip(heads, matches, doubts)
    ]


def score_network(
    network: Network,
    name: str,
    train: Seen,
    test: Seen,
    match: LabelMatch,
    k: int,
    temperature: float,
    seed: int,
    file_bytes: int = 0,
) -> Scores:
    """Everything but the time, which is measured of all networks in turns.

    Args:
        train, test: what the network made of the images.
        match: which of the head's classes the test images show, from [`match_heads`].
        k, temperature: of the k-NN.
    """
    accuracies = {
        "k-NN": _knn(train, test, k, temperature, seed),
        "linear probe": _linear(train, test, seed),
        "own head": _head(test, match, seed),
    }
    pixels = test.first.to(network.model.device, network.model.dtype)
    return Scores(name, parameters(network.model), macs(network.forward, pixels), 0.0, file_bytes, accuracies)


@torch.inference_mode()
def side_by_side(
    networks: Sequence[Network], scores: Sequence[Scores], seen: Sequence[Seen], rounds: int, seed: int
) -> Evaluation:
    """Latency of the networks in turns, and the paired comparison where there are two: model, then baseline.

    Args:
        seen: what each made of the test images.
    """
    device = networks[0].model.device
    pixels = [found.first.to(device, network.model.dtype) for network, found in zip(networks, seen)]
    calls = {str(i): lambda i=i: networks[i].forward(pixels[i]) for i in range(len(networks))}
    times = interleave(calls, rounds, device, warmup=min(3, rounds))
    timed = [replace(score, seconds=statistics.median(times[str(i)])) for i, score in enumerate(scores)]
    name, images = str(device.type).upper(), len(seen[0].labels)
    if len(timed) == 1:
        return Evaluation(timed[0], None, name, images)
    model, baseline = timed
    differences = {}
    for kind, score in model.accuracies.items():
        other = baseline.accuracies[kind]
        if score.hits is not None and other.hits is not None and len(score.hits) > 1:
            differences[kind] = paired_bootstrap_interval(score.hits, other.hits, seed)
    classes = [found.classes for found in seen]
    agreement = None
    if classes[0] is not None and classes[1] is not None:
        agreement = (classes[0] == classes[1]).double().mean().item()
    ratio = median_ratio(times["0"], times["1"])
    latency = (ratio.median, ratio.low, ratio.high)
    return Evaluation(model, baseline, name, images, latency, differences, agreement)


def _of(result: FrozenResult) -> Score:
    settings = {**result.settings, "train_images": result.train_images}
    return Score(result.accuracy, result.interval, len(result.hits), result.hits, settings=settings)


def _knn(train: Seen, test: Seen, k: int, temperature: float, seed: int) -> Score:
    if not known_classes(train, test).any():
        return Score(None, None, len(test.labels), reason=_unknown(test))
    return _of(knn_result(train, test, k, temperature, seed))


def _unknown(test: Seen) -> str:
    return f"no training image shows any of the {len(torch.unique(test.labels))} classes of the evaluation images"


def _linear(train: Seen, test: Seen, seed: int) -> Score:
    if len(torch.unique(train.labels)) < 2:
        return Score(None, None, len(test.labels), reason="the training images show one class only")
    if not known_classes(train, test).any():
        return Score(None, None, len(test.labels), reason=_unknown(test))
    return _of(linear_result(train, test, seed=seed))


def _head(test: Seen, match: LabelMatch, seed: int) -> Score:
    if test.classes is None or match.targets is None:
        return Score(None, None, len(test.labels), reason=match.reason)
    hits = test.classes == match.targets.cpu()
    return Score(hits.double().mean().item(), accuracy_interval(hits, seed), len(hits), hits)


def _plain(scores: Scores) -> dict[str, Any]:
    accuracies = {
        name: {key: value for key, value in vars(score).items() if key != "hits"}
        for name, score in scores.accuracies.items()
    }
    shallow = {key: value for key, value in vars(scores).items() if key != "accuracies"}
    return {**shallow, "flops": 2 * scores.macs, "accuracies": accuracies}


def _accuracy(score: Score) -> str:
    if score.accuracy is None or score.interval is None:
        return "-"
    return f"{100 * score.accuracy:.1f} % [{100 * score.interval[0]:.1f}, {100 * score.interval[1]:.1f}]"
