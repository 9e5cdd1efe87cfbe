"""Whose commits are believed: those that one of the allowed signers has signed with ssh, when the key was good.

The file is ssh-keygen's ``allowed_signers``; it comes with the device and never from a repository. A
file beside it, of the same name and ``.revoked``, names keys that are good no longer, whatever they signed.
"""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Final

from fedbus.stores.code.git_mirror import Mirror
from fedbus.stores.code.git_objects import CommitObject, Objects
from fedbus.stores.code.interface import BadCodeSource, CodeRejected, GitMissing, SignerNotAllowed, short
from fedbus.stores.tasks import git_version

OLDEST_GIT: Final = (2, 29)
OLDEST_GIT_THAT_VERIFIES: Final = (2, 34)
CLOCKS_DIFFER: Final = timedelta(hours=1)


class AllowedSigners:
    """The signers in *file*. Raises BadCodeSource where it names nobody, GitMissing where nothing can be verified."""

    def __init__(self, file: Path) -> None:
        check_git(OLDEST_GIT_THAT_VERIFIES)
        ssh_keygen = shutil.which("ssh-keygen")
        if ssh_keygen is None:
            raise GitMissing(
                "signatures cannot be verified without ssh-keygen: install OpenSSH's client programs"
            )
        if not _names_somebody(file):
            raise BadCodeSource(
                f'{file} names no allowed signers: write lines as `NAME namespaces="git" ssh-ed25519 …`'
            )
        self._file = file.absolute()
        self._revoked = self._file.with_name(f"{file.name}.revoked")
        self._ssh_keygen = ssh_keygen

    @property
    def stamp(self) -> object:
        """Changes when the files do."""
        return [_stamp(file) for file in (self._file, self._revoked)]

    def check(self, mirror: Mirror, objects: Objects, version: str) -> None:
        """Raises CodeRejected where the commit *version* is not to be believed."""
        commit = objects.commit(version)
        if not mirror.is_signed(
            version, signers=self._file, revoked=self._revoked, ssh_keygen=self._ssh_keygen
        ):
            raise SignerNotAllowed(version, _why_not(commit))
        for parent in commit.parents:
            if objects.commit(parent).when - commit.when > CLOCKS_DIFFER:
                raise CodeRejected(
                    version,
                    f"it says that it was made before {short(parent)}, which it follows: "
                    "a date that is set back can make an old key look good; commit it again",
                )


def check_git(oldest: tuple[int, int] = OLDEST_GIT) -> None:
    """Raises GitMissing where this machine has no git, or one before *oldest*."""
    try:
        found = git_version.version()
    except git_version.GitFailed as error:
        raise GitMissing(f"a repository cannot be followed without git: install it ({error})") from None
    if found < oldest:
        what = "verify ssh signatures" if oldest == OLDEST_GIT_THAT_VERIFIES else "be used here"
        raise GitMissing(
            f"this machine has git {_dotted(found)}, and {_dotted(oldest)} is the first that can {what}: "
            "install a newer one"
        )


def _names_somebody(signers: Path) -> bool:
    try:
        lines = signers.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadCodeSource(f"the allowed signers in {signers} cannot be read: {error}") from None
    return any(line.strip() and not line.lstrip().startswith("#") for line in lines)


def _why_not(commit: CommitObject) -> str:
    match commit.signature:
        case "":
            return "it is not signed: sign it (git commit -S, with gpg.format ssh)"
        case "-----BEGIN SSH SIGNATURE-----":
            return "its signature is not that of an allowed signer whose key was good then"
        case _:
            return "it is signed with another kind of key than ssh: sign it with gpg.format ssh"


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
