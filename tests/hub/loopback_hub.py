# SPDX-License-Identifier: Apache-2.0
"""A model hub on this machine, in a thread: enough of the HTTP protocol to push a folder and load it back.

Repositories, commits and large files live in memory. Clients run in processes of their own with
`LoopbackHub.environment()`, because huggingface_hub reads its endpoint when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_test"
USER = "tester"
# Like the real Hub's default .gitattributes: these go to large-file storage.
LARGE = (".safetensors", ".bin", ".png")


class LoopbackHub:
    """Start with `with LoopbackHub() as hub:`.

    Attributes:
        repos: files of each repository's head, by repository and path.
        private: repositories that were created private.
        requests: "METHOD /path" of everything that was asked for.
        read_only: repositories the token may not write to.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.private: set[str] = set()
        self.read_only: set[str] = set()
        self.requests: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.verified: set[str] = set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a client process, with an empty cache and no other credentials."""
        dropped = ("HF_", "HUGGING_FACE")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped) and "proxy" not in k.lower()}
        mine = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return kept | mine | ({"HF_TOKEN": token} if token else {})

    def commit(self, repo: str, message: str, changes: dict[str, bytes]) -> str:
        self.repos[repo] |= changes
        listing = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.repos[repo].items())
        sha = hashlib.sha1(json.dumps([message, len(self.commits[repo]), listing]).encode()).hexdigest()
        self.commits[repo].append(sha)
        return sha


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.requests.append(f"{method} {path}")
        self.body = self._read_body()
        self.query = parse_qs(address.query)
        writes = method == "POST" and not path.startswith("/api/validate-yaml")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Invalid credentials")
        for verb, pattern, answer in _ROUTES:
            if verb == ("GET" if method == "HEAD" else method) and (match := re.fullmatch(pattern, path)):
                return answer(self, *match.groups())
        self._error(404, "unknown endpoint", "EntryNotFound")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, answer: object, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), "application/json", **headers)

    # Pushing

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        if not repo.startswith(f"{USER}/"):
            return self._error(403, f"You don't have the rights to create a model under the namespace {repo}")
        url = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.repos:
            return self._json(url | {"error": "You already created this model repo"}, 409)
        self.hub.repos[repo], self.hub.commits[repo] = {}, []
        self.hub.commit(repo, "initial commit", {".gitattributes": b""})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self._json(url)

    def check_write(self, repo: str) -> None:
        if repo in self.hub.read_only:
            return self._error(403, "Forbidden")
        self._json({})

    def validate_yaml(self) -> None:
        self._json({"warnings": [], "errors": []})

    def preupload(self, repo: str, _revision: str) -> None:
        if repo not in self.hub.repos:
            return self._error(404, "Repository not found", "RepoNotFound")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, _repo: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/storage/{asked['oid']}"},
                "verify": {"href": f"{self.hub.url}/verify"},
            }
            known = {"oid": asked["oid"], "size": asked["size"]}
            objects.append(known if asked["oid"] in self.hub.verified else known | {"actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the content does not match its sha256")
        self.hub.stored[oid] = self.body
        self._json({})

    def verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.hub.stored.get(asked["oid"], b"")) != asked["size"]:
            return self._error(404, "not stored")
        self.hub.verified.add(asked["oid"])
        self._json({})

    def commit(self, repo: str, _revision: str) -> None:
        if repo in self.hub.read_only:
            return self._error(403, "Forbidden")
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.verified:
                    return self._error(400, f"{value['path']} was not uploaded")
                changes[value["path"]] = self.hub.stored[value["oid"]]
        sha = self.hub.commit(repo, lines[0]["value"]["summary"], changes)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    # Loading

    def info(self, repo: str, _revision: str | None = None) -> None:
        if not self._readable(repo):
            return self._error(404, "Repository not found", "RepoNotFound")
        siblings = [{"rfilename": path} for path in sorted(self.hub.repos[repo])]
        self._json({"id": repo, "modelId": repo, "sha": self.hub.commits[repo][-1], "siblings": siblings, "tags": []})

    def tree(self, repo: str, _revision: str) -> None:
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in sorted(self.hub.repos[repo].items())
            ]
        )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not self._readable(repo):
            return self._error(404, "Repository not found", "RepoNotFound")
        if path not in self.hub.repos[repo]:
            return self._error(404, "Entry not found", "EntryNotFound")
        data = self.hub.repos[repo][path]
        sha = self.hub.commits[repo][-1] if revision == "main" else revision
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"X_Repo_Commit": sha, "ETag": etag, "X_Linked_Etag": etag, "X_Linked_Size": str(len(data))}
        self._send(200, data, "application/octet-stream", **headers)

    def _readable(self, repo: str) -> bool:
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return repo in self.hub.repos and (authorised or repo not in self.hub.private)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", rf"/api/models/{_REPO}/auth-check/write", _Handler.check_write),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/([0-9a-f]{64})", _Handler.store),
    ("POST", r"/verify", _Handler.verify),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
