"""A process that imports everything once and starts every run in a fork: what costs seconds is then paid once.

Forking is sound because nothing here has started a thread, which `ready` tells the other side. Commands and answers
are JSON, one a line. A run has a session of its own, so that signals to its group reach nothing else.
"""

import gc
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

from ..elsewhere import wait_for
from ..tiny_run import RECIPE
from . import injected
from .fuzzing import fuzz


def main() -> None:
    recipe = load_recipe()
    warm_up()
    print(json.dumps({"ready": len(os.listdir("/proc/self/task"))}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if not command:  # the end of its input would come late: other processes may have inherited the other side
            break
        if "wait" in command:
            print(json.dumps(wait_for(command["wait"], command["seconds"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0 and "target" in command:
            os.setsid()
            sys.exit(fuzz(**command))
        if pid == 0:
            sys.exit(run(recipe, **command))  # as a program ends, with all that it does at its end
        print(json.dumps(pid), flush=True)


def load_recipe():
    spec = importlib.util.spec_from_file_location("train_dino", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def warm_up() -> None:
    """Import what a run needs."""
    import hf_simprune.dino.argument_parsing
    import hf_simprune.dino.run  # noqa: F401

    gc.collect()
    gc.freeze()  # forks need not look through all of it again


def run(recipe, words: list[str], output: str, environment: dict[str, str], faults: dict) -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(output, "ab", buffering=0) as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = [str(RECIPE), *words]
    injected.arm(Path(words[words.index("--output_dir") + 1]), **faults)
    return recipe.main(words)


if __name__ == "__main__":
    main()
