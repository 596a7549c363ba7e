"""Small sets of numbered pictures as the formats that are streamed."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int) -> bytes:
    """A PNG of 8 x 8 pixels that are unlike those of any other number."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_parquet_shards(folder: Path, sizes: Sequence[int], row_group_size: int | None = None) -> str:
    """Shards of these sizes, their rows numbered on from shard to shard in `label`."""
    folder.mkdir()
    for shard, (first, size) in enumerate(zip(np.cumsum([0, *sizes]).tolist(), sizes)):
        numbers = list(range(first, first + size))
        table = pa.table({"image": [{"bytes": picture(i), "path": None} for i in numbers], "label": numbers})
        pq.write_table(table, folder / f"train-{shard}.parquet", row_group_size=row_group_size)
    return str(folder)


def write_tar_shards(folder: Path, sizes: Sequence[int]) -> str:
    """The same as webdataset archives."""
    folder.mkdir()
    for shard, (first, size) in enumerate(zip(np.cumsum([0, *sizes]).tolist(), sizes)):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for number in range(first, first + size):
                for extension, content in (("png", picture(number)), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder)


def write_image_folder(folder: Path, sizes: Sequence[int]) -> str:
    """The same as a folder of images, one shard for `datasets`."""
    for number in range(sum(sizes)):
        path = folder / f"class{number % 2}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return str(folder)


FORMATS: dict[str, Callable[[Path, Sequence[int]], str]] = {
    "parquet": write_parquet_shards,
    "webdataset": write_tar_shards,
    "imagefolder": write_image_folder,
}
