"""A model hub on this machine that speaks the Hub's HTTP protocol with the real `huggingface_hub` client.

    with LoopbackHub() as hub:
        hub.add("facebook/deit-tiny-patch16-224", "path/to/a/saved/model")  # somebody's, to load from
        subprocess.run([...], env=hub.environment(home))                    # pushes and loads as `tester`
        hub.repos["tester/my-model"]["config.json"]                         # what arrived, as bytes
        hub.url                                                             # the endpoint

Clients run in processes of their own, because huggingface_hub reads its endpoint and token when it is imported.
`environment(home)` is this process's environment with the endpoint, the token of the user `tester` and an empty cache
in `home`, without proxies and without any other credentials.

It creates repositories of models and data sets, takes commits with small and large files on branches and pull
requests, checks tokens and rights, and answers with the Hub's own codes. `hub.fail(…)` makes it misbehave.
"""

import os
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path

from .loopback_faults import Fault
from .loopback_repository import Repository
from .loopback_server import Handler


TOKEN, READ_TOKEN = "hf_test", "hf_read_only"
USER = "tester"


class LoopbackHub:
    """Start with `with LoopbackHub() as hub:`.

    Attributes:
        url: the endpoint.
        repositories: all of them, by `namespace/name`, data sets by `datasets/namespace/name`.
        stored: what large-file storage has, by SHA-256; the client may commit what is in `verified`.
        requests: "METHOD /path" of everything that was asked for.
        read_only: repositories that the token may not write to, beside all of other namespaces.
        tokens: the users' names by access token; `READ_TOKEN` may not write.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.requests: list[str] = []
        self.read_only: set[str] = set()
        self.tokens = {TOKEN: USER, READ_TOKEN: USER}
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a client process, with an empty cache and no other credentials."""
        dropped = ("HF_", "HUGGING_FACE")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped) and "proxy" not in k.lower()}
        mine = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return kept | mine | ({"HF_TOKEN": token} if token else {})

    def add(self, repo_id: str, content: str | Path | Mapping[str, bytes], private: bool = False) -> Repository:
        """A repository with the files of a folder, there from the start; a data set as `datasets/user/name`."""
        if not isinstance(content, Mapping):
            paths = [path for path in Path(content).rglob("*") if path.is_file()]
            content = {path.relative_to(content).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories[repo_id] = Repository(repo_id, private)
        repository.commit("main", "first version", dict(content))
        return repository

    def fail(self, pattern: str, times: int = 1, **how: object) -> Fault:
        """Misbehave at the next `times` requests whose "METHOD /path" has `pattern` in it; see [`Fault`]."""
        fault = Fault(pattern, times, **how)
        self.faults.append(fault)
        return fault

    @property
    def repos(self) -> dict[str, dict[str, bytes]]:
        """Files on the main branch of each repository."""
        return {name: found.files("main") for name, found in self.repositories.items()}

    @property
    def commits(self) -> dict[str, list[str]]:
        """Commits of each repository's main branch, the newest last; the first one made it."""
        return {name: list(found.branches["main"]) for name, found in self.repositories.items()}

    @property
    def private(self) -> set[str]:
        """Repositories that nobody sees without the token."""
        return {name for name, found in self.repositories.items() if found.private}

    def asked(self, pattern: str) -> list[str]:
        """Requests with `pattern` in them, in order."""
        return [request for request in self.requests if pattern in request]
