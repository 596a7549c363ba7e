"""Run on every rank: analyses shared by processes, saved by each of them."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_simprune.rba.analysis import analyze
from hf_simprune.rba.planner import Budget
from hf_simprune.rba.search import choose
from tests.rba.conftest import make_model
from tests.rba.image_sets import calibration, quiet_model, summary


def main(folder: Path, cases: dict[str, int]) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rank = accelerator.process_index
    options = {"cost_images": 5, "chunk_size": 4, "max_span": 3, "progress": False, "accelerator": accelerator}
    for kind, fit in cases.items():
        found = analyze(quiet_model(make_model(kind)), calibration(fit, 7), **options)
        torch.save(summary(found), folder / f"{kind}{rank}.pt")
        choose(found, Budget("blocks", 2), refine=False).plan.save(folder / f"{kind}{rank}.json")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
