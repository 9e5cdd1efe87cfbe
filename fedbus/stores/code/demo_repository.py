"""A Git repository of our own making, for showing what a commit sets off: a task's directory, signed commits.

    repository = Authored.create(Path(".fedbus/demo/task"), task.path)
    repository.commit("Smaller steps", {"pyproject.toml": text})

It is written to and never read from: what follows it stands in `code`. Commits are signed with an ssh key
of its own, where this machine has ssh-keygen; `allowed_signers` names that key.
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

AUTHOR: Final = "fedbus-demo@localhost"
TIMEOUT_S: Final = 30.0
_IGNORED: Final = shutil.ignore_patterns("__pycache__", ".git", ".*_cache", "*.egg-info", ".venv")


class CommitFailed(StoreError):
    """Git said no; the text says why."""


@dataclass(frozen=True)
class DemoRepository:
    """A repository with one branch, main, whose work tree is *directory*."""

    directory: Path
    key: Path | None

    @classmethod
    def create(cls, directory: Path, like: Path) -> "DemoRepository":
        """A new repository in *directory* with the files of *like* as its first commit.

        Raises GitMissing and CannotCommit.
        """
        if shutil.which("git") is None:
            raise GitNotInstalled("nothing can be committed without git: install it, or leave --commit out")
        shutil.copytree(like, directory, ignore=_IGNORED)
        repository = cls(directory, _create_key(directory.with_name(f"{directory.name}-key")))
        repository._git("init", "--quiet", "--initial-branch=main")
        repository.commit(f"The task as it was in {like.name}")
        return repository

    @property
    def source(self) -> str:
        """How fedbus is told to follow it."""
        return f"git+file://{self.directory}@main"

    @property
    def allowed_signers(self) -> Path | None:
        """Who may sign here, as ssh-keygen knows it; None where nobody signs."""
        return self.key.with_suffix(".signers") if self.key else None

    def commit(self, message: str, files: Mapping[str, str] | None = None) -> str:
        """Write *files*, commit all there is, and answer the full SHA; raises CannotCommit."""
        for name, text in (files or {}).items():
            (self.directory / name).write_text(text, encoding="utf-8")
        self._git("add", "--all")
        signing = ["-c", "gpg.format=ssh", "-c", f"user.signingkey={self.key}"] if self.key else []
        self._git(*signing, "commit", "--quiet", *(["-S"] if self.key else []), f"--message={message}")
        return self._git("rev-parse", "HEAD").strip()

    def _git(self, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_NAME": "fedbus demo",
            "GIT_AUTHOR_EMAIL": AUTHOR,
            "GIT_COMMITTER_NAME": "fedbus demo",
            "GIT_COMMITTER_EMAIL": AUTHOR,
        }
        return _run(["git", "-C", str(self.directory), *arguments], environment)


def _create_key(path: Path) -> Path | None:
    """A new ssh key at *path* and, beside it, the list of signers that names it; None without ssh-keygen."""
    if shutil.which("ssh-keygen") is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", AUTHOR, "-f", str(path)], dict(os.environ))
    public = path.with_suffix(".pub").read_text().split()[:2]
    path.with_suffix(".signers").write_text(f'{AUTHOR} namespaces="git" {" ".join(public)}\n')
    return path


def _run(command: list[str], environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommitFailed(f"{command[0]} cannot be used: {error}") from error
    if done.returncode:
        raise CommitFailed(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
