"""The HTTP side of the loopback Hub: one method an endpoint."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .loopback_repository import Repository, describe, is_large


if TYPE_CHECKING:
    from .loopback import LoopbackHub


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: "LoopbackHub"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.query = parse_qs(address.query)
        self.hub.requests.append(f"{method} {path}")
        with self.hub.lock:
            request = f"{method} {unquote(self.path)}"
            fault = next((fault for fault in self.hub.faults if fault.meets(request)), None)
        if fault is not None and fault.first is not None:
            fault.first()
            fault = None
        if fault is not None and not fault.done:
            return fault.happen(self)
        self.body = self._read_body()
        self.mute = fault is not None  # carried out, and nobody hears of it
        try:
            with self.hub.lock:
                self._route("GET" if method == "HEAD" else method, path)
        except _Refusal as refusal:
            headers = {"X_Error_Message": str(refusal)} | ({"X_Error_Code": refusal.code} if refusal.code else {})
            self._json({"error": str(refusal)}, refusal.status, **headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, method: str, path: str) -> None:
        for verb, pattern, answer in _ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                return answer(self, **match.groupdict())
        raise _Refusal(404, f"unknown endpoint {method} {path}", "EntryNotFound")

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
        if self.mute:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, answer: object, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(answer).encode(), "application/json", **headers)

    # Who asks for what

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _user(self) -> str:
        if self._token() not in self.hub.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[self._token()]

    def _readable(self, kind: str | None, repo: str) -> Repository:
        """Private repositories are not there for those who may not see them."""
        name = repo if kind in (None, "models") else f"{kind}/{repo}"
        found = self.hub.repositories.get(name)
        if self._token() is not None:
            self._user()
        elif found is None or found.private:
            raise _Refusal(401, "Invalid username or password.", "RepoNotFound")
        owner = repo.split("/")[0]
        if found is None or (found.private and self.hub.tokens.get(self._token()) != owner):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def _writable(self, kind: str | None, repo: str) -> Repository:
        found, user = self._readable(kind, repo), self._user()
        if self._may_not_write(found, user):
            raise _Refusal(403, f"You don't have the rights to write to {repo}")
        return found

    def _may_not_write(self, repository: Repository, user: str) -> bool:
        own = repository.repo_id.split("/")[-2] == user
        return not own or repository.repo_id in self.hub.read_only or "read" in (self._token() or "")

    def whoami(self) -> None:
        role = "read" if "read" in (self._token() or "") else "write"
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self._json({"type": "user", "name": self._user(), "fullname": self._user(), "orgs": [], "auth": token})

    # Pushing

    def create(self) -> None:
        asked, user = json.loads(self.body), self._user()
        repo = f"{asked.get('organization') or user}/{asked['name']}"
        if not repo.startswith(f"{user}/") or "read" in self._token():
            raise _Refusal(
                403, f"You don't have the rights to create a model under the namespace {repo.split('/')[0]}"
            )
        name = repo if asked.get("type", "model") == "model" else f"{asked['type']}s/{repo}"
        url = {"url": f"{self.hub.url}/{name}", "name": repo}
        if name in self.hub.repositories:
            return self._json(url | {"error": "You already created this model repo"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(name, private)
        self._json(url)

    def check(self, kind: str, repo: str) -> None:
        self._readable(kind, repo)
        self._json({})

    def check_write(self, kind: str, repo: str) -> None:
        self._writable(kind, repo)
        self._json({})

    def validate_yaml(self) -> None:
        found = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(found[1] if found else "")
        except yaml.YAMLError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        empty = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": [], "warnings": empty})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        repository = self._target(kind, repo)
        held = self._at(repository, revision).files
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            known = describe(path, held[path]) if path in held else {}
            oid = known.get("lfs", known).get("oid")
            mode = "lfs" if is_large(path) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def batch(self, kind: str | None, repo: str) -> None:
        self._readable((kind or "").rstrip("/") or None, repo)
        self._user()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known = {"oid": asked["oid"], "size": asked["size"]}
            actions = {
                "upload": {"href": f"{self.hub.url}/storage/{asked['oid']}"},
                "verify": {"href": f"{self.hub.url}/verify"},
            }
            objects.append(known if asked["oid"] in self.hub.verified else known | {"actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "the content does not match its sha256")
        self.hub.stored[oid] = self.body
        self._json({})

    def verify(self) -> None:
        self._user()
        asked = json.loads(self.body)
        if len(self.hub.stored.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404, "not stored")
        self.hub.verified.add(asked["oid"])
        self._json({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        repository = self._target(kind, repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        head = self._at(repository, revision)
        if parent is not None and parent != head.sha:
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, bytes | None] = {}
        for line in lines[1:]:
            self._change(changes, line["key"], line["value"], head.files)
        opened = "create_pr" in self.query
        branch = repository.open_pull_request() if opened else revision
        sha = repository.commit(branch, header["summary"], changes)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True}
        if opened:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{branch.split('/')[-1]}"
        self._json(answer)

    def _change(self, changes: dict[str, bytes | None], key: str, value: dict, held: dict[str, bytes]) -> None:
        path = value["path"]
        if key == "file":
            changes[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.verified:
                raise _Refusal(400, f"{path} was not uploaded")
            changes[path] = self.hub.stored[value["oid"]]
        elif key == "deletedFile":
            if path not in held:
                raise _Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            changes[path] = None
        elif key == "deletedFolder":
            changes |= {name: None for name in held if name.startswith(path)}
        else:
            raise _Refusal(400, f"unknown operation {key}")

    def _target(self, kind: str, repo: str) -> Repository:
        """Anybody with a token may open a pull request on what they see; the rest needs the right to write."""
        if "create_pr" not in self.query:
            return self._writable(kind, repo)
        found, _ = self._readable(kind, repo), self._user()
        if found.gated and self._may_not_write(found, self._user()):
            raise _Refusal(403, f"Access to model {repo} is restricted", "GatedRepo")
        return found

    def make_branch(self, kind: str, repo: str, name: str) -> None:
        repository = self._writable(kind, repo)
        if name in repository.branches:
            raise _Refusal(409, f"Reference already exists: {name}")
        repository.branch(name, (json.loads(self.body or b"{}")).get("startingPoint", "main"))
        self._json({})

    # Loading

    def _at(self, repository: Repository, revision: str):
        found = repository.resolve(revision)
        if found is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        repository = self._readable(kind, repo)
        commit = self._at(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for each in siblings:
                about = describe(each["rfilename"], commit.files[each["rfilename"]])
                each |= {"size": about["size"], "blobId": about["oid"]}
                if "lfs" in about:
                    lfs = about["lfs"]
                    each["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        about = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.sha, "siblings": siblings}
        gated = "manual" if repository.gated else False
        self._json(about | {"private": repository.private, "gated": gated, "disabled": False, "tags": []})

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> None:
        files = self._at(self._readable(kind, repo), revision).files
        prefix = f"{path}/" if path else ""
        inside = sorted(name for name in files if name.startswith(prefix))
        if prefix and not inside:
            raise _Refusal(404, f"{path} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, object]] = {}
        for name in inside:
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
                if not recursive:
                    break
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "path": name, **describe(name, files[name])}
        self._json(list(entries.values()))

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        files = self._at(self._readable(kind, repo), revision).files
        asked = parse_qs(self.body.decode()) if self.body[:1] != b"{" else json.loads(self.body)
        found = [
            {"type": "file", "path": path, **describe(path, files[path])}
            for path in asked.get("paths", [])
            if path in files
        ]
        self._json(found)

    def refs(self, kind: str, repo: str) -> None:
        repository = self._readable(kind, repo)
        named = [(name, line[-1]) for name, line in repository.branches.items()]
        listed = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in named if "refs/" not in n]
        pulls = [{"name": n, "ref": n, "targetCommit": s} for n, s in named if "refs/pr" in n]
        self._json({"branches": listed, "converts": [], "tags": [], "pullRequests": pulls})

    def resolve(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        repository = self._readable((kind or "").rstrip("/") or None, repo)
        commit = self._at(repository, revision)
        if repository.gated and self._may_not_write(repository, self.hub.tokens.get(self._token() or "", "")):
            raise _Refusal(403, f"Access to model {repo} is restricted", "GatedRepo")
        if path not in commit.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        about = describe(path, data)
        etag = f'"{about.get("lfs", about)["oid"]}"'
        headers = {"X_Repo_Commit": commit.sha, "ETag": etag, "Accept_Ranges": "bytes"}
        if "lfs" in about:
            headers |= {"X_Linked_Etag": etag, "X_Linked_Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self._send(200, data, "application/octet-stream", **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], "application/octet-stream", **headers)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_ANY = rf"/(?P<kind>datasets/)?{_REPO}"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"{_API}/auth-check", Handler.check),
    ("GET", rf"{_API}/auth-check/write", Handler.check_write),
    ("POST", rf"{_API}/preupload/{_REVISION}", Handler.preupload),
    ("POST", rf"{_ANY}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", Handler.store),
    ("POST", "/verify", Handler.verify),
    ("POST", rf"{_API}/commit/{_REVISION}", Handler.commit),
    ("POST", rf"{_API}/branch/(?P<name>.+)", Handler.make_branch),
    ("GET", _API, Handler.info),
    ("GET", rf"{_API}/revision/{_REVISION}", Handler.info),
    ("GET", rf"{_API}/refs", Handler.refs),
    ("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", Handler.tree),
    ("POST", rf"{_API}/paths-info/{_REVISION}", Handler.paths_info),
    ("GET", rf"{_ANY}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]
