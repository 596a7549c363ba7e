"""A process that publishes to the loopback Hub, for many pushes: starting one costs more than a push.

Run as a program it reads one JSON object a line, the arguments of `publish`, and answers with one each. It does not
sleep: what it was asked to wait is in the answer.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .loopback import TOKEN, LoopbackHub


ROOT = Path(__file__).parents[2]


class Client:
    """The process, as long as the `with` block; `push(…)` returns its answer.

    An answer has "published" or "error" and "message"; and "waits", in seconds.
    """

    def __init__(self, hub: LoopbackHub, home: Path, token: str | None = TOKEN, **environment: str) -> None:
        env = hub.environment(home, token) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home.parent / f"{home.name}-client.log").open("w"),
            env=env | environment,
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Call a function of `hf_simprune.hub.publish`."""
        self.process.stdin.write(json.dumps({"name": name, "arguments": arguments}, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def push(self, folder: Path, repo_id: str | None = None, **options: Any) -> dict[str, Any]:
        """What `publish` returns; fails where it raises."""
        answer = self.call("publish", folder=folder, repo_id=repo_id, **options)
        assert "published" in answer, answer
        return answer["published"] | {"waits": answer["waits"]}

    def refused(self, folder: Path, repo_id: str | None = None, **options: Any) -> tuple[str, str]:
        """The error's class and message where `publish` raises."""
        answer = self.call("publish", folder=folder, repo_id=repo_id, **options)
        assert "error" in answer, answer
        assert "\n" not in answer["message"]
        return answer["error"], answer["message"]


def _serve() -> None:
    from hf_simprune.hub import publish

    waits: list[float] = []
    time.sleep = waits.append
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        waits.clear()
        try:
            result = getattr(publish, asked["name"])(**asked["arguments"])
            answer = {"published": result if isinstance(result, str) else asdict(result)}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer | {"waits": waits, "torch": "torch" in sys.modules}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
