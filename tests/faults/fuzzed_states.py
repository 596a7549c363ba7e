"""Mutated states of a training whose checksums are right, as only a hostile or careless author writes them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_simprune.errors import InputError, TrainingError

from .mutations import mutated_text


_COUNTS: tuple[Any, ...] = (0, 1, 2, 5, 7, 28, 10**6, 2**61, -1, 1.0, True, None, "1")


def trainer_states(place: Path) -> tuple[Callable, Callable, tuple]:
    """A target of `fuzzing`: resumes from the state in the middle of a stream, and goes on to the end."""
    import datasets

    from hf_simprune.dino.checkpoint import STATE_FILE
    from hf_simprune.dino.manifest import write_manifest

    from ..data.stream_files import write_parquet_shards
    from .tiny_streams import SIZES, streamed

    # otherwise each epoch of several parquet shards ends with five seconds of sleep
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    files, total = write_parquet_shards(place / "set", SIZES), 5
    streamed(place / "run", files, total=total).train()
    checkpoint = place / "run" / "checkpoint-4"
    path = checkpoint / STATE_FILE
    # in most states these are empty
    rare = {"unwritten_metrics": ['{"step": 4, "knn_accuracy": 0.5}\n'], "bad_indices": ["3 of shard 1"]}
    sound = json.dumps(json.loads(path.read_text()) | rare)
    trainers = [streamed(place / "run", files, allowed=allowed, total=total) for allowed in (False, True)]

    def change(chance: random.Random) -> str:
        text, done = mutated_text(sound, chance)
        if chance.random() < 0.5:
            text, done = _other_number(sound, chance)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        write_manifest(checkpoint)
        trainers.reverse()
        return done

    def read() -> None:
        trainer = trainers[0]
        trainer.log = None
        trainer.resume(str(checkpoint))
        trainer.train()

    return change, read, (InputError, TrainingError)


def _other_number(sound: str, chance: random.Random) -> tuple[str, str]:
    """One of the numbers, wherever it stands, becomes another one, or something else."""
    tree = json.loads(sound)
    found: list[tuple[Any, Any, str]] = []

    def collect(node: Any, where: str) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            if isinstance(node[key], (dict, list)):
                collect(node[key], f"{where}/{key}")
            elif isinstance(node[key], (int, float)):
                found.append((node, key, f"{where}/{key}"))

    collect(tree, "")
    node, key, where = chance.choice(found)
    node[key] = chance.choice(_COUNTS)
    return json.dumps(tree), f"{where} = {node[key]!r}"
