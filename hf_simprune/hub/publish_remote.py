# SPDX-License-Identifier: Apache-2.0
"""What a repository of the Hub holds now, and what has to change there."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling

from ..errors import InputError
from .hub_errors import Push, missing_revision
from .publish_files import CONFIG, Content, stale
from .shared_files import shared_form


MAIN = "main"
# Files that say a repository without config.json holds a model of another library.
_OTHER_MODELS = (
    ".bin",
    ".safetensors",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".gguf",
    ".h5",
    ".msgpack",
    ".pkl",
    ".joblib",
)
_OTHER_CONFIGS = ("adapter_config.json", "model_index.json")
_CHUNK = 2**20


@dataclass(frozen=True)
class Remote:
    """A revision of a model repository.

    Attributes:
        repo_id: `namespace/name` as the Hub has it, which may have renamed it.
        head: the commit.
        files: by path.
    """

    repo_id: str
    head: str
    private: bool
    files: dict[str, RepoSibling]


def full_name(api: HfApi, repo_id: str) -> str:
    """`namespace/name`; a bare name is one in the namespace of the token's user."""
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def look(api: HfApi, repo_id: str, revision: str | None = None) -> Remote | None:
    """The repository as it is, or None where there is none that the token may see."""
    try:
        info = api.model_info(repo_id, revision=revision or MAIN, files_metadata=True)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError) or error.response.status_code != 404:
            raise
        return None
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    return Remote(info.id, info.sha or "", bool(info.private), files)


def check_new(push: Push) -> None:
    """A repository that is not there yet has neither branches nor anybody to ask for a merge.

    Raises:
        InputError: `push` names a revision or wants a pull request.
    """
    if push.create_pr:
        raise InputError(
            f"--create-pr: {push.repo_id} does not exist, or the token may not see it: push without --create-pr"
        )
    if push.revision not in (None, MAIN):
        raise missing_revision(push)


def check_existing(api: HfApi, push: Push, remote: Remote, model_type: str | None = None) -> None:
    """See that a repository that is there may be written to by this push.

    Args:
        model_type: of the model that will be pushed, where it is known.

    Raises:
        InputError: it is public although a private one is asked for; it holds another model, unless a branch or a pull
            request is asked for, where nothing is lost.
    """
    if push.private and not remote.private:
        raise InputError(
            f"--private: {remote.repo_id} exists and is public: make it private with `hf repos settings "
            f"{remote.repo_id} --private`, or choose another name{push.again()}"
        )
    if push.create_pr or push.revision not in (None, MAIN):
        return
    held = _held(api, remote, model_type)
    if held is not None:
        raise InputError(
            f"{remote.repo_id} already holds another model ({held}): choose another name, or ask for a merge with "
            "--create-pr"
        )


def _held(api: HfApi, remote: Remote, model_type: str | None) -> str | None:
    """What a repository holds that is not the same kind of model, None where it holds that kind or none."""
    if CONFIG in remote.files:
        if model_type is None:
            return None
        path = api.hf_hub_download(remote.repo_id, CONFIG, revision=remote.head)
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            return "its config.json is none of transformers"
        same = isinstance(found, str) and _family(found) == _family(model_type)
        return None if same else f"model_type {found}, not {model_type}"
    for name in sorted(remote.files):
        if name in _OTHER_CONFIGS or PurePosixPath(name).suffix in _OTHER_MODELS:
            return name
    return None


def _family(model_type: str) -> str:
    """A compressed network may take the place of the stock one that it was, and the other way round."""
    return model_type.removeprefix("simprune_")


def changes(remote: Remote, content: Content) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes the repository hold `content`: nothing where it does already."""
    removed = [CommitOperationDelete(name) for name in stale(remote.files, content)]
    sources = {name: shared_form(name, path, remote.repo_id) for name, path in content.files.items()}
    added = [
        CommitOperationAdd(name, source)
        for name, source in sources.items()
        if not _same(remote.files.get(name), source)
    ]
    return [*removed, *added]


def _same(sibling: RepoSibling | None, source: Path | bytes) -> bool:
    """Whether the Hub has these very bytes under this name: it knows large files by SHA-256, others as git does."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if sibling is None:
        return False
    if sibling.lfs is not None:
        return sibling.lfs.size == size and sibling.lfs.sha256 == _digest(source, hashlib.sha256())
    return sibling.size == size and sibling.blob_id == _digest(source, hashlib.sha1(b"blob %d\0" % size))


def _digest(source: Path | bytes, digest: "hashlib._Hash") -> str:
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
