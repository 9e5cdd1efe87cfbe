"""Open the code repository of a task: a directory or a Git repository.

    open_code("examples/mnist", home, libraries)                          a directory: one fixed version
    open_code("git+https://host/org/repo@main", home, libraries, signers=file)   a Git ref that is followed

`fedbus.stores.code.interface` describes both, `fedbus.stores.code.git_repository` the rules for commits.
"""

from collections.abc import Collection
from pathlib import Path

from fedbus.contracts.task.app import FindAppReader
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
    source: str,
    home: Path,
    libraries: FindAppReader,
    *,
    signers: Path | None = None,
    allow_install: Collection[str] = (),
) -> CodeRepository:
    """Open the code at *source*, a directory or the address of a Git repository, without fetching it.

    *home* is the directory for fetched code. *libraries* read the apps of tasks. *signers* is an allowed_signers file
    of ssh-keygen; without it, commits are not verified. *allow_install* names the packages that tasks may install on
    this machine, ``*`` for any.
    Raises InvalidCodeSource and GitNotInstalled.
    """
    if not is_address(source):
        return DirectoryCodeRepository(Path(source), libraries)
    address = parse_address(source, signed=signers is not None)
    return GitCodeRepository(
        address,
        home / "code" / address.directory_name,
        libraries,
        signers=signers,
        allow_install=allow_install,
    )
