"""Small pictures in parquet files, for the tests of the data pipeline."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_simprune.dino.augmentation import AugmentationConfig


CFG = AugmentationConfig(global_crop_size=24, local_crop_size=12, local_crops_number=2)


def pixels(seed: int, width: int = 40, height: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, format_name: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format=format_name, **options)
    return buffer.getvalue()


def write_parquet(path: Path, encoded: list[bytes], **columns) -> str:
    table = pa.table({"image": encoded, "label": list(range(len(encoded))), **columns})
    pq.write_table(table, path)
    return str(path)


def one_line_naming(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
