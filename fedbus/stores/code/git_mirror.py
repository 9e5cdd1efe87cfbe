"""A local bare copy of the followed ref of a remote Git repository, with its history.

The copy has an empty configuration, and the one of the remote repository is never read. Results of git come from
exit codes, never from the text of its messages.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedbus.stores.code.address import CodeAddress, is_sha
from fedbus.stores.code.git_objects import GitObjects, open_objects
from fedbus.stores.code.interface import CodeUnavailable, Commit
from fedbus.stores.code.subprocesses import ProcessResult, SubprocessFailed, SubprocessRunner
from fedbus.stores.tasks import git_version

FETCH_TIMEOUT_S: Final = 900.0
LOCAL_TIMEOUT_S: Final = 60.0

_FOLLOWED_REF: Final = "refs/fedbus/seen"
_NO_SUCH_REF: Final = 2
"""The exit code of ``git ls-remote --exit-code`` for a repository without such a ref."""
_STALL_SETTINGS: Final = ("http.lowSpeedLimit=1000", "http.lowSpeedTime=30")
_STRICT_SETTINGS: Final = (
    "transfer.fsckObjects=true",
    "fetch.recurseSubmodules=false",
    "gc.auto=0",
    "maintenance.auto=false",
)


class GitMirror:
    """The copy in *directory* of the repository at *address*. All methods block, and raise CodeUnavailable."""

    def __init__(self, directory: Path, address: CodeAddress, programs: SubprocessRunner) -> None:
        self._directory = directory
        self._address = address
        self._programs = programs

    def prepare(self) -> None:
        """Create the copy if it does not exist. The caller holds the lock."""
        if self._directory.is_dir():
            for left_behind in self._directory.rglob("*.lock"):  # left by a git that was killed
                left_behind.unlink(missing_ok=True)
            return
        new = Path(tempfile.mkdtemp(dir=self._directory.parent, prefix=".making-"))
        self._check_result(
            self._git("init", "--bare", "--quiet", "--template=", "--object-format=sha1", directory=new)
        )
        new.rename(self._directory)

    def delete(self) -> None:
        """Remove a corrupt copy; the next fetch creates it again."""
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- remote repository ---

    def fetch(self) -> str:
        """Fetch the ref, and return the commit that it points to now."""
        if self._address.is_pinned:
            return self._fetch_pinned()
        name, sha = self._find_ref()
        if sha != self.followed_commit():
            self._fetch(name)
        commit = self.followed_commit()
        if commit is None:
            raise self._unavailable(f"{self._address.ref or 'HEAD'} does not point to a commit")
        return commit

    def resolve_remote(self, name: str) -> str | None:
        """Return the commit of the branch or tag *name* in the remote repository; None if there is none."""
        ref = self._find_remote_ref(name)
        return ref[1] if ref else None

    def followed_commit(self) -> str | None:
        """Return the commit that the ref pointed to at the last fetch."""
        return self.resolve_local(_FOLLOWED_REF)

    def _fetch_pinned(self) -> str:
        if self.resolve_local(self._address.ref) is None or self.followed_commit() is None:
            self._fetch(self._address.ref)
        return self._address.ref

    def _find_ref(self) -> tuple[str, str]:
        ref = self._find_remote_ref(self._address.ref)
        if ref is None:
            raise CodeUnavailable(
                str(self._address),
                f"it has no branch or tag {self._address.ref or 'HEAD'}",
                remedy="create it there, or correct the address",
            )
        return ref

    def _find_remote_ref(self, name: str) -> tuple[str, str] | None:
        """Return the full name and commit of the remote ref *name*; a branch takes precedence over a tag."""
        candidates = [f"refs/heads/{name}", f"refs/tags/{name}"] if name else ["HEAD"]
        patterns = [*candidates, f"refs/tags/{name}^{{}}"] if name else candidates
        result = self._git("ls-remote", "--exit-code", "--", self._address.url, *patterns, to_fetch=True)
        if result.returncode == _NO_SUCH_REF:
            return None
        output = self._check_result(result).stdout.decode(errors="replace")
        lines = [line.split("\t") for line in output.splitlines()]
        refs = {line[1]: line[0] for line in lines if len(line) == 2 and is_sha(line[0])}
        ref = next((candidate for candidate in candidates if candidate in refs), None)
        return (ref, refs.get(f"{ref}^{{}}", refs[ref])) if ref else None

    def _fetch(self, name: str) -> None:
        options = ("--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head", "--force")
        self._check_result(
            self._git(
                "fetch",
                *options,
                "--",
                self._address.url,
                f"{name}:{_FOLLOWED_REF}",
                to_fetch=True,
                timeout_s=FETCH_TIMEOUT_S,
            )
        )

    # --- local copy ---

    def resolve_local(self, name: str) -> str | None:
        """Return the full SHA of the local commit *name*; None if there is none or more than one."""
        result = self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        sha = result.stdout.decode().strip()
        return sha if result.returncode == 0 and is_sha(sha) else None

    def is_ancestor(self, old: str, new: str) -> bool:
        """Return whether *old* is in the history of *new*, or equal to it."""
        return self._git("merge-base", "--is-ancestor", old, new).returncode == 0

    def list_commits(self, limit: int, *, of: str | None = None) -> list[Commit]:
        """Return the history of *of*, or of the followed ref; newest first."""
        start = self.resolve_local(of or _FOLLOWED_REF)
        if start is None:
            return []
        result = self._git(
            "log", f"--max-count={limit}", "--no-show-signature", "--format=%H%x00%ct%x00%an%x00%s", start
        )
        output = self._check_result(result).stdout.decode(errors="replace")
        lines = (line.split("\0") for line in output.split("\n") if line)
        return [
            Commit(sha, _sanitize(subject), _sanitize(author), datetime.fromtimestamp(int(when), UTC))
            for sha, when, author, subject in lines
        ]

    def is_signed(self, sha: str, *, signers: Path, revoked: Path, ssh_keygen: str) -> bool:
        """Return whether one of *signers* has signed the commit with a valid key that is not in *revoked*."""
        settings = [
            "gpg.format=ssh",
            f"gpg.ssh.program={ssh_keygen}",
            f"gpg.ssh.allowedSignersFile={signers}",
            "gpg.minTrustLevel=fully",
            *(
                f"gpg.{format_}program=false" for format_ in ("", "openpgp.", "x509.")
            ),  # only SSH signatures count
            *([f"gpg.ssh.revocationFile={revoked}"] if revoked.exists() else []),
        ]
        return self._git("verify-commit", sha, settings=settings).returncode == 0

    @contextmanager
    def open_objects(self) -> Iterator[GitObjects]:
        with open_objects(self._directory, self._programs) as objects:
            yield objects

    def repack(self) -> None:
        """Let git pack its objects; no object is deleted."""
        self._git("gc", "--auto", "--quiet", settings=["gc.pruneExpire=never", "gc.autoDetach=false"])

    # --- git ------------------------------------------------------------------------------------------

    def _git(
        self,
        *arguments: str,
        to_fetch: bool = False,
        settings: list[str] | None = None,
        timeout_s: float = LOCAL_TIMEOUT_S,
        directory: Path | None = None,
    ) -> ProcessResult:
        transport = (
            [f"protocol.{self._address.scheme}.allow=always", *_STALL_SETTINGS, *_STRICT_SETTINGS]
            if to_fetch
            else []
        )
        command = git_version.build_command(
            directory or self._directory, *arguments, settings=[*transport, *(settings or [])]
        )
        try:
            return self._programs.run(
                command, environment=git_version.build_environment(to_fetch=to_fetch), timeout_s=timeout_s
            )
        except SubprocessFailed as error:
            raise self._unavailable(str(error)) from None

    def _check_result(self, result: ProcessResult) -> ProcessResult:
        if result.returncode != 0:
            raise self._unavailable(_select_error_line(result).error_line)
        return result

    def _unavailable(self, reason: str) -> CodeUnavailable:
        return CodeUnavailable(str(self._address), re.sub(r"//[^/@\s]*@", "//", reason))


def _select_error_line(result: ProcessResult) -> ProcessResult:
    """Keep only the error output before git's own summary: the message of ssh or of the server."""
    cause, _, _ = result.stderr.partition("fatal: Could not read from remote repository")
    return replace(result, stderr=cause) if cause.strip() else result


def _sanitize(text: str) -> str:
    """Remove control characters from text of a remote repository."""
    return "".join(char if char.isprintable() else " " for char in text)[:200]
