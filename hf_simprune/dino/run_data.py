# SPDX-License-Identifier: Apache-2.0
"""The data of a run: training rows, their crops, and the labelled rows of the k-NN."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, IterableDataset
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.decoding import decode_image
from ..data.loading import (
    encoded_bytes,
    find_image_column,
    find_label_column,
    image_rows,
    known_features,
    load_split,
)
from ..data.streams import Place, ShuffledStream, sample_rows
from ..errors import InputError
from ..evaluation.label_names import UNNAMED_LABELS, numbers_by_name
from ..evaluation.model_files import short_name
from .arguments import DinoArguments
from .augmentation import AugmentationConfig
from .data import MultiCropDataset, OnBadImage, PixelCache, decode_small_set
from .online_knn import LabelledImages, OnlineKnn, drawn, hold_out
from .streaming import StreamingMultiCropDataset
from .views import LoaderSource, StreamSource


DEFAULT_STREAM_BANK = 5000
UNKNOWN_CLASS = -1  # how `datasets` marks images whose class is kept secret


@dataclass(frozen=True)
class RunData:
    """An opened training set. `num_images` is `None` for a stream; `notes` are lines to print.

    evaluated_on: what the k-NN classifies, in words; empty without it.
    """

    args: DinoArguments
    train: Dataset | IterableDataset
    image_column: str
    cache: PixelCache | None
    bank: LabelledImages | None
    queries: LabelledImages | None
    evaluated_on: str
    notes: tuple[str, ...]

    @property
    def num_images(self) -> int | None:
        return None if isinstance(self.train, IterableDataset) else len(self.train)

    def source(self, config: AugmentationConfig, accelerator: Accelerator) -> LoaderSource | StreamSource:
        """Crops for this process."""
        args = self.args
        world, rank = accelerator.num_processes, accelerator.process_index
        batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        workers = args.dataloader_num_workers
        on_bad_image = cast(OnBadImage, args.on_bad_image)  # validated
        if isinstance(self.train, IterableDataset):
            readers = world * max(1, workers)
            rows = ShuffledStream(
                self.train, [self.image_column], args.seed, readers, in_one=args.max_train_samples is not None
            )
            accelerator.print(_about_sharing(rows))

            def open_stream(places: Sequence[Place], first: int) -> StreamingMultiCropDataset:
                return StreamingMultiCropDataset(
                    rows, self.image_column, config, args.seed, on_bad_image, rank, places, first
                )

            return StreamSource(open_stream, rows.layout, config, accelerator.device, batch, accumulation, workers)
        dataset = MultiCropDataset(self.train, self.image_column, config, args.seed, on_bad_image, self.cache)
        return LoaderSource(
            dataset, len(self.train), config, accelerator.device, batch, accumulation, world, rank, args.seed, workers
        )

    def online_knn(
        self, model: PreTrainedModel, processor: BaseImageProcessor, accelerator: Accelerator
    ) -> OnlineKnn | None:
        """The k-NN evaluation, or `None` without labels."""
        if self.bank is None or self.queries is None:
            return None
        args = self.args
        progress = accelerator.is_main_process and not args.disable_tqdm
        return OnlineKnn(
            model,
            processor,
            self.bank,
            self.queries,
            args.knn_k,
            args.knn_temperature,
            accelerator,
            progress=progress,
        )


def open_data(args: DinoArguments) -> RunData:
    """Open the training split and, where there are labels, the rows of the k-NN.

    Raises:
        InputError: missing or empty data set or split, no image column or several, no such label column.
    """
    train = _split(args, args.dataset_name_or_path, args.train_split, args.max_train_samples, "--train_split")
    image_column = find_image_column(train, args.image_column)
    label_column, no_label = _label_column(args, train)
    cache = None if args.streaming else decode_small_set(train, image_column)
    notes = []
    if cache is not None:
        notes.append(f"data: {len(cache):,} decoded images held in memory ({cache.nbytes / 1e6:.1f} MB)")
    bank = queries = None
    evaluated_on = ""
    if label_column is None:
        notes.append(f"k-NN: off, {no_label}")
    else:
        bank, queries, evaluated_on, warning = _knn_images(args, train, image_column, label_column)
        if bank and queries:
            notes.append(f"k-NN: {evaluated_on} of {len(bank.labels.unique())} classes")
            notes += [warning] if warning else []
        else:
            notes.append(f"k-NN: off, there is nothing to classify or to vote ({evaluated_on})")
            bank, queries, evaluated_on = None, None, ""
    if args.eval_dataset_id is not None and queries is None:
        raise InputError(f"--eval_dataset_id {args.eval_dataset_id}: there will be no score for it: {notes[-1]}")
    return RunData(args, train, image_column, cache, bank, queries, evaluated_on, tuple(notes))


def _label_column(args: DinoArguments, train: Dataset | IterableDataset) -> tuple[str | None, str]:
    """The column of class numbers, or `None` and why there is none: labels are not needed to train."""
    try:
        found = find_label_column(known_features(train), args.label_column)
    except InputError as error:
        if args.label_column is not None:
            raise
        return None, str(error)
    return found, "the data set has no column of class numbers (--label_column)"


def _split(args: DinoArguments, name: str, split: str, limit: int | None, option: str) -> Dataset | IterableDataset:
    same = name == args.dataset_name_or_path
    return load_split(
        name,
        split,
        args.dataset_config_name if same else None,
        args.dataset_revision if same else None,
        args.streaming,
        limit,
        args.token,
        split_option=option,
    )


def _about_sharing(rows: ShuffledStream) -> str:
    each = rows.readers_of_a_shard
    shared = "whole shards each" if each == 1 else f"{each} of them on every shard, which each reads in full"
    return (
        f"stream: {rows.shards:,} shard(s) for {rows.readers:,} reader(s), {shared}; shuffled in blocks of "
        f"{rows.block_rows:,} rows"
    )


def _knn_images(
    args: DinoArguments, train: Dataset | IterableDataset, image_column: str, label_column: str
) -> tuple[LabelledImages, LabelledImages, str, str]:
    """Bank and queries, in words what is classified by what, and a warning or an empty text."""
    if isinstance(train, IterableDataset):
        held = min(args.knn_bank_samples, DEFAULT_STREAM_BANK)
        train = sample_rows(train, [image_column, label_column], held, in_one=args.max_train_samples is not None)
    bank_names = _class_names(train, label_column)
    bank = labelled_images(train, image_column, label_column)
    bank = bank.subset(drawn(len(bank), args.knn_bank_samples))
    if args.eval_split is None and args.eval_dataset_name_or_path is None:
        bank, queries = hold_out(bank)
        queries = queries.subset(drawn(len(queries), args.max_eval_samples))
        where = f"{len(queries):,} training images, drawn at random, classified by {len(bank):,} others"
        return bank, queries, where, ""
    name, split = args.eval_dataset_name_or_path or args.dataset_name_or_path, args.eval_split or "train"
    try:
        test = _split(args, name, split, None, "--eval_split")
    except InputError as error:
        if args.eval_dataset_name_or_path is None:
            raise
        raise InputError(str(error).replace("--dataset_name_or_path", "--eval_dataset_name_or_path")) from None
    test_image = find_image_column(test, args.image_column)
    test_label = find_label_column(known_features(test), args.label_column or label_column)
    assert test_label is not None  # it is given by name
    if isinstance(test, IterableDataset):
        test = sample_rows(test, [test_image, test_label], args.max_eval_samples or DEFAULT_STREAM_BANK)
    queries = labelled_images(test, test_image, test_label)
    queries = queries.subset(drawn(len(queries), args.max_eval_samples))
    names = _class_names(test, test_label)
    warning = ""
    if bank_names is not None and names is not None:
        bank = replace(bank, labels=numbers_by_name(bank_names, names)[0][bank.labels])
    elif name != args.dataset_name_or_path:
        warning = UNNAMED_LABELS.format(short_name(args.dataset_name_or_path), short_name(name))
    where = f"{len(queries):,} images of {short_name(name)} ({split}), classified by {len(bank):,} training images"
    return bank, queries, where, warning


def _class_names(dataset: Dataset | IterableDataset, label_column: str) -> list[str] | None:
    feature = known_features(dataset)[label_column]
    return feature.names if isinstance(feature, ClassLabel) else None


def labelled_images(dataset: Dataset, image_column: str, label_column: str) -> LabelledImages:
    """The rows whose class is known, decoded whenever they are asked for."""
    encoded = image_rows(dataset, image_column)
    labels = dataset.select_columns([label_column])[label_column][:]
    rows = [row for row, label in enumerate(labels) if label not in (None, UNKNOWN_CLASS)]

    def image(row: int) -> Image.Image:
        return Image.fromarray(decode_image(encoded_bytes(encoded[row][image_column])).numpy())

    return LabelledImages(image, rows, torch.tensor([labels[row] for row in rows], dtype=torch.int64))
