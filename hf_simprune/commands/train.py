# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune train`, on one process; `accelerate launch recipes/train_dino.py` takes the same options on several."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..dino.argument_parsing import TRAINING_OPTIONS
from ..dino.arguments import DinoArguments


OPTIONS = TRAINING_OPTIONS


def run(args: DinoArguments) -> dict[str, Any]:
    """Train; returns the options, the last metrics and every k-NN evaluation."""
    from ..dino.run import run_training

    run_training(args)
    options = {name: value for name, value in asdict(args).items() if name != "token"}
    return {"output_dir": args.output_dir, **metrics(Path(args.output_dir)), "options": options}


def metrics(folder: Path) -> dict[str, Any]:
    """`last`: the last step logged in `metrics.jsonl`; `knn`: its evaluations; None and empty where there are none."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "loss" in record]
    return {
        "last": steps[-1] if steps else None,
        "knn": [record for record in records if "knn_accuracy" in record],
    }
