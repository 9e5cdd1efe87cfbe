"""Whose commits are believed: those that one of the allowed signers has signed with ssh, when the key was good.

The file is ssh-keygen's ``allowed_signers``; it comes with the device and never from a repository. A
file beside it, of the same name and ``.revoked``, names keys that are good no longer, whatever they signed.
"""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Final

from fedbus.stores.code.git_mirror import GitMirror
from fedbus.stores.code.git_objects import CommitObject, GitObjects
from fedbus.stores.code.interface import (
    CodeRejected,
    GitNotInstalled,
    InvalidCodeSource,
    SignerNotAllowed,
    short_version,
)
from fedbus.stores.tasks import git_version

MIN_GIT_VERSION: Final = (2, 29)
MIN_GIT_VERSION_FOR_SIGNATURES: Final = (2, 34)
MAX_CLOCK_SKEW: Final = timedelta(hours=1)


class AllowedSigners:
    """The signers in *file*. Raises BadCodeSource where it names nobody, GitMissing where nothing can be verified."""

    def __init__(self, file: Path) -> None:
        check_git(MIN_GIT_VERSION_FOR_SIGNATURES)
        ssh_keygen = shutil.which("ssh-keygen")
        if ssh_keygen is None:
            raise GitNotInstalled(
                "signatures cannot be verified without ssh-keygen: install OpenSSH's client programs"
            )
        if not _has_signers(file):
            raise InvalidCodeSource(
                f'{file} names no allowed signers: write lines as `NAME namespaces="git" ssh-ed25519 …`'
            )
        self._file = file.absolute()
        self._revoked = self._file.with_name(f"{file.name}.revoked")
        self._ssh_keygen = ssh_keygen

    @property
    def fingerprint(self) -> object:
        """Changes when the files do."""
        return [_file_fingerprint(file) for file in (self._file, self._revoked)]

    def check(self, mirror: GitMirror, objects: GitObjects, version: str) -> None:
        """Raises CodeRejected where the commit *version* is not to be believed."""
        commit = objects.commit(version)
        if not mirror.is_signed(
            version, signers=self._file, revoked=self._revoked, ssh_keygen=self._ssh_keygen
        ):
            raise SignerNotAllowed(version, _rejection_reason(commit))
        for parent in commit.parents:
            if objects.commit(parent).when - commit.when > MAX_CLOCK_SKEW:
                raise CodeRejected(
                    version,
                    f"it says that it was made before {short_version(parent)}, which it follows: "
                    "a date that is set back can make an old key look good; commit it again",
                )


def check_git(oldest: tuple[int, int] = MIN_GIT_VERSION) -> None:
    """Raises GitMissing where this machine has no git, or one before *oldest*."""
    try:
        found = git_version.read_version()
    except git_version.GitFailed as error:
        raise GitNotInstalled(f"a repository cannot be followed without git: install it ({error})") from None
    if found < oldest:
        what = "verify ssh signatures" if oldest == MIN_GIT_VERSION_FOR_SIGNATURES else "be used here"
        raise GitNotInstalled(
            f"this machine has git {_format_version(found)}, "
            f"and {_format_version(oldest)} is the first that can {what}: "
            "install a newer one"
        )


def _has_signers(signers: Path) -> bool:
    try:
        lines = signers.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCodeSource(f"the allowed signers in {signers} cannot be read: {error}") from None
    return any(line.strip() and not line.lstrip().startswith("#") for line in lines)


def _rejection_reason(commit: CommitObject) -> str:
    match commit.signature:
        case "":
            return "it is not signed: sign it (git commit -S, with gpg.format ssh)"
        case "-----BEGIN SSH SIGNATURE-----":
            return "its signature is not that of an allowed signer whose key was good then"
        case _:
            return "it is signed with another kind of key than ssh: sign it with gpg.format ssh"


def _file_fingerprint(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _format_version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
