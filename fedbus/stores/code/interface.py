"""What a code repository promises, and the errors that tell its answers apart.

A *version* is a full commit SHA. Which code may become one is decided here, and by nothing that
the repository itself says: the commit stands on the history of the ref that is followed, an
allowed signer has signed it, its files are exactly those that it names, and its task is in order.

    unavailable    CodeUnavailable: the repository is not there now; nothing is to be concluded from it
    rewritten      HistoryRewritten: what the ref pointed at has gone from its history; a person has to look
    rejected       CodeRejected: this commit is not to be run, and trying again changes nothing
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from fedbus.contracts.task.task import Task
from fedbus.stores.errors import StoreError, StoreUnavailable

_REMEDY_CHECK_ACCESS: Final = "see that it is there and lets this machine in"


@dataclass(frozen=True)
class Commit:
    """One commit of a history, for people."""

    sha: str
    subject: str
    author: str
    when: datetime


class CodeRepository(Protocol):
    """Where the versions of one task's code come from, and where they lie on this machine."""

    @property
    def source(self) -> str:
        """What is followed, without credentials: ``https://host/x.git main``; a directory's path for a fixed one."""

    @property
    def follows(self) -> bool:
        """Whether anything new can come from it."""

    @property
    def verifies(self) -> bool:
        """Whether commits must be signed by an allowed signer."""

    @property
    def trust(self) -> object:
        """Is another, after a change of the allowed signers, than it was before."""

    async def newest(self) -> str:
        """Ask the repository; the version that the ref points at now.

        Raises CodeUnavailable, and HistoryRewritten until somebody names a commit of the new history
        (`resolve`, `task_at`).
        """

    async def resolve(self, name: str) -> str:
        """The version that a SHA, the beginning of one, a tag or a branch means now.

        For a full SHA that is known here the repository is not asked. Raises CodeUnavailable, and CodeRejected
        where there is no such thing on the ref's history.
        """

    async def history(self, limit: int = 20) -> list[Commit]:
        """The latest commits of the ref, newest first; those known here, where the repository is away.

        Of a rewritten history, those that were followed: the new ones, once somebody has named one of them.
        """

    async def task_at(self, version: str) -> Task:
        """The task at *version*: fetched, verified, in a directory of its own, with what it needs installed.

        Quick where it was here before. Raises CodeRejected and CodeUnavailable.
        """

    async def verify(self, version: str) -> None:
        """Raises CodeRejected unless *version* is on the ref's history, and an allowed signer's where there are any.

        Nothing of it is laid out here, nothing is installed. Raises CodeUnavailable.
        """

    async def prune(self, keep: Collection[str]) -> None:
        """Remove all versions but those in *keep*, and those that another process of this machine uses."""


class InvalidCodeSource(StoreError):
    """What was given is neither the directory of a task nor the address of a repository, or cannot be used as one."""


class GitNotInstalled(StoreError):
    """This machine lacks git, a git that is new enough, or ssh-keygen."""


class CodeUnavailable(StoreUnavailable):
    """The code repository cannot be reached: try again later, and conclude nothing from it."""

    def __init__(self, source: str, reason: object, *, remedy: str = _REMEDY_CHECK_ACCESS) -> None:
        super().__init__(source, reason, remedy=remedy)
        self.source = source


class CodeRejected(StoreError):
    """This code is not to be run here; *reason* says why, on one line."""

    def __init__(self, version: str, reason: str) -> None:
        super().__init__(f"the code at {short_version(version)} is refused: {reason}")
        self.version = version
        self.reason = reason


class SignerNotAllowed(CodeRejected):
    """No allowed signer has signed the commit: it is to be looked at again when the allowed signers are others."""


class HistoryRewritten(StoreError):
    """The ref was moved to where its earlier commits are not: nothing of it is followed by itself."""

    def __init__(self, source: str, old: str, new: str) -> None:
        super().__init__(
            f"the history of {source} was rewritten: {short_version(old)} is not in that of {short_version(new)}; "
            f"look at it, and roll out {short_version(new)} by hand if that is meant"
        )
        self.old = old
        self.new = new


def short_version(version: str) -> str:
    """A version as people write it."""
    prefix, colon, digest = version.partition(":")
    return f"{prefix}:{digest[:12]}" if colon else version[:12]
