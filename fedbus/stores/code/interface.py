"""The interface of a code repository, and its errors.

A *version* is a full commit SHA. A commit is accepted if it is in the history of the followed ref, an allowed signer
has signed it, its files match it exactly, and its task is valid. Nothing in the repository can change these rules.

    unavailable    CodeUnavailable: the repository cannot be reached; nothing follows about its content
    rewritten      HistoryRewritten: the earlier commit of the ref is no longer in its history; a person has to decide
    rejected       CodeRejected: this commit must not run, and a retry does not help
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from fedbus.contracts.task.task import Task
from fedbus.stores.errors import StoreError, StoreUnavailable

_REMEDY_CHECK_ACCESS: Final = "check that it exists and that this machine has access"


@dataclass(frozen=True)
class Commit:
    """A commit, for display."""

    sha: str
    subject: str
    author: str
    committed_at: datetime


class CodeRepository(Protocol):
    """The versions of one task's code, and their directories on this machine."""

    @property
    def source(self) -> str:
        """The followed ref without credentials (``https://host/x.git main``), or the path of a directory."""

    @property
    def can_update(self) -> bool:
        """Whether new versions can appear."""

    @property
    def requires_signatures(self) -> bool:
        """Whether commits must be signed by an allowed signer."""

    @property
    def signers_fingerprint(self) -> object:
        """A value that changes whenever the set of allowed signers changes."""

    async def fetch_latest(self) -> str:
        """Fetch the ref, and return the version that it points to now.

        Raises CodeUnavailable, and HistoryRewritten until a call of `resolve` or `load_task` names a commit of the new
        history.
        """

    async def resolve(self, name: str) -> str:
        """Return the version that a SHA, an abbreviated SHA, a tag or a branch names.

        A full SHA that is known locally needs no fetch. Raises CodeUnavailable, and CodeRejected if *name* is not in
        the history of the ref.
        """

    async def list_commits(self, limit: int = 20) -> list[Commit]:
        """Return the latest commits of the ref, newest first; those known locally if the repository is unavailable.

        After a rewrite, it returns the old history until a call of `resolve` or `load_task` names a commit of the new
        one.
        """

    async def load_task(self, version: str) -> Task:
        """Fetch, verify and check out *version*, install its requirements, and return the task.

        Fast if the version was checked out before. Raises CodeRejected and CodeUnavailable.
        """

    async def verify(self, version: str) -> None:
        """Verify that *version* is in the history of the ref and, if allowed signers are configured, signed by one.

        Nothing is checked out or installed. Raises CodeRejected and CodeUnavailable.
        """

    async def prune(self, keep: Collection[str]) -> None:
        """Remove all versions except those in *keep* and those that another process uses."""


class InvalidCodeSource(StoreError):
    """The given source is neither the directory of a task nor a valid repository address."""


class GitNotInstalled(StoreError):
    """git or ssh-keygen is not installed, or git is too old."""


class CodeUnavailable(StoreUnavailable):
    """The code repository cannot be reached. Retry later; nothing follows about its content."""

    def __init__(self, source: str, reason: object, *, remedy: str = _REMEDY_CHECK_ACCESS) -> None:
        super().__init__(source, reason, remedy=remedy)
        self.source = source


class CodeRejected(StoreError):
    """The code of *version* must not run; *reason* is one line."""

    def __init__(self, version: str, reason: str) -> None:
        super().__init__(f"code version {short_version(version)} is rejected: {reason}")
        self.version = version
        self.reason = reason


class SignerNotAllowed(CodeRejected):
    """No allowed signer has signed the commit. It is checked again when the allowed signers change."""


class HistoryRewritten(StoreError):
    """The earlier commit of the ref is not in its history. The new history is not followed automatically."""

    def __init__(self, source: str, old: str, new: str) -> None:
        super().__init__(
            f"the history of {source} was rewritten: {short_version(old)} is not an ancestor of {short_version(new)}; "
            f"check the repository, and roll out {short_version(new)} by hand if this is intended"
        )
        self.old = old
        self.new = new


def short_version(version: str) -> str:
    """Return the short form of a version, for display."""
    prefix, colon, digest = version.partition(":")
    return f"{prefix}:{digest[:12]}" if colon else version[:12]
