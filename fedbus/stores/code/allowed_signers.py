"""Verify that an allowed signer has signed a commit with an SSH key that was valid at that time.

The file has the ``allowed_signers`` format of ssh-keygen and is provisioned with the device, never read from a
repository. A second file with the suffix ``.revoked`` lists revoked keys; a revoked key is invalid for every commit.
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
    """The signers in *file*. Raises InvalidCodeSource without signers, GitNotInstalled without tools."""

    def __init__(self, file: Path) -> None:
        check_git(MIN_GIT_VERSION_FOR_SIGNATURES)
        ssh_keygen = shutil.which("ssh-keygen")
        if ssh_keygen is None:
            raise GitNotInstalled("cannot verify signatures without ssh-keygen; install the OpenSSH client")
        if not _has_signers(file):
            raise InvalidCodeSource(
                f'{file} names no allowed signers; write lines such as `NAME namespaces="git" ssh-ed25519 …`'
            )
        self._file = file.absolute()
        self._revoked = self._file.with_name(f"{file.name}.revoked")
        self._ssh_keygen = ssh_keygen

    @property
    def fingerprint(self) -> object:
        """A value that changes when the files change."""
        return [_file_fingerprint(file) for file in (self._file, self._revoked)]

    def check(self, mirror: GitMirror, objects: GitObjects, version: str) -> None:
        """Raise CodeRejected unless an allowed signer has signed the commit *version*."""
        commit = objects.read_commit(version)
        if not mirror.is_signed(
            version, signers=self._file, revoked=self._revoked, ssh_keygen=self._ssh_keygen
        ):
            raise SignerNotAllowed(version, _rejection_reason(commit))
        for parent in commit.parents:
            if objects.read_commit(parent).committed_at - commit.committed_at > MAX_CLOCK_SKEW:
                raise CodeRejected(
                    version,
                    f"its date is before that of its parent {short_version(parent)}; "
                    "an earlier date could make an expired key valid; commit it again",
                )


def check_git(oldest: tuple[int, int] = MIN_GIT_VERSION) -> None:
    """Raise GitNotInstalled unless git is installed in version *oldest* or later."""
    try:
        version = git_version.read_version()
    except git_version.GitFailed as error:
        raise GitNotInstalled(f"cannot follow a repository without git; install it ({error})") from None
    if version < oldest:
        purpose = "to verify SSH signatures" if oldest == MIN_GIT_VERSION_FOR_SIGNATURES else "by fedbus"
        raise GitNotInstalled(
            f"git {_format_version(version)} is too old; "
            f"git {_format_version(oldest)} or later is needed {purpose}; install a newer version"
        )


def _has_signers(signers: Path) -> bool:
    try:
        lines = signers.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCodeSource(f"cannot read the allowed signers in {signers}: {error}") from None
    return any(line.strip() and not line.lstrip().startswith("#") for line in lines)


def _rejection_reason(commit: CommitObject) -> str:
    match commit.signature:
        case "":
            return "it is not signed; sign it with git commit -S and gpg.format=ssh"
        case "-----BEGIN SSH SIGNATURE-----":
            return "its signature is not from an allowed signer whose key was valid then"
        case _:
            return "its signature is not an SSH signature; sign it with gpg.format=ssh"


def _file_fingerprint(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _format_version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
