# SPDX-License-Identifier: Apache-2.0
"""What does it cost to go back into the middle of a streamed epoch?

Writes a set of random rows as parquet files and as webdataset archives, then measures for each, in CPU seconds of this
process and in rows read:

- how long it takes to read the epoch undecoded from its start up to a place (what resuming costs without a state), and
- how long it takes to be back at that place from its state: to open the shards that were open, pass over the rows read
  from them, and fill one block.

What is read again is bounded by one block and the rows of the open shards, however long the epoch is.

    python benchmarks/stream_resume.py
"""

import argparse
import io
import itertools
import tarfile
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _measure import emit, header, seconds

from hf_simprune.data.loading import load_split
from hf_simprune.data.streams import BLOCK_ROWS, OPEN_SHARDS, ShuffledStream


CPU = torch.device("cpu")
SHARES = (0.1, 0.5, 0.9)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--rows", type=int, default=300, help="of a shard")
    parser.add_argument("--row_bytes", type=int, default=4096)
    parser.add_argument("--row_group_size", type=int, default=100, help="of the parquet files")
    parser.add_argument("--block_rows", type=int, default=BLOCK_ROWS)
    parser.add_argument("--open_shards", type=int, default=OPEN_SHARDS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", help="where the set is written and removed again; by default the temporary one")
    parser.add_argument("--json", help="file to write all numbers to")
    return parser.parse_args()


def cells(args: argparse.Namespace, shard: int) -> list[bytes]:
    content = np.random.default_rng(shard).bytes(args.rows * args.row_bytes)
    return [content[row * args.row_bytes : (row + 1) * args.row_bytes] for row in range(args.rows)]


def write_parquet(args: argparse.Namespace, folder: Path, shard: int) -> None:
    images = [{"bytes": cell, "path": None} for cell in cells(args, shard)]
    path = folder / f"train-{shard:05d}.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=args.row_group_size)


def write_tar(args: argparse.Namespace, folder: Path, shard: int) -> None:
    with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as archive:
        for row, cell in enumerate(cells(args, shard)):
            member = tarfile.TarInfo(f"{shard:05d}-{row:05d}.jpg")
            member.size = len(cell)
            archive.addfile(member, io.BytesIO(cell))


FORMATS = {"parquet": (write_parquet, "image"), "webdataset": (write_tar, "jpg")}


def measure(args: argparse.Namespace, name: str, folder: Path) -> list[dict]:
    write, column = FORMATS[name]
    folder.mkdir()
    for shard in range(args.shards):
        write(args, folder, shard)
    rows = load_split(str(folder), "train", streaming=True)
    stream = ShuffledStream(rows, [column], seed=0, block_rows=args.block_rows, open_shards=args.open_shards)
    total = args.shards * args.rows
    measured = []
    for share in SHARES:
        taken = int(share * total)

        def from_the_start(taken: int = taken):
            return next(itertools.islice(stream.epoch_rows(0), taken, None))

        wanted = from_the_start()
        place = next(itertools.islice(stream.epoch_rows(0), taken - 1, None)).place

        def from_the_state(place: dict = place):
            return next(stream.rows(0, place))

        found = from_the_state()
        if (found.shard, found.number) != (wanted.shard, wanted.number):
            raise SystemExit("error: resuming gave another row than reading from the start")
        passed = sum(row for _, row in place["open"])
        start, state = (
            min(seconds(work, CPU) for _ in range(args.rounds)) for work in (from_the_start, from_the_state)
        )
        again = passed + min(args.block_rows, total - place["block"] * args.block_rows)
        measured.append(
            {
                "format": name, "share": share, "rows_from_start": taken, "seconds_from_start": start,
                "rows_from_state": again, "passed_over": passed, "seconds_from_state": state, "ratio": state / start,
            }
        )  # fmt: skip
        print(
            f"{name:<11} {share:>5.0%}   {taken:>9,} rows {start:>8.3f} s   {again:>7,} rows {state:>7.3f} s   "
            f"{state / start:>6.3f}"
        )
    return measured


def main() -> None:
    args = parse()
    datasets.disable_progress_bars()
    bound = args.block_rows + args.open_shards * args.rows
    print(
        f"{args.shards} shards of {args.rows:,} rows of {args.row_bytes:,} bytes, blocks of {args.block_rows:,} rows, "
        f"{args.open_shards} open shards; a resumption reads at most {bound:,} rows again"
    )
    print("format      place   read from the epoch's start   back from the state    ratio")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = [entry for name in FORMATS for entry in measure(args, name, Path(folder) / name)]
    worst = max(entry["rows_from_state"] for entry in results)
    print(f"read again at most: {worst:,} of {args.shards * args.rows:,} rows")
    emit({**header(CPU, 0), "options": vars(args), "bound": bound, "results": results}, args.json)


if __name__ == "__main__":
    main()
