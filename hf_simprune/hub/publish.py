# SPDX-License-Identifier: Apache-2.0
"""What `--push_to_hub` does: make the repository before training starts, upload the run's folder afterwards."""

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError


# Checkpoints hold optimiser states and are several times the size of the model; a leading dot marks unfinished files.
IGNORED = ("checkpoint-*", "abandoned-*", "training/initial/*", "training/teacher/*", ".*", "*/.*")


class UploadError(RuntimeError):
    """The upload failed. The message is one line that says what is kept and how to try again."""


def repository_name(hub_model_id: str | None, output_dir: str) -> str:
    """The repository to push to: `--hub_model_id`, or the name of the output folder, as `TrainingArguments` has it.

    Raises:
        InputError: the name cannot be a repository's.
    """
    name = hub_model_id or Path(output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError:
        option = "--hub_model_id" if hub_model_id else "--push_to_hub takes the name of --output_dir:"
        raise InputError(
            f"{option} {name} cannot name a repository: use letters, digits, '-', '_' and '.', as in user/my-model"
        ) from None
    return name


def create_repo_early(hub_model_id: str, private: bool = False, token: str | None = None) -> str:
    """Make the model repository, or find it, and see that it can be written to.

    Args:
        hub_model_id: `name` (in the user's namespace) or `namespace/name`.
        private: whether a new repository is private; an existing one keeps its visibility.
        token: access token; without one, `HF_TOKEN` or the one saved by `hf auth login`.

    Returns:
        The full id, `namespace/name`.

    Raises:
        InputError: without a token, with a malformed id, or if the Hub cannot be reached or refuses.
    """
    if token is None and get_token() is None:
        raise InputError("--push_to_hub: no access token; run `hf auth login`, set HF_TOKEN, or pass --token")
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(hub_model_id, private=private, exist_ok=True).repo_id
        _check_write_access(api, repo_id)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {hub_model_id!r}: {_one_line(error)}") from error
    except (HTTPError, OSError) as error:
        raise InputError(
            f"--hub_model_id {hub_model_id!r}: the Hub refused or is out of reach: {_one_line(error)}"
        ) from error
    return repo_id


def upload_run(
    folder: str | Path,
    repo_id: str,
    message: str,
    token: str | None = None,
) -> CommitInfo:
    """Upload a run's output folder without its checkpoints and its untrained network.

    Args:
        folder: the output folder.
        repo_id: as returned by [`create_repo_early`].
        message: of the commit.

    Raises:
        UploadError: if the upload fails; the folder is as it was.
    """
    try:
        return HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=list(IGNORED),
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UploadError(
            f"the upload to {repo_id} failed ({_one_line(error)}); the run is complete in {folder}, try again with: "
            f'hf upload {repo_id} {folder} . --exclude "checkpoint-*" ".*"'
        ) from error


def _check_write_access(api: HfApi, repo_id: str) -> None:
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        # A server without this check answers 404; the repository itself exists, for it was made or found just now.
        if error.response.status_code in (401, 403):
            raise InputError(f"--hub_model_id {repo_id!r}: the token may not write there; use one that may") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
