# SPDX-License-Identifier: Apache-2.0
"""`evaluate` from options to the table; read it top to bottom."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
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
from .frozen import Seen, see
from .model_cost import file_size
from .model_files import short_name
from .outputs import Network
from .side_by_side import Evaluation, Scores, score_network, side_by_side


# What the analysis calls otherwise; the first two are options.
_NAMES = {
    "calibration_split": "train_split",
    "calibration_images": "train_images",
    "to calibrate on": "to learn from",
    "from calibration": "from the training images",
    "calibration images": "training images",
    "calibration split": "training split",
}


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
            raise InputError(str(error).replace("--model_name_or_path", "--baseline")) from None
    for checkpoint in checkpoints:
        torch.nn.Module.to(checkpoint.model, device)
    networks = [Network(checkpoint.model) for checkpoint in checkpoints]
    with _own_names():
        images = open_images(wanted, checkpoints[0].processor)
    _check_labels(args, images)
    for note in images.notes:
        say(note)

    scores: list[Scores] = []
    seen: list[Seen] = []
    for network, checkpoint, (place, _) in zip(networks, checkpoints, places):
        rows = [_prepared_by(checkpoint.processor, part) for part in (images.training, images.evaluation)]
        names = [f"{kind} images, {short_name(str(place))}" for kind in ("training", "evaluation")]
        train, test = (
            see(network, part, args.batch_size, name if progress else None) for part, name in zip(rows, names)
        )
        if args.knn_k > len(train.labels):
            raise InputError(f"--knn_k {args.knn_k}: there are only {len(train.labels)} training images")
        folder = Path(str(place))
        size = file_size(folder) if folder.is_dir() else 0
        class_names = images.evaluation.class_names
        scores.append(
            score_network(
                network, str(place), train, test, class_names, args.knn_k, args.knn_temperature, args.seed, size
            )
        )
        seen.append(test)
    found = side_by_side(networks, scores, seen, args.rounds, args.seed)
    _tell(found, images, say)
    record = _record(args, found, images)
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


def _tell(found: Evaluation, images: RunImages, say: Callable[[str], None]) -> None:
    sides = [found.model] if found.baseline is None else [found.baseline, found.model]
    short = [short_name(side.name) for side in sides]
    names = short if len(set(short)) == len(short) else [side.name for side in sides]
    header = ["", *names, *(["change"] if found.baseline is not None else [])]
    title = f"On {_in_own_words(images.evaluated_on)}; learned from {len(images.training.rows)} images"
    say(highlighted(text_table(header, found.rows(), title)))
    for side in sides:
        for kind, score in side.accuracies.items():
            if score.reason:
                say(f"No accuracy of the {kind} of {side.name}: {score.reason}.")


def _record(args: EvaluateArguments, found: Evaluation, images: RunImages) -> dict[str, Any]:
    readers = (images.training.reader, images.evaluation.reader)  # one and the same where images are held out
    unreadable = {id(reader): reader.unreadable for reader in readers}
    return {
        **found.to_dict(),
        "data": {
            "dataset": args.dataset_name_or_path,
            "config": args.dataset_config_name,
            "revision": args.dataset_revision,
            "train_split": args.train_split,
            "train_images": len(images.training.rows),
            "evaluated_on": _in_own_words(images.evaluated_on),
            "unreadable": sum(len(found) for found in unreadable.values()),
        },
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
    measured_on = evaluated_images(args, args.train_split, args.eval_dataset_id)
    result = measured_on.accuracy(f"top-1, {kind}", float(score.accuracy or 0.0), score.images, protocol)
    entry = benchmark_entry(result, str(args.eval_dataset_id), args.eval_task_id)
    paths = write_benchmark_entries(str(args.model_name_or_path), [entry])
    for path in paths:
        say(f"wrote {path}")
    return [str(path) for path in paths]
