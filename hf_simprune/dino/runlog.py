# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it runs: `metrics.jsonl`, trackers and a progress bar."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm


class RunLog:
    """Writes on the main process only.

    Args:
        path: `metrics.jsonl`, one JSON object a line.
        accelerator: its trackers receive the same numbers.
        start_step: lines of later steps, left by a run that went on after its last checkpoint, are removed.
        total_steps: length of the progress bar.
    """

    def __init__(
        self, path: Path, accelerator: Accelerator, start_step: int, total_steps: int, disable_tqdm: bool = False
    ) -> None:
        self.path = path
        self.accelerator = accelerator
        main = accelerator.is_main_process
        if main:
            _keep_until(path, start_step)
        self.bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=disable_tqdm or not main, dynamic_ncols=True
        )

    def write(self, record: dict[str, Any]) -> None:
        """Append one object, which has a `step`, and pass its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        self.accelerator.log(numbers, step=record["step"])

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def advance(self, **shown: Any) -> None:
        """Move the bar by one step."""
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All objects of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _keep_until(path: Path, step: int) -> None:
    kept = [r for r in read_metrics(path) if r["step"] <= step] if path.exists() and step > 0 else []
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
