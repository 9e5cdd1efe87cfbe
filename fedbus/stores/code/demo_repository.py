"""A Git repository for demonstrations: a copy of a task, with signed commits.

    repository = DemoRepository.create(Path(".fedbus/demo/task"), task.path)
    repository.commit("Smaller steps", {"pyproject.toml": text})

`fedbus.stores.code.open` follows it like any other repository. Commits are signed with an SSH key of its own if
ssh-keygen is installed; `allowed_signers` lists that key.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.stores.code.interface import GitNotInstalled
from fedbus.stores.errors import StoreError
from fedbus.stores.tasks import git_version

AUTHOR: Final = "fedbus-demo@localhost"
TIMEOUT_S: Final = 30.0
_IGNORED: Final = shutil.ignore_patterns("__pycache__", ".git", ".*_cache", "*.egg-info", ".venv")


class CommitFailed(StoreError):
    """git or ssh-keygen failed."""


@dataclass(frozen=True)
class DemoRepository:
    """A repository with one branch, main, whose work tree is *directory*."""

    directory: Path
    key: Path | None

    @classmethod
    def create(cls, directory: Path, like: Path) -> "DemoRepository":
        """Create a repository in *directory* with the files of *like* as its first commit.

        Raises GitNotInstalled and CommitFailed.
        """
        if shutil.which("git") is None:
            raise GitNotInstalled("cannot commit without git; install it, or omit --commit")
        shutil.copytree(like, directory, ignore=_IGNORED)
        repository = cls(directory, _create_key(directory.with_name(f"{directory.name}-key")))
        repository._git("init", "--quiet", "--initial-branch=main")
        repository.commit(f"Add the task from {like.name}")
        return repository

    @property
    def source(self) -> str:
        """The repository address for `open_code`."""
        return f"git+file://{self.directory}@main"

    @property
    def allowed_signers(self) -> Path | None:
        """The allowed_signers file; None if commits are not signed."""
        return self.key.with_suffix(".signers") if self.key else None

    def commit(self, message: str, files: Mapping[str, str] | None = None) -> str:
        """Write *files* and commit everything. Returns the full SHA. Raises CommitFailed."""
        for name, text in (files or {}).items():
            (self.directory / name).write_text(text, encoding="utf-8")
        self._git("add", "--all")
        signing = ["-c", "gpg.format=ssh", "-c", f"user.signingkey={self.key}"] if self.key else []
        self._git(*signing, "commit", "--quiet", *(["-S"] if self.key else []), f"--message={message}")
        return self._git("rev-parse", "HEAD").strip()

    def _git(self, *arguments: str) -> str:
        environment = git_version.environment_without_git() | {
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_NAME": "fedbus demo",
            "GIT_AUTHOR_EMAIL": AUTHOR,
            "GIT_COMMITTER_NAME": "fedbus demo",
            "GIT_COMMITTER_EMAIL": AUTHOR,
        }
        return _run(["git", "-C", str(self.directory), *arguments], environment)


def _create_key(path: Path) -> Path | None:
    """Create an SSH key at *path* with an allowed_signers file for it; None without ssh-keygen."""
    if shutil.which("ssh-keygen") is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", AUTHOR, "-f", str(path)], dict(os.environ))
    public = path.with_suffix(".pub").read_text().split()[:2]
    path.with_suffix(".signers").write_text(f'{AUTHOR} namespaces="git" {" ".join(public)}\n')
    return path


def _run(command: list[str], environment: dict[str, str]) -> str:
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommitFailed(f"cannot run {command[0]}: {error}") from error
    if result.returncode:
        raise CommitFailed(f"{command[0]} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout
