# SPDX-License-Identifier: Apache-2.0
"""`evaluate` from options to the table; read it top to bottom."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from ..errors import InputError
from ..hub.eval_results import benchmark_entry, evaluated_images, write_benchmark_entries
from ..hub.facts import hardware, versions
from ..options.common import DatasetArguments
from ..rba.arguments import AnalyzeArguments, validate_analysis
from ..rba.checkpoint import load_checkpoint
from ..rba.comparison import LabelledRows
from ..rba.report import text_table
from ..rba.run_images import RunImages, open_images
from ..terminal import highlighted
from .arguments import EvaluateArguments, validate_evaluation
from .frozen import Seen, known_classes, see
from .model_cost import file_size
from .model_files import short_name
from .outputs import Network
from .side_by_side import Evaluation, Scores, match_heads, score_network, side_by_side


# What the analysis calls otherwise; the first two are options.
_NAMES = {
    "calibration_split": "train_split",
    "calibration_images": "train_images",
    "to calibrate on": "to learn from",
    "from calibration": "from the training images",
    "calibration images": "training images",
    "calibration split": "training split",
}


INTERVALS = (
    "Brackets are 95 % intervals: bootstrap over images (Wilson's where all images or none are hits); of latency, "
    "bootstrap over rounds."
)


def run_evaluate(args: EvaluateArguments, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Evaluate, print the table, and write the benchmark entry where one is asked for.

    Returns:
        The record: the evaluation, the images and the protocol.

    Raises:
        InputError: bad input, before the evaluation starts where that can be known.
    """
    validate_evaluation(args)
    wanted = _as_analysis(args)
    with _own_names():
        validate_analysis(wanted)
    progress = not args.disable_tqdm and sys.stderr.isatty()
    if not progress:
        datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    places = [(args.model_name_or_path, args.model_revision)]
    if args.baseline is not None:
        places.append((args.baseline, args.baseline_revision))
    if args.eval_dataset_id is not None and not Path(str(args.model_name_or_path)).is_dir():
        raise InputError(
            f"--eval_dataset_id {args.eval_dataset_id}: the entry is written into the model's folder, and "
            f"{args.model_name_or_path} is none on this disk: download it first"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoints = []
    for number, (place, revision) in enumerate(places):
        try:
            checkpoints.append(load_checkpoint(str(place), revision, args.token))
        except InputError as error:
            if number == 0:
                raise
            told = str(error).replace("--model_name_or_path", "--baseline")
            raise InputError(told.replace("--model_revision", "--baseline_revision")) from None
    for checkpoint in checkpoints:
        torch.nn.Module.to(checkpoint.model, device)
    networks = [Network(checkpoint.model) for checkpoint in checkpoints]
    with _own_names():
        images = open_images(wanted, checkpoints[0].processor)
    _check_labels(args, images)
    for note in images.notes:
        say(note)

    seen: list[tuple[Seen, Seen]] = []
    for network, checkpoint, (place, _) in zip(networks, checkpoints, places):
        rows = [_prepared_by(checkpoint.processor, part) for part in (images.training, images.evaluation)]
        names = [f"{kind} images, {short_name(str(place))}" for kind in ("training", "evaluation")]
        train, test = (
            see(network, part, args.batch_size, name if progress else None) for part, name in zip(rows, names)
        )
        if args.knn_k > len(train.labels):
            raise InputError(f"--knn_k {args.knn_k}: there are only {len(train.labels)} training images")
        seen.append((train, test))
    tests = [test for _, test in seen]
    matches = match_heads(networks, tests, images.evaluation.class_names)
    scores: list[Scores] = []
    for network, (place, _), (train, test), match in zip(networks, places, seen, matches):
        folder = Path(str(place))
        size = file_size(folder) if folder.is_dir() else 0
        scores.append(
            score_network(network, str(place), train, test, match, args.knn_k, args.knn_temperature, args.seed, size)
        )
    found = side_by_side(networks, scores, tests, args.rounds, args.seed)
    unseen = _unseen(*seen[0])
    _tell(found, images, unseen, say)
    record = _record(args, found, images, unseen)
    if args.eval_dataset_id is not None:
        record["eval_results"] = _write_entry(args, found, images, say)
    return record


def _as_analysis(args: EvaluateArguments) -> AnalyzeArguments:
    """The same images in the words of an analysis, which opens, holds out and compares them."""
    shared = {entry.name: vars(args)[entry.name] for entry in fields(DatasetArguments)}
    return AnalyzeArguments(
        output_dir="",
        calibration_split=args.train_split,
        calibration_images=args.train_images,
        streaming=args.streaming,
        batch_size=args.batch_size,
        seed=args.seed,
        **shared,
    )


@contextmanager
def _own_names() -> Iterator[None]:
    """Around code of the analysis: its errors name the options of this command."""
    try:
        yield
    except InputError as error:
        raise InputError(_in_own_words(str(error))) from None


def _in_own_words(text: str) -> str:
    for theirs, ours in _NAMES.items():
        text = text.replace(theirs, ours)
    return text


def _check_labels(args: EvaluateArguments, images: RunImages) -> None:
    if images.unknown_classes:
        names = ", ".join(map(repr, images.unknown_classes[:3])) + (", …" if len(images.unknown_classes) > 3 else "")
        raise InputError(
            f"--eval_split {args.eval_split or 'train'}: its images show {len(images.unknown_classes)} classes that "
            f"{args.train_split} of {args.dataset_name_or_path} has no name for ({names}); a split whose classes have "
            "the names of the training split is accepted"
        )
    for part, split in ((images.training, args.train_split), (images.evaluation, args.eval_split or args.train_split)):
        if part.labels is None:
            given = f" {args.label_column}" if args.label_column else ""
            raise InputError(
                f"--label_column{given}: {split} of {args.dataset_name_or_path} has no class label for every image, "
                "and accuracies need one; name the column that holds it"
            )


def _prepared_by(processor: Any, images: LabelledRows) -> LabelledRows:
    """The same rows, prepared as another network wants them."""
    reader = copy.copy(images.reader)
    reader.processor = processor
    return replace(images, reader=reader)


def _unseen(train: Seen, test: Seen) -> dict[str, int]:
    """How many evaluation images, of how many classes, show what no training image does."""
    labels = test.labels[~known_classes(train, test)]
    return {"images": len(labels), "classes": len(torch.unique(labels))}


def _tell(found: Evaluation, images: RunImages, unseen: dict[str, int], say: Callable[[str], None]) -> None:
    sides = [found.model] if found.baseline is None else [found.baseline, found.model]
    short = [short_name(side.name) for side in sides]
    names = short if len(set(short)) == len(short) else [side.name for side in sides]
    header = ["", *names, *(["change"] if found.baseline is not None else [])]
    title = f"On {_in_own_words(images.evaluated_on)}; learned from {len(images.training.rows)} images"
    say(highlighted(text_table(header, found.rows(), title)))
    if any(score.accuracy is not None for side in sides for score in side.accuracies.values()):
        say(INTERVALS)
    if 0 < unseen["images"] < found.images:
        say(
            f"{unseen['images']} of {found.images} evaluation images show {unseen['classes']} classes that no "
            "training image does: k-NN and linear probe cannot find them."
        )
    for side in sides:
        for kind, score in side.accuracies.items():
            if score.reason:
                say(f"No accuracy of the {kind} of {side.name}: {score.reason}.")


def _record(args: EvaluateArguments, found: Evaluation, images: RunImages, unseen: dict[str, int]) -> dict[str, Any]:
    readers = (images.training.reader, images.evaluation.reader)  # one and the same where images are held out
    eval_split = args.eval_split or ("train" if args.eval_dataset_name_or_path else args.train_split)
    unreadable = {id(reader): reader.unreadable for reader in readers}
    return {
        **found.to_dict(),
        "data": {
            "dataset": args.dataset_name_or_path,
            "config": args.dataset_config_name,
            "revision": args.dataset_revision,
            "train_split": args.train_split,
            "train_images": len(images.training.rows),
            "eval_dataset": args.eval_dataset_name_or_path or args.dataset_name_or_path,
            "eval_split": eval_split,
            "evaluated_on": _in_own_words(images.evaluated_on),
            "unseen_in_training": unseen,
            "unreadable": sum(len(found) for found in unreadable.values()),
        },
        "intervals": INTERVALS,
        "options": {name: value for name, value in asdict(args).items() if name != "token"},
        "seed": args.seed,
        "hardware": hardware(),
        "versions": versions(),
    }


def _write_entry(
    args: EvaluateArguments, found: Evaluation, images: RunImages, say: Callable[[str], None]
) -> list[str]:
    """The benchmark's entry: the score of the network's own head, or of the k-NN where it has none."""
    kind = "own head" if found.model.accuracies["own head"].accuracy is not None else "k-NN"
    score = found.model.accuracies[kind]
    protocol = "image classification" if kind == "own head" else "k-NN classification of frozen features"
    if score.accuracy is None:
        say(f"No entry for {args.eval_dataset_id}: {score.reason}.")
        return []
    measured_on = evaluated_images(args, args.train_split, args.eval_dataset_id)
    result = measured_on.accuracy(f"top-1, {kind}", score.accuracy, score.images, protocol)
    entry = benchmark_entry(result, str(args.eval_dataset_id), args.eval_task_id)
    paths = write_benchmark_entries(str(args.model_name_or_path), [entry])
    for path in paths:
        say(f"wrote {path}")
    return [str(path) for path in paths]
