"""A repository of the loopback Hub: commits, branches and pull requests, all in memory."""

import hashlib
import json
from dataclasses import dataclass


# Like the real Hub's default .gitattributes: these go to large-file storage.
LARGE = (".safetensors", ".bin", ".png", ".parquet", ".gguf")


@dataclass(frozen=True)
class Commit:
    """`files` are all of them at that commit, by path."""

    sha: str
    message: str
    files: dict[str, bytes]


class Repository:
    """Starts with the commit that makes `.gitattributes`.

    Attributes:
        repo_id: as in the Hub's dictionary.
        gated: whether files may be read by nobody yet.
        branches: commits by branch, the newest last; pull requests as refs/pr/1.
        history: all commits by their hash.
    """

    def __init__(self, repo_id: str, private: bool = False) -> None:
        self.repo_id = repo_id
        self.private = private
        self.gated = False
        self.branches: dict[str, list[str]] = {"main": []}
        self.history: dict[str, Commit] = {}
        self.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def resolve(self, revision: str) -> Commit | None:
        """The commit of a branch, a pull request or a hash."""
        sha = self.branches[revision][-1] if revision in self.branches else revision
        return self.history.get(sha)

    def files(self, revision: str) -> dict[str, bytes]:
        return dict(self.resolve(revision).files)

    def commit(self, branch: str, message: str, changes: dict[str, bytes | None]) -> str:
        """Write files, or remove those that are None; returns the hash."""
        line = self.branches[branch]
        files = {**(self.history[line[-1]].files if line else {}), **changes}
        files = {path: data for path, data in files.items() if data is not None}
        listing = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        sha = hashlib.sha1(json.dumps([self.repo_id, branch, line, message, listing]).encode()).hexdigest()
        self.history[sha] = Commit(sha, message, files)
        line.append(sha)
        return sha

    def branch(self, name: str, start: str = "main") -> None:
        self.branches[name] = [self.resolve(start).sha]

    def open_pull_request(self) -> str:
        """The name of a new reference, at the head of main."""
        number = sum(name.startswith("refs/pr/") for name in self.branches) + 1
        self.branch(f"refs/pr/{number}")
        return f"refs/pr/{number}"


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def pointer(data: bytes) -> bytes:
    """What git holds of a large file."""
    digest = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()


def blob_id(data: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def describe(path: str, data: bytes) -> dict[str, object]:
    """Size, git's name and, of a large file, its SHA-256."""
    if not is_large(path):
        return {"size": len(data), "oid": blob_id(data)}
    held = pointer(data)
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(held)}
    return {"size": len(data), "oid": blob_id(held), "lfs": lfs}
