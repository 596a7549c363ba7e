# SPDX-License-Identifier: Apache-2.0
"""The data of a run: training rows, their crops, and the labelled rows of the k-NN."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from .arguments import DinoArguments
from .augmentation import AugmentationConfig
from .crops import decode_image
from .data import MultiCropDataset, PixelCache, decode_small_set
from .dataset_loading import encoded_bytes, find_image_column, find_label_column, image_rows, load_split, undecoded
from .online_knn import LabelledImages, OnlineKnn, hold_out, spread_rows
from .streaming import StreamingMultiCropDataset
from .views import LoaderSource, StreamSource


DEFAULT_STREAM_BANK = 5000


@dataclass(frozen=True)
class RunData:
    """An opened training set. `num_images` is `None` for a stream; `notes` are lines to print."""

    args: DinoArguments
    train: Dataset | IterableDataset
    image_column: str
    cache: PixelCache | None
    bank: LabelledImages | None
    queries: LabelledImages | None
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
        if isinstance(self.train, IterableDataset):

            def open_stream(start_batch: int) -> StreamingMultiCropDataset:
                return StreamingMultiCropDataset(
                    self.train,
                    self.image_column,
                    config,
                    args.seed,
                    batch,
                    args.on_bad_image,
                    world,
                    rank,
                    workers,
                    start_batch,
                )

            open_stream(0)  # says at once when there are more workers than shards
            return StreamSource(open_stream, config, accelerator.device, batch, accumulation, workers)
        dataset = MultiCropDataset(self.train, self.image_column, config, args.seed, args.on_bad_image, self.cache)
        return LoaderSource(
            dataset, len(self.train), config, accelerator.device, batch, accumulation, world, rank, args.seed, workers
        )

    def online_knn(
        self, model: PreTrainedModel, processor: BaseImageProcessor, accelerator: Accelerator
    ) -> Callable[[int], dict[str, float]] | None:
        """The k-NN evaluation, or `None` without labels."""
        if self.bank is None or self.queries is None:
            return None
        args = self.args
        progress = accelerator.is_main_process and not args.disable_tqdm
        return OnlineKnn(
            model, processor, self.bank, self.queries, args.knn_k, args.knn_temperature, progress=progress
        )


def open_data(args: DinoArguments) -> RunData:
    """Open the training split and, where there are labels, the rows of the k-NN.

    Raises:
        InputError: missing or empty data set or split, no image column or several, no such label column.
    """
    train = _split(args, args.dataset_name_or_path, args.train_split, args.max_train_samples, "--train_split")
    image_column = find_image_column(train, args.image_column)
    label_column = find_label_column(train.features, args.label_column) if train.features is not None else None
    cache = None if args.streaming else decode_small_set(train, image_column)
    notes = []
    if cache is not None:
        notes.append(f"data: {len(cache):,} decoded images held in memory ({cache.nbytes / 1e6:.1f} MB)")
    bank = queries = None
    if label_column is None:
        notes.append("k-NN: off, the data set has no column of class labels (--label_column)")
    else:
        bank, queries, note = _knn_rows(args, train, image_column, label_column)
        notes.append(note)
    return RunData(args, train, image_column, cache, bank, queries, tuple(notes))


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


def _knn_rows(
    args: DinoArguments, train: Dataset | IterableDataset, image_column: str, label_column: str
) -> tuple[LabelledImages, LabelledImages, str]:
    """Bank and queries, and a line that says what they are."""
    if isinstance(train, IterableDataset):
        train = _held(train, min(args.knn_bank_samples, DEFAULT_STREAM_BANK), image_column, label_column)
    rows = spread_rows(len(train), args.knn_bank_samples)
    evaluates_elsewhere = args.eval_split is not None or args.eval_dataset_name_or_path is not None
    if not evaluates_elsewhere:
        bank_rows, query_rows = hold_out(rows)
        query_rows = query_rows[: args.max_eval_samples]
        bank = labelled_images(train, image_column, label_column, bank_rows)
        queries = labelled_images(train, image_column, label_column, query_rows)
        note = f"k-NN: every tenth training image ({len(queries):,}) is classified by {len(bank):,} others"
        return bank, queries, note + "; name other images with --eval_split"
    name, split = args.eval_dataset_name_or_path or args.dataset_name_or_path, args.eval_split or "train"
    test = _split(args, name, split, None, "--eval_split")
    test_image = find_image_column(test, args.image_column)
    test_label = find_label_column(test.features, args.label_column or label_column)
    if isinstance(test, IterableDataset):
        test = _held(test, args.max_eval_samples or DEFAULT_STREAM_BANK, test_image, test_label)
    bank = labelled_images(train, image_column, label_column, rows)
    queries = labelled_images(test, test_image, test_label, spread_rows(len(test), args.max_eval_samples))
    note = f"k-NN: {len(queries):,} images of {name} ({split}) are classified by {len(bank):,} training images"
    return bank, queries, note


def labelled_images(dataset: Dataset, image_column: str, label_column: str, rows: Sequence[int]) -> LabelledImages:
    """The given rows, decoded whenever they are asked for."""
    encoded = image_rows(dataset, image_column)
    labels = torch.tensor(dataset.select_columns([label_column])[label_column][:])

    def image(row: int) -> Image.Image:
        return Image.fromarray(decode_image(encoded_bytes(encoded[row][image_column])).numpy())

    return LabelledImages(image, list(rows), labels[list(rows)])


def _held(stream: IterableDataset, count: int, image_column: str, label_column: str) -> Dataset:
    """The first rows of a stream, still encoded, in memory."""
    return Dataset.from_list(list(undecoded(stream).select_columns([image_column, label_column]).take(count)))
