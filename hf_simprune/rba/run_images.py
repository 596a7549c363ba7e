# SPDX-License-Identifier: Apache-2.0
"""The images of a run: to calibrate on, and held out from that to evaluate on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import ClassLabel, Dataset
from transformers.image_processing_utils import BaseImageProcessor

from ..data.loading import find_label_column, load_split
from ..errors import InputError
from ..evaluation.label_names import UNNAMED_LABELS
from ..evaluation.model_files import short_name
from .arguments import AnalyzeArguments, CompressArguments
from .calibration import CalibrationSet, ImageReader, open_calibration_set
from .comparison import LabelledRows, labels_of
from .label_names import in_same_numbers, shares_unnamed_labels
from .stream_rows import STREAMED_EVALUATION_IMAGES, about_held, hold_rows, rows_needed


EVALUATION_IMAGES = 5000


@dataclass(frozen=True)
class RunImages:
    """`calibration` fits and chooses; `training` are the same images with labels; `evaluation` is seen by neither.

    `unknown_classes` are names of classes that evaluation images show and that the training images have no name for;
    `notes` are lines to print.
    """

    calibration: CalibrationSet
    training: LabelledRows
    evaluation: LabelledRows
    evaluated_on: str
    unknown_classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_images(args: AnalyzeArguments | CompressArguments, processor: BaseImageProcessor) -> RunImages:
    """Open the data and fix every choice of rows before an image is read.

    Raises:
        InputError: no such data, no images in it, too few rows.
    """
    own_split = args.eval_split is not None or args.eval_dataset_name_or_path is not None
    held = rows_needed(args.calibration_images, args.max_eval_samples, not own_split) if args.streaming else None
    calibration, rows = open_calibration_set(
        args.dataset_name_or_path,
        processor,
        args.calibration_split,
        args.dataset_config_name,
        args.dataset_revision,
        args.image_column,
        args.calibration_images,
        hold_out=not own_split,
        seed=args.seed,
        token=args.token,
        trust_remote_code=args.trust_remote_code,
        held_rows=held,
        label_column=args.label_column,
    )
    notes = [about_held(rows, args.calibration_split)] if args.streaming else []
    reader, evaluation_rows = calibration.reader, rows
    chosen = list(calibration.evaluation)
    where = "held out from calibration"
    if own_split:
        name = args.eval_dataset_name_or_path or args.dataset_name_or_path
        split = args.eval_split or "train"
        same = name == args.dataset_name_or_path
        try:
            evaluation_rows = load_split(
                name,
                split,
                args.dataset_config_name if same else None,
                args.dataset_revision if same else None,
                args.streaming,
                token=args.token,
                split_option="--eval_split",
            )
            if args.streaming:
                count = args.max_eval_samples or STREAMED_EVALUATION_IMAGES
                evaluation_rows = hold_rows(evaluation_rows, count, args.image_column, args.label_column, args.seed)
                notes.append(about_held(evaluation_rows, split))
        except InputError as error:
            if args.eval_dataset_name_or_path is None:
                raise
            raise InputError(str(error).replace("--dataset_name_or_path", "--eval_dataset_name_or_path")) from None
        reader = ImageReader(evaluation_rows, processor, args.image_column)
        chosen = torch.randperm(len(evaluation_rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
        where = f"of {split}" if args.eval_dataset_name_or_path is None else f"of {short_name(name)} ({split})"
    most = args.max_eval_samples or EVALUATION_IMAGES
    training = (*calibration.fit, *calibration.select)
    if not own_split:
        chosen = chosen[:most]
    else:
        chosen, shared = without_shared(calibration.reader, training, reader, chosen, most)
        if not chosen:
            raise InputError(
                f"--eval_split {args.eval_split or 'train'}: all {shared} images of it are calibration images too; "
                "name a split that shares none with --calibration_split"
            )
        where += f", without {shared} that are calibration images too" if shared else ""
    evaluation = _labelled(reader, evaluation_rows, tuple(chosen), args.label_column)
    learned, unknown = in_same_numbers(_labelled(calibration.reader, rows, training, args.label_column), evaluation)
    if args.eval_dataset_name_or_path is not None and shares_unnamed_labels(learned, evaluation):
        notes.append(
            UNNAMED_LABELS.format(short_name(args.dataset_name_or_path), short_name(args.eval_dataset_name_or_path))
        )
    return RunImages(calibration, learned, evaluation, f"{len(chosen)} images {where}", unknown, tuple(notes))


def without_shared(
    calibration: ImageReader, used: Sequence[int], evaluation: ImageReader, rows: Sequence[int], most: int
) -> tuple[list[int], int]:
    """The first `most` of `rows` of `evaluation` that no row `used` of `calibration` holds too, byte by byte.

    Also how many were left out before that many were found.
    """
    known = {calibration.digest(row) for row in used} - {None}
    kept: list[int] = []
    shared = 0
    for row in rows:
        if len(kept) == most:
            break
        if evaluation.digest(row) in known:
            shared += 1
        else:
            kept.append(row)
    return kept, shared


def _labelled(reader: ImageReader, rows: Dataset, chosen: tuple[int, ...], label_column: str | None) -> LabelledRows:
    column = find_label_column(rows.features, label_column)
    feature = rows.features[column] if column is not None else None
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    return LabelledRows(reader, chosen, labels_of(rows, column, chosen), names)
