"""The code repository: which commits of a task's code there are, and each as a directory on this machine.

    open_code("examples/mnist", home)                                 a directory: one version, nothing comes
    open_code("git+https://host/org/repo@main", home, signers=file)   a ref that is followed

What both promise stands in `code_interface`; the rules for a commit in `code_git`.
"""

from collections.abc import Collection
from pathlib import Path

from fedbus.stores.code.address import is_address, parse_address
from fedbus.stores.code.directory import DirectoryCodeRepository
from fedbus.stores.code.git_repository import GitCodeRepository
from fedbus.stores.code.interface import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    Commit,
    GitNotInstalled,
    HistoryRewritten,
    InvalidCodeSource,
    SignerNotAllowed,
    short_version,
)

__all__ = [
    "CodeRejected",
    "CodeRepository",
    "CodeUnavailable",
    "Commit",
    "DirectoryCodeRepository",
    "GitCodeRepository",
    "GitNotInstalled",
    "HistoryRewritten",
    "InvalidCodeSource",
    "SignerNotAllowed",
    "open_code",
    "short_version",
]


def open_code(
    where: str, home: Path, *, signers: Path | None = None, allow_install: Collection[str] = ()
) -> CodeRepository:
    """The code at *where*: the directory of a task, or a Git repository; what is fetched is kept under *home*.

    *signers* is a file as ssh-keygen knows it (allowed_signers): without one, commits are not verified.
    *allow_install* names what tasks may have installed on this machine, ``*`` for anything.
    Nothing is fetched yet. Raises BadCodeSource and GitMissing.
    """
    if not is_address(where):
        return DirectoryCodeRepository(Path(where))
    address = parse_address(where, signed=signers is not None)
    return GitCodeRepository(
        address, home / "code" / address.key, signers=signers, allow_install=allow_install
    )
