"""A copy of somebody's Git repository on this machine: what its ref has pointed at so far, and all that leads there.

The copy's own configuration is ours and says nothing; the other repository's is never read. What
git answers is told by exit codes, and never by the text of its messages.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedbus.stores.code.address import CodeAddress, is_sha
from fedbus.stores.code.git_objects import GitObjects, open_objects
from fedbus.stores.code.interface import CodeUnavailable, Commit
from fedbus.stores.code.subprocesses import ProcessResult, SubprocessFailed, SubprocessRunner
from fedbus.stores.tasks import git_version

QUERY_TIMEOUT_S: Final = 60.0
FETCH_TIMEOUT_S: Final = 900.0
LOCAL_TIMEOUT_S: Final = 60.0

_FOLLOWED_REF: Final = "refs/fedbus/seen"
_NO_SUCH_REF: Final = 2
"""The exit code of ``git ls-remote --exit-code`` for a repository that answers, and has no such ref."""
_STALL_SETTINGS: Final = ("http.lowSpeedLimit=1000", "http.lowSpeedTime=30")
_STRICT_SETTINGS: Final = (
    "transfer.fsckObjects=true",
    "fetch.recurseSubmodules=false",
    "gc.auto=0",
    "maintenance.auto=false",
)


class GitMirror:
    """The copy at *directory* of what is at *address*. Its methods block, and raise CodeUnavailable."""

    def __init__(self, directory: Path, address: CodeAddress, programs: SubprocessRunner) -> None:
        self._directory = directory
        self._address = address
        self._programs = programs

    def prepare(self) -> None:
        """Make it, where it is not there yet. Nobody else is at work in it."""
        if self._directory.is_dir():
            for left_behind in self._directory.rglob("*.lock"):  # by a git that was killed
                left_behind.unlink(missing_ok=True)
            return
        new = Path(tempfile.mkdtemp(dir=self._directory.parent, prefix=".making-"))
        self._done(
            self._git("init", "--bare", "--quiet", "--template=", "--object-format=sha1", directory=new)
        )
        new.rename(self._directory)

    def forget(self) -> None:
        """Remove it: it is damaged, and will be fetched anew."""
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- the other side ------------------------------------------------------------------------

    def look(self) -> str:
        """Ask for the ref, fetch what is new; the commit that it points at now."""
        if self._address.pinned:
            return self._pinned()
        name, sha = self._find_ref()
        if sha != self.seen():
            self._fetch(name)
        seen = self.seen()
        if seen is None:
            raise self._unavailable(f"what {self._address.ref or 'HEAD'} points at is no commit")
        return seen

    def named(self, name: str) -> str | None:
        """What the branch or tag *name* points at on the other side; None where it has none."""
        found = self._advertised(name)
        return found[1] if found else None

    def seen(self) -> str | None:
        """What the ref pointed at when it was fetched last."""
        return self.commit(_FOLLOWED_REF)

    def _pinned(self) -> str:
        if self.commit(self._address.ref) is None or self.seen() is None:
            self._fetch(self._address.ref)
        return self._address.ref

    def _find_ref(self) -> tuple[str, str]:
        found = self._advertised(self._address.ref)
        if found is None:
            raise CodeUnavailable(
                str(self._address),
                f"it has no branch or tag {self._address.ref or 'HEAD'}",
                remedy="make one there, or correct the address",
            )
        return found

    def _advertised(self, name: str) -> tuple[str, str] | None:
        """The full name of the ref *name* on the other side, and the commit it points at; a branch before a tag."""
        wanted = [f"refs/heads/{name}", f"refs/tags/{name}"] if name else ["HEAD"]
        asked = [*wanted, f"refs/tags/{name}^{{}}"] if name else wanted
        done = self._git("ls-remote", "--exit-code", "--", self._address.url, *asked, to_fetch=True)
        if done.code == _NO_SUCH_REF:
            return None
        lines = [line.split("\t") for line in self._done(done).out.decode(errors="replace").splitlines()]
        refs = {line[1]: line[0] for line in lines if len(line) == 2 and is_sha(line[0])}
        ref = next((one for one in wanted if one in refs), None)
        return (ref, refs.get(f"{ref}^{{}}", refs[ref])) if ref else None

    def _fetch(self, name: str) -> None:
        options = ("--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head", "--force")
        self._done(
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

    # --- what is here -----------------------------------------------------------------------------

    def commit(self, name: str) -> str | None:
        """The full SHA of the commit *name* here; None where there is none, or more than one."""
        done = self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        sha = done.out.decode().strip()
        return sha if done.code == 0 and is_sha(sha) else None

    def is_ancestor(self, old: str, new: str) -> bool:
        """Whether *old* stands on the history of *new*, or is it."""
        return self._git("merge-base", "--is-ancestor", old, new).code == 0

    def history(self, limit: int, *, of: str | None = None) -> list[Commit]:
        """What leads to *of*, or else to what the ref points at; newest first."""
        start = self.commit(of or _FOLLOWED_REF)
        if start is None:
            return []
        done = self._git(
            "log", f"--max-count={limit}", "--no-show-signature", "--format=%H%x00%ct%x00%an%x00%s", start
        )
        lines = (
            line.split("\0") for line in self._done(done).out.decode(errors="replace").split("\n") if line
        )
        return [
            Commit(sha, _sanitize(subject), _sanitize(author), datetime.fromtimestamp(int(when), UTC))
            for sha, when, author, subject in lines
        ]

    def is_signed(self, sha: str, *, signers: Path, revoked: Path, ssh_keygen: str) -> bool:
        """Whether one of *signers* has signed the commit, when that key was good; *revoked*, if there, has bad keys."""
        settings = [
            "gpg.format=ssh",
            f"gpg.ssh.program={ssh_keygen}",
            f"gpg.ssh.allowedSignersFile={signers}",
            "gpg.minTrustLevel=fully",
            *(f"gpg.{other}program=false" for other in ("", "openpgp.", "x509.")),  # no other kind counts
            *([f"gpg.ssh.revocationFile={revoked}"] if revoked.exists() else []),
        ]
        return self._git("verify-commit", sha, settings=settings).code == 0

    @contextmanager
    def objects(self) -> Iterator[GitObjects]:
        with open_objects(self._directory, self._programs) as objects:
            yield objects

    def tidy(self) -> None:
        """Let git pack what has piled up; nothing is thrown away."""
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
        road = (
            [f"protocol.{self._address.scheme}.allow=always", *_STALL_SETTINGS, *_STRICT_SETTINGS]
            if to_fetch
            else []
        )
        command = git_version.build_command(
            directory or self._directory, *arguments, settings=[*road, *(settings or [])]
        )
        try:
            return self._programs.run(
                command, environment=git_version.build_environment(to_fetch=to_fetch), timeout_s=timeout_s
            )
        except SubprocessFailed as error:
            raise self._unavailable(str(error)) from None

    def _done(self, done: ProcessResult) -> ProcessResult:
        if done.code != 0:
            raise self._unavailable(_select_error_line(done).reason)
        return done

    def _unavailable(self, reason: str) -> CodeUnavailable:
        return CodeUnavailable(str(self._address), re.sub(r"//[^/@\s]*@", "//", reason))


def _select_error_line(done: ProcessResult) -> ProcessResult:
    """What was said before git sums it up: that is ssh's word, or the other side's."""
    said, _, _ = done.err.partition("fatal: Could not read from remote repository")
    return replace(done, err=said) if said.strip() else done


def write_atomically(file: Path, text: str) -> None:
    """Write *text* to *file*, whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".making-")
    try:
        with os.fdopen(descriptor, "w") as new:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
        Path(temporary).replace(file)
    finally:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()


def _sanitize(text: str) -> str:
    """What others wrote, without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200]
