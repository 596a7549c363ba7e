# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe in this very process and notes what it took: `python _train.py USAGE.jsonl RECIPE.py --option …`.

A line is added for every start, so that a run which was interrupted has several.
"""

import json
import runpy
import sys
import time


def main() -> None:
    usage, recipe, *options = sys.argv[1:]
    sys.argv = [recipe, *options]
    started, status = time.time(), 1
    try:
        runpy.run_path(recipe, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
        raise
    finally:
        import torch
        from _measure import peak_bytes

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        used = {"status": status, "device": device.type, "peak_bytes": peak_bytes(device)}
        used |= {"cpu_seconds": time.process_time(), "wall_seconds": time.time() - started}
        with open(usage, "a") as file:
            file.write(json.dumps(used) + "\n")


if __name__ == "__main__":
    main()
