# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune push`, `--push_to_hub` and `publish`: a folder with a model becomes a repository of the Hub."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError
from .hub_errors import Push, UploadError, WaitTooLong, explain, status_of
from .patience import persist
from .publish_files import Content, read_folder
from .publish_remote import MAIN, Remote, changes, check_existing, check_new, full_name, look


__all__ = ["Published", "UploadError", "create_repo_early", "publish", "repository_name", "upload_run"]

_NO_TOKEN = "no access token: run `hf auth login`, set HF_TOKEN, or pass --token"
# What the client raises, besides errors of this package.
_CLIENT_ERRORS = (HTTPError, OSError, RuntimeError, ValueError, WaitTooLong)


@dataclass(frozen=True)
class Published:
    """What a push did.

    Attributes:
        url: of the repository's page, at the revision.
        repo_id: `namespace/name`.
        commit: the newest commit; of a pull request, its commit.
        created: whether the repository was made by this push.
        unchanged: whether the repository held the same already; nothing was sent and no commit made.
        pr_url: of the pull request, if one was opened.
        left_out: names in the folder that were not published, such as checkpoints/ and training/student/.
        warnings: what the repository's page will lack, and files that name a home folder of this machine.
    """

    url: str
    repo_id: str
    commit: str
    created: bool
    unchanged: bool
    pr_url: str | None = None
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def publish(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> Published:
    """Upload the model in `folder`, with its card, pictures and record, in one commit.

    Published are weights (safetensors), configurations, processor, card, plots, `.eval_results`, the options of the
    run, and source files if the configuration needs them; checkpoints, logs, optimiser states and hidden files are
    not. Folders of this machine are named by their last part in the card's command and in the records. Files of the
    repository that belong to an earlier version of the model go. Large files that reached the Hub before an
    interruption are not sent again, and the same content is not committed twice.

    Args:
        folder: a run's or a compression's output, or any folder saved with `save_pretrained`. It is only read.
        repo_id: `namespace/name`, or `name` in the user's own namespace; by default the folder's name.
        private: make a new repository private.
        create_pr: open a pull request instead of writing to the branch.
        revision: a branch, or a pull request as `refs/pr/1`, to write to; it must exist.
        token: access token; without one, `HF_TOKEN` or the one saved by `hf auth login`.
        message: of the commit.

    Raises:
        InputError: nothing in the folder can be loaded, which is seen before anything is made on the Hub; or token,
            permission, name or revision do not allow it; or the repository holds another model.
        UploadError: the Hub is away, busy for more than five minutes, or failed. The message has the command that
            tries again.
    """
    folder = Path(folder)
    name = repository_name(repo_id, str(folder), "the repository")
    push = Push(folder, name, private, create_pr, revision, message)
    if create_pr and revision not in (None, MAIN):
        raise InputError(f"--create-pr and --revision {revision} exclude each other: give one")
    content = read_folder(folder)
    if token is None and get_token() is None:
        raise InputError(f"{push.repo_id}: {_NO_TOKEN}{push.again()}")
    upload = _Upload(HfApi(token=token), push, content, message or f"Upload {folder.resolve().name}")
    try:
        return persist(upload.trial, upload.may_repeat)
    except (InputError, UploadError):
        raise
    except _CLIENT_ERRORS as error:
        raise explain(error, push) from error


def repository_name(repo_id: str | None, folder: str, option: str = "--hub_model_id") -> str:
    """The repository to push to: `repo_id`, or the name of the folder, as `TrainingArguments` has it.

    Args:
        option: what `repo_id` was given by, for the message.

    Raises:
        InputError: the name cannot be a repository's.
    """
    name = repo_id or Path(folder).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError:
        where = option if repo_id else f"{option} takes the name of the folder:"
        raise InputError(
            f"{where} {name} cannot name a repository: use letters, digits, '-', '_' and '.', as in user/my-model"
        ) from None
    return name


def create_repo_early(hub_model_id: str, private: bool = False, token: str | None = None) -> str:
    """Make the model repository, or find it, and see that it can be written to: before a long run.

    Args:
        hub_model_id: `name` (in the user's namespace) or `namespace/name`.
        private: make a new repository private; one that exists must be.
        token: access token; without one, `HF_TOKEN` or the one saved by `hf auth login`.

    Returns:
        The full id, `namespace/name`.

    Raises:
        InputError: without a token, with a malformed id, if the Hub cannot be reached or refuses, or if the repository
            holds a model of another library.
    """
    push = Push(None, repository_name(hub_model_id, ""), private)
    if token is None and get_token() is None:
        raise InputError(f"--push_to_hub: {_NO_TOKEN}")
    api = HfApi(token=token)

    def prepare() -> str:
        repo_id = full_name(api, push.repo_id)
        remote = look(api, repo_id)
        if remote is None:
            return _make(api, push, repo_id).repo_id
        check_existing(api, push, remote)
        _check_write_access(api, remote.repo_id)
        return remote.repo_id

    try:
        return persist(prepare, may_repeat=lambda error: status_of(error) is not None)
    except (*_CLIENT_ERRORS, UploadError) as error:
        raise InputError(f"--push_to_hub: {explain(error, push)}") from error


def upload_run(folder: str | Path, repo_id: str, message: str, token: str | None = None) -> Published:
    """[`publish`] a run's output folder at its end, when whatever is wrong is no reason to lose the run.

    Args:
        folder: the output folder.
        repo_id: as returned by [`create_repo_early`].
        message: of the commit.

    Raises:
        UploadError: for whatever reason the folder was not published; it is as it was.
    """
    try:
        return publish(folder, repo_id, token=token, message=message)
    except InputError as error:
        command = Push(Path(folder), repo_id, message=message).command()
        hint = "" if command in str(error) else f"; the run is complete in {folder}, publish it with: {command}"
        raise UploadError(f"{error}{hint}") from error


class _Upload:
    """One push, which is tried until the Hub takes it; each trial looks first at what is there already."""

    def __init__(self, api: HfApi, push: Push, content: Content, message: str) -> None:
        self.api = api
        self.push = push
        self.content = content
        self.message = message
        self.reached = False
        self.created = False
        self.sent = False

    def trial(self) -> Published:
        """Bring the repository from what it holds to `content`.

        A commit whose answer was lost is found here by the next trial, which then has nothing left to do.
        """
        push, api = self.push, self.api
        repo_id = full_name(api, push.repo_id)
        remote = look(api, repo_id, push.revision)
        self.reached = True
        if remote is None:
            check_new(push)
            self.created = True
            remote = _make(api, push, repo_id)
        elif not self.created:
            check_existing(api, push, remote, self.content.model_type)
        operations = changes(remote, self.content)
        if not operations:
            return self._published(remote.repo_id, remote.head, unchanged=not self.sent)
        if not self.created and not push.create_pr:
            _check_write_access(api, remote.repo_id)
        added = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        try:
            api.preupload_lfs_files(
                remote.repo_id, added, revision=push.revision, create_pr=push.create_pr, free_memory=False
            )
        except _CLIENT_ERRORS as error:  # the client has been patient by itself
            raise explain(error, push) from error
        self.sent = True
        parent = None if push.create_pr else remote.head or None
        try:
            commit = api.create_commit(
                remote.repo_id,
                operations,
                commit_message=self.message,
                revision=push.revision,
                create_pr=push.create_pr,
                parent_commit=parent,
            )
        except HTTPError as error:
            if push.create_pr and (status_of(error) or 500) >= 500 and status_of(error) != 503:
                raise UploadError(
                    f"{remote.repo_id}: no answer says whether the pull request was opened: look at "
                    f"{api.endpoint}/{remote.repo_id}/discussions first{push.again()}"
                ) from error
            raise
        return self._published(remote.repo_id, commit.oid, pr_url=commit.pr_url)

    def may_repeat(self, error: BaseException) -> bool:
        """Not where the Hub was never reached."""
        return self.reached or status_of(error) is not None

    def _published(self, repo_id: str, commit: str, unchanged: bool = False, pr_url: str | None = None) -> Published:
        revision = self.push.revision or MAIN
        page = "" if revision == MAIN else f"/tree/{quote(revision, safe='')}"
        return Published(
            url=f"{self.api.endpoint}/{repo_id}{page}",
            repo_id=repo_id,
            commit=commit,
            created=self.created,
            unchanged=unchanged,
            pr_url=pr_url,
            left_out=self.content.left_out,
            warnings=self.content.warnings,
        )


def _make(api: HfApi, push: Push, repo_id: str) -> Remote:
    made = api.create_repo(repo_id, private=push.private or None, exist_ok=True).repo_id
    remote = look(api, made)
    if remote is None:
        raise UploadError(f"{made} was made, but the Hub does not show it yet{push.again()}")
    return remote


def _check_write_access(api: HfApi, repo_id: str) -> None:
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        # A server without this check answers 404; the repository itself exists, for it was found just now.
        if error.response.status_code != 404:
            raise
