"""Real Git repositories and SSH keys."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fedbus.stores.tasks.task_directory import create_task

GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}


@dataclass(frozen=True)
class CommitSigner:
    """A developer with an SSH key."""

    name: str
    key: Path

    @property
    def public(self) -> str:
        return self.key.with_suffix(".pub").read_text().strip()

    def allowed_signers_line(self, options: str = 'namespaces="git"') -> str:
        """The line of this signer in an allowed_signers file."""
        kind, key, *_ = self.public.split()
        return f"{self.name}@example.org {options} {kind} {key}\n"

    def git_options(self) -> list[str]:
        """The options with which git signs commits with this key."""
        settings = ["gpg.format=ssh", f"user.signingKey={self.key}", "commit.gpgSign=true"]
        return [word for one in settings for word in ("-c", one)]


def make_signer(name: str, directory: Path) -> CommitSigner:
    """Create a key for *name*."""
    key = directory / name
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return CommitSigner(name, key)


class Repository:
    """A Git repository with a working tree."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def url(self) -> str:
        return f"git+file://{self.path}"

    @property
    def head(self) -> str:
        return self.git("rev-parse", "HEAD")

    def git(self, *arguments: str, when: str = "", by: CommitSigner | None = None, stdin: str = "") -> str:
        """Run git in the repository. Raises CalledProcessError if it fails."""
        dates = {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when} if when else {}
        result = subprocess.run(
            ["git", "-C", str(self.path), *(by.git_options() if by else []), *arguments],
            env=os.environ | GIT_ENVIRONMENT | dates,
            check=True,
            capture_output=True,
            text=True,
            input=stdin,
        )
        return result.stdout.strip()

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            file = self.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def commit(
        self,
        files: dict[str, str] | None = None,
        *,
        subject: str = "a change",
        by: CommitSigner | None = None,
        when: str = "",
    ) -> str:
        """Write *files*, commit all changes, and return the SHA."""
        self.write(files or {})
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", subject, by=by, when=when)
        return self.head


def create_repository(
    path: Path, task: str = "moons", *, below: str = "", by: CommitSigner | None = None
) -> Repository:
    """Create a repository at *path* with the task *task* in its directory *below*, and one commit."""
    path.mkdir(parents=True, exist_ok=True)
    repository = Repository(path)
    repository.git("init", "--quiet", "--initial-branch=main")
    create_task(path / below, task) if below else _add_task(path, task)
    repository.commit(subject="the task", by=by)
    return repository


def _add_task(path: Path, task: str) -> None:
    """Add a new task. `create_task` needs an empty directory, and this one has ``.git``."""
    create_task(path / "new", task)
    for entry in (path / "new").iterdir():
        entry.rename(path / entry.name)
    (path / "new").rmdir()
