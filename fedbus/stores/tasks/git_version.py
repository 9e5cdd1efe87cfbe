"""Asking git about a directory that may be somebody else's.

Git does what a repository's own configuration says: file-system monitors, filters and hooks in it
are programs that would run here. So nothing is asked that would start one: the names of the
objects come from git's plumbing, the files are hashed here, and no transport may be opened.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

TIMEOUT_S: Final = 20.0

_SAFE_OPTIONS: Final = (
    "--no-pager",
    "--no-replace-objects",
    "--no-optional-locks",
    "-c",
    "core.fsmonitor=false",
    "-c",
    f"core.hooksPath={os.devnull}",
    "-c",
    f"core.attributesFile={os.devnull}",
    "-c",
    "protocol.allow=never",
)
_ENVIRONMENT: Final = {
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "SSH_ASKPASS_REQUIRE": "never",
    "LC_ALL": "C",
}
_EMPTY_CONFIGURATION: Final = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
_USER_VARIABLES: Final = ("GIT_CONFIG_", "GIT_SSH", "GIT_SSL_", "GIT_ASKPASS", "GIT_PROXY_")
"""How the owner of this machine tells git of roads and credentials: needed to fetch, and for nothing else."""


class GitFailed(Exception):
    """Git said no: this is no work tree, there is no commit yet, or there is no git."""


def read_head(directory: Path) -> str:
    """The full SHA of the commit that *directory* stands at; raises GitFailed."""
    return _run_git(directory, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()


def list_files(directory: Path) -> list[str]:
    """What git knows of in *directory* or would take in: all but what is ignored."""
    listed = _run_git(directory, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".")
    return sorted({name.decode() for name in listed.split(b"\0") if name})


def is_clean(directory: Path) -> bool:
    """Whether what is in *directory* is what the commit has there: no more, no less, nothing changed."""
    committed = _committed_object_ids(directory)
    present = {name for name in list_files(directory) if os.path.lexists(directory / name)}
    if not committed or present != set(committed):
        return False
    return all(compute_object_id(directory / name, like=sha) == sha for name, sha in committed.items())


def build_command(directory: Path, *arguments: str, settings: Sequence[str] = ()) -> list[str]:
    """The command that asks git about *directory*, disarmed; *settings* (``key=value``) come on top."""
    given = [word for setting in settings for word in ("-c", setting)]
    return ["git", "-C", str(directory), *_SAFE_OPTIONS, *given, *arguments]


def build_environment(*, to_fetch: bool = False) -> dict[str, str]:
    """What git is to find; the configuration of this machine's owner counts where it is *to_fetch*, and not else."""
    if to_fetch:
        of_the_owner = {name: value for name, value in os.environ.items() if name.startswith(_USER_VARIABLES)}
        return _environment_without_git() | of_the_owner | _ENVIRONMENT
    return _environment_without_git() | _ENVIRONMENT | _EMPTY_CONFIGURATION


def read_version() -> tuple[int, int]:
    """Which git this is: ``(2, 39)``; raises GitFailed where there is none."""
    found = re.search(rb"(\d+)\.(\d+)", _run_git(Path(), "--version"))
    if found is None:
        raise GitFailed("git does not say which it is")
    return int(found[1]), int(found[2])


def compute_object_id(path: Path, *, like: str) -> str:
    """What git would call this file, by the same kind of hash as *like*; empty where it is no file."""
    if path.is_symlink():
        content = os.fsencode(path.readlink())
    elif path.is_file():
        content = path.read_bytes()
    else:
        return ""
    new = hashlib.sha256 if len(like) == 64 else hashlib.sha1
    return new(b"blob %d\0" % len(content) + content).hexdigest()


def _committed_object_ids(directory: Path) -> dict[str, str]:
    """The object ids of all files that the commit has in *directory*, by name."""
    listed = _run_git(directory, "ls-tree", "-r", "-z", "HEAD", "--", ".").decode()
    entries = [entry.split("\t", 1) for entry in listed.split("\0") if entry]
    return {name: what.split()[2] for what, name in entries}


def _run_git(directory: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(
            build_command(directory, *arguments),
            env=_environment_without_git() | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GitFailed(str(error)) from error
    if done.returncode:
        raise GitFailed(done.stderr.decode(errors="replace").strip())
    return done.stdout


def _environment_without_git() -> dict[str, str]:
    """Our environment without what a caller may have said to git: where a repository is, above all."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
