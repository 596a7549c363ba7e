# SPDX-License-Identifier: Apache-2.0
"""Opening a data set through `datasets` and finding the image and label columns in it."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from ..errors import InputError
from ..options.common import check_revision
from .decoding import DECODING_ERRORS, open_image


LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "class", "target", "cls")
_PROBED_ROWS = 8


def load_split(
    dataset_name_or_path: str,
    split: str,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    split_option: str = "--train_split",
) -> Dataset | IterableDataset:
    """One split of a Hub data set, of a local parquet file (its only split is "train") or of a local folder of
    parquet files, webdataset archives or images.

    `split` may be a slice such as "train[:90%]"; `max_samples` keeps the first rows of it. Raises InputError, naming
    the option, when the set is missing, empty, unreadable or has no such split, for a revision of what is on this
    disk, and for `trust_remote_code`, which `datasets` no longer supports.
    """
    if trust_remote_code:
        raise InputError(
            "--trust_remote_code: datasets no longer runs loading scripts; convert the data set to parquet or images, "
            "or leave the option out"
        )
    check_revision("dataset_revision", revision, dataset_name_or_path)
    arguments = _where(dataset_name_or_path)
    try:
        dataset = datasets.load_dataset(
            **arguments, name=config_name, split=split, revision=revision, streaming=streaming, token=token
        )
        rows = _first_rows(dataset, 1)  # a stream opens its files only now
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise InputError(_explain(error, dataset_name_or_path, split, config_name, split_option)) from error
    if not rows:
        raise InputError(f"--dataset_name_or_path {dataset_name_or_path}: split {split!r} has no rows")
    if max_samples is not None:
        dataset = dataset.take(max_samples) if streaming else dataset.select(range(min(max_samples, len(dataset))))
    return dataset


def _where(name_or_path: str) -> dict[str, Any]:
    """The part of `load_dataset`'s arguments that says where the data is."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise InputError(
                f"--dataset_name_or_path {name_or_path}: a single file must be .parquet; a folder of images, a folder "
                "of parquet files and a Hub name are accepted too"
            )
        if _has_no_rows(path):
            raise InputError(f"--dataset_name_or_path {name_or_path}: it has no rows")
        return {"path": "parquet", "data_files": {"train": str(path)}}
    if path.is_dir():
        return {"path": str(path)}
    # A Hub name is "name" or "namespace/name"; anything else can only have been meant as a path.
    if path.is_absolute() or name_or_path.startswith(("~", ".")) or path.suffix == ".parquet" or len(path.parts) > 2:
        raise InputError(f"--dataset_name_or_path {name_or_path}: there is no such file or folder")
    return {"path": name_or_path}


def _has_no_rows(parquet_file: Path) -> bool:
    try:
        return pyarrow.parquet.read_metadata(parquet_file).num_rows == 0
    except pyarrow.ArrowException:
        return False  # no parquet file; `datasets` will say so


def _explain(error: Exception, name: str, split: str, config_name: str | None, split_option: str) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if "split" in reason and isinstance(error, ValueError):
        return f"{split_option} {split}: no such split in {name}. {reason}"
    if "corresponds to no data" in reason:
        return f"{split_option} {split}: it is empty in {name}"
    if "onfig" in reason and isinstance(error, ValueError):
        return f"--dataset_config_name {config_name}: {reason} (--dataset_name_or_path {name})"
    if error.__cause__ is not None:
        reason += f" ({str(error.__cause__).strip().partition(chr(10))[0]})"
    return f"--dataset_name_or_path {name}: {reason}"


def _first_rows(dataset: Dataset | IterableDataset, count: int) -> list[dict[str, Any]]:
    return list(islice(undecoded(dataset), count))


def known_features(dataset: Dataset | IterableDataset) -> Features:
    """The columns' types; a stream that does not declare them is judged by its first rows."""
    return dataset.features or Dataset.from_list(_first_rows(dataset, _PROBED_ROWS)).features


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows with images left as {"bytes", "path"}."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary", "binary_view")


def _opens(value: Any) -> bool:
    try:
        open_image(encoded_bytes(value))
    except DECODING_ERRORS:
        return False
    return True


def find_image_column(dataset: Dataset | IterableDataset, image_column: str | None = None) -> str:
    """Name of the column that holds the images: an Image feature, or encoded bytes, bare or as {"bytes", "path"}.

    Columns of bytes count only when one of the first rows opens as an image. Raises InputError when there is no such
    column, when there are several and `image_column` does not choose one, or when its choice is none.
    """
    features = known_features(dataset)
    rows = _first_rows(dataset, _PROBED_ROWS)
    names = ", ".join(features)
    if image_column is not None and image_column not in features:
        raise InputError(f"--image_column {image_column}: no such column; there are {names}")
    candidates = [
        name
        for name, feature in features.items()
        if image_column in (None, name)
        and (isinstance(feature, Image) or (_holds_bytes(feature) and any(_opens(row[name]) for row in rows)))
    ]
    if image_column is not None and not candidates:
        raise InputError(
            f"--image_column {image_column}: it holds no images, neither an Image feature nor encoded bytes"
        )
    if not candidates:
        raise InputError(
            f"--dataset_name_or_path: no column holds images (an Image feature or encoded bytes); there are {names}"
        )
    if len(candidates) > 1:
        raise InputError(f"--image_column: both {' and '.join(candidates)} hold images; choose one")
    return candidates[0]


def find_label_column(features: Features, label_column: str | None = None) -> str | None:
    """Name of the column with class numbers, or None: a ClassLabel, or integers named label, labels, ….

    Raises InputError when `label_column` names none, or when it is not given and several candidates have no plain
    `label` among them.
    """

    def holds_classes(feature: Any) -> bool:
        integers = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))
        return isinstance(feature, ClassLabel) or integers

    if label_column is not None:
        if label_column not in features or not holds_classes(features[label_column]):
            options = ", ".join(name for name, feature in features.items() if holds_classes(feature)) or "none"
            raise InputError(f"--label_column {label_column}: no such column of class numbers; there are: {options}")
        return label_column
    candidates = [
        name
        for name, feature in features.items()
        if isinstance(feature, ClassLabel) or (name in LABEL_NAMES and holds_classes(feature))
    ]
    if len(candidates) > 1 and LABEL_NAMES[0] not in candidates:
        raise InputError(f"--label_column: {', '.join(candidates)} all hold class numbers; choose one")
    return LABEL_NAMES[0] if LABEL_NAMES[0] in candidates else next(iter(candidates), None)


def encoded_bytes(value: Any) -> bytes:
    """The encoded image of one cell: bytes, or {"bytes", "path"} of an undecoded Image feature.

    Raises ValueError for an empty cell and OSError for a path that cannot be read.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        with datasets.utils.file_utils.xopen(value, "rb") as file:
            return file.read()
    if not value:
        raise ValueError("the cell is empty")
    return value


def image_rows(dataset: Dataset | IterableDataset, image_column: str) -> Dataset | IterableDataset:
    """The image column alone, undecoded: what `encoded_bytes` reads."""
    return undecoded(dataset.select_columns([image_column]))
