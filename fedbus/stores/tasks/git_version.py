"""Read the version of a directory from git, safely for a repository that is not trusted.

The configuration of a repository can make git run programs: file-system monitors, filters, hooks. So only commands
that start none are used: object ids come from plumbing commands, files are hashed here, and transports are disabled.
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
"""Prefixes of the user's settings for transports and credentials; passed to git only for a fetch."""


class GitFailed(Exception):
    """git failed: no work tree, no commit yet, or git is not installed."""


def read_head(directory: Path) -> str:
    """Return the full SHA of HEAD in *directory*. Raises GitFailed."""
    return _run_git(directory, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()


def list_files(directory: Path) -> list[str]:
    """List all files in *directory* that git does not ignore, tracked or not."""
    output = _run_git(directory, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".")
    return sorted({name.decode() for name in output.split(b"\0") if name})


def is_clean(directory: Path) -> bool:
    """Return whether the files in *directory* are exactly those of HEAD."""
    committed = _committed_object_ids(directory)
    present = {name for name in list_files(directory) if os.path.lexists(directory / name)}
    if not committed or present != set(committed):
        return False
    return all(compute_object_id(directory / name, like=sha) == sha for name, sha in committed.items())


def build_command(directory: Path, *arguments: str, settings: Sequence[str] = ()) -> list[str]:
    """Build the arguments of a safe git command in *directory*, with *settings* (``key=value``)."""
    options = [argument for setting in settings for argument in ("-c", setting)]
    return ["git", "-C", str(directory), *_SAFE_OPTIONS, *options, *arguments]


def build_environment(*, to_fetch: bool = False) -> dict[str, str]:
    """Build the environment for git; only *to_fetch* includes the configuration of the user."""
    if to_fetch:
        user_settings = {
            name: value for name, value in os.environ.items() if name.startswith(_USER_VARIABLES)
        }
        return environment_without_git() | user_settings | _ENVIRONMENT
    return environment_without_git() | _ENVIRONMENT | _EMPTY_CONFIGURATION


def read_version() -> tuple[int, int]:
    """Return the version of git, e.g. ``(2, 39)``. Raises GitFailed."""
    match = re.search(rb"(\d+)\.(\d+)", _run_git(Path(), "--version"))
    if match is None:
        raise GitFailed("the output of git --version has no version number")
    return int(match[1]), int(match[2])


def compute_object_id(path: Path, *, like: str) -> str:
    """Compute the object id of a file or link, with the hash function of *like*; "" if it is neither."""
    if path.is_symlink():
        content = os.fsencode(path.readlink())
    elif path.is_file():
        content = path.read_bytes()
    else:
        return ""
    hash_function = hashlib.sha256 if len(like) == 64 else hashlib.sha1
    return hash_function(b"blob %d\0" % len(content) + content).hexdigest()


def _committed_object_ids(directory: Path) -> dict[str, str]:
    """Return the object ids of all files of HEAD in *directory*, by name."""
    output = _run_git(directory, "ls-tree", "-r", "-z", "HEAD", "--", ".").decode()
    entries = [entry.split("\t", 1) for entry in output.split("\0") if entry]
    return {name: fields.split()[2] for fields, name in entries}


def _run_git(directory: Path, *arguments: str) -> bytes:
    try:
        result = subprocess.run(
            build_command(directory, *arguments),
            env=environment_without_git() | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GitFailed(str(error)) from error
    if result.returncode:
        raise GitFailed(result.stderr.decode(errors="replace").strip())
    return result.stdout


def environment_without_git() -> dict[str, str]:
    """Return the environment without GIT_* variables, which could name another repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
