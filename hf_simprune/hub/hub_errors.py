# SPDX-License-Identifier: Apache-2.0
"""What went wrong between this machine and the Hub, each in one line that says what to do about it."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import InputError, TrainingError
from .privacy import masked


class UploadError(TrainingError):
    """The upload failed. The message is one line that says what is kept and how to try again."""


class WaitTooLong(Exception):
    """The Hub asks to wait longer than is waited here."""


@dataclass(frozen=True)
class Push:
    """What is to go where.

    Attributes:
        folder: with the model; None for a repository that is made before there is one.
        repo_id: `namespace/name`, or `name` in the user's own namespace.
        private, create_pr, revision, message: as of [`publish`].
    """

    folder: Path | None
    repo_id: str
    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    message: str | None = None

    def command(self) -> str:
        """What pushes the same again, for a shell. It never holds an access token."""
        words = ["hf-simprune", "push", str(self.folder), self.repo_id]
        words += ["--private"] if self.private else []
        words += ["--create-pr"] if self.create_pr else []
        words += ["--revision", self.revision] if self.revision is not None else []
        words += ["--message", self.message] if self.message is not None else []
        return masked(" ".join(map(shlex.quote, words)))

    def again(self) -> str:
        """The end of a message: what is kept, and how to try again."""
        return "" if self.folder is None else f"; {self.folder} is as it was, try again with: {self.command()}"


def explain(error: BaseException, push: Push) -> InputError | UploadError:
    """One line for whatever the Hub's client raised.

    Returns:
        An `InputError` for what the user has to change: token, permission, revision, repository. An `UploadError` for
        what may be gone in a minute. Those of this package are returned as they are.
    """
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, (InputError, UploadError)):
            return each
    for each in chain:
        if isinstance(each, WaitTooLong):
            return UploadError(f"{push.repo_id}: the Hub asks to wait ({each}){push.again()}")
        if isinstance(each, OfflineModeIsEnabled):
            return InputError(f"{push.repo_id}: HF_HUB_OFFLINE is set: unset it{push.again()}")
        if isinstance(each, HfHubHTTPError):
            return _refused(each, push)
    for each in chain:
        if isinstance(each, HTTPError):  # no answer at all
            return UploadError(f"{push.repo_id}: the Hub is out of reach ({one_line(each)}){push.again()}")
    return UploadError(f"the upload to {push.repo_id} failed ({one_line(chain[-1])}){push.again()}")


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with, None where it did not answer."""
    found = next((each for each in _chain(error) if isinstance(each, HfHubHTTPError)), None)
    return None if found is None else found.response.status_code


def one_line(error: BaseException) -> str:
    """The message without line breaks, or the name of the error."""
    return " ".join(str(error).split()) or type(error).__name__


def _refused(error: HfHubHTTPError, push: Push) -> InputError | UploadError:
    status, name = error.response.status_code, push.repo_id
    # not the client's own text: it may hold the signed address of a storage
    said = " ".join((error.server_message or "").split())
    words = f"{status}: {said}" if said else str(status)
    if isinstance(error, GatedRepoError):
        return InputError(f"{name} is gated ({words}): ask for access on its page{push.again()}")
    if isinstance(error, RevisionNotFoundError):
        return missing_revision(push)
    if status == 401:
        return InputError(
            f"{name}: the Hub does not accept the access token ({words}): run `hf auth login`, or give a valid one by "
            f"HF_TOKEN or --token{push.again()}"
        )
    if status == 403:
        return InputError(
            f"{name}: the token may not write there ({words}): use one that may, or a repository of your own"
            f"{push.again()}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"{name} does not exist, or the token may not see it ({words}){push.again()}")
    if status in (409, 412):
        return UploadError(f"{name} is being changed by somebody else ({words}){push.again()}")
    if status == 429:
        return UploadError(f"{name}: the Hub gets too many requests of this token ({words}){push.again()}")
    return UploadError(f"the upload to {name} failed: the Hub answered {words}{push.again()}")


def missing_revision(push: Push) -> InputError:
    """For a branch that is not there."""
    return InputError(
        f"--revision {push.revision}: {push.repo_id} has no such branch: make it with `hf repos branch create "
        f"{push.repo_id} {push.revision}`, or leave --revision out{push.again()}"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, the cause last."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__
