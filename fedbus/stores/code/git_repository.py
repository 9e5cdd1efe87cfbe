"""The code of a task in a Git repository that is followed.

    <home>/mirror.git        the fetched ref with its history
    <home>/tip               the commit of the ref when it was last followed
    <home>/<sha>/            the task at a commit, read-only
    <home>/<sha>.libs/       the packages installed for it
    <home>/<sha>.in-use      locked (shared) by every process that uses the version
    <home>/lock              locked by the process that changes anything here

All agents of a device share the home. New files and directories get a temporary name that begins with a dot, and are
renamed when complete: a killed process leaves nothing incomplete, and the next one removes the leftovers.

Each process verifies the signature and all files of a version before its first use: files may have changed on disk,
and a signer may have been revoked.
"""

import asyncio
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

from fedbus.common.filesystem import TEMPORARY_FILES, atomic_write
from fedbus.contracts.task.app import FindAppReader
from fedbus.contracts.task.task import LIBRARIES_SUFFIX, Task
from fedbus.stores.code import checkout, requirements
from fedbus.stores.code.address import CodeAddress, is_sha
from fedbus.stores.code.allowed_signers import AllowedSigners, check_git
from fedbus.stores.code.checkout import CheckoutEntry, InvalidTree
from fedbus.stores.code.git_mirror import GitMirror
from fedbus.stores.code.git_objects import GitObjects, ObjectCorrupt
from fedbus.stores.code.interface import CodeRejected, CodeUnavailable, Commit, HistoryRewritten
from fedbus.stores.code.requirements import NotInstallable
from fedbus.stores.code.subprocesses import SubprocessRunner
from fedbus.stores.tasks.task_directory import TaskInvalid, read_task

LOCK_TIMEOUT_S: Final = 1800.0
"""The longest wait for another process that fetches, checks out or installs."""
LEFTOVERS: Final = (TEMPORARY_FILES, ".making-*", ".gone-*")
"""Glob patterns of what a killed process may leave in the home."""

P = ParamSpec("P")
T = TypeVar("T")


class GitCodeRepository:
    """The task at *address*, with its versions under *home*. Raises InvalidCodeSource and GitNotInstalled."""

    can_update = True

    def __init__(
        self,
        address: CodeAddress,
        home: Path,
        libraries: FindAppReader,
        *,
        signers: Path | None,
        allow_install: Collection[str] = (),
    ) -> None:
        self._libraries = libraries
        self.source = str(address)
        self.requires_signatures = signers is not None
        self._address = address
        self.home = home.absolute()
        check_git()
        self._signers = None if signers is None else AllowedSigners(signers)
        self._allow_install = frozenset(allow_install)
        self._loaded_tasks: dict[str, tuple[Task, object]] = {}
        self._version_locks: dict[str, int] = {}
        weakref.finalize(self, _release_locks, self._version_locks)

    @property
    def signers_fingerprint(self) -> object:
        return None if self._signers is None else self._signers.fingerprint

    async def fetch_latest(self) -> str:
        return await self._run_in_thread(self._fetch_latest)

    async def resolve(self, name: str) -> str:
        return await self._run_in_thread(self._resolve, name)

    async def list_commits(self, limit: int = 20) -> list[Commit]:
        return await self._run_in_thread(self._list_commits, limit)

    async def load_task(self, version: str) -> Task:
        if (task := self._cached_task(version)) is not None:
            return task
        return await self._run_in_thread(self._load_task, version)

    async def verify(self, version: str) -> None:
        await self._run_in_thread(self._verify, version)

    async def prune(self, keep: Collection[str]) -> None:
        await self._run_in_thread(self._prune, frozenset(keep))

    async def _run_in_thread(
        self, work: Callable[Concatenate[SubprocessRunner, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        programs = SubprocessRunner()
        try:
            return await asyncio.to_thread(work, programs, *args, **kwargs)
        except asyncio.CancelledError:
            programs.end()
            raise
        except OSError as error:
            raise CodeUnavailable(
                str(self.home), error, remedy="use a writable directory with free space"
            ) from error

    # --- ref ---

    def _fetch_latest(self, programs: SubprocessRunner) -> str:
        with self._open_mirror(programs) as mirror:
            old, new = self._followed_tip(), mirror.fetch()
            if old is not None and not mirror.is_ancestor(old, new):
                raise HistoryRewritten(self.source, old, new)
            if old != new:
                atomic_write(self.home / "tip", new)
            return new

    def _resolve(self, programs: SubprocessRunner, name: str) -> str:
        with self._open_mirror(programs) as mirror:
            is_local = is_sha(name) and self._is_on_history(mirror, name)  # then no fetch is needed
            sha = name if is_local else self._resolve_remote(mirror, name)
            self._accept_new_history(mirror, sha)
            return sha

    def _resolve_remote(self, mirror: GitMirror, name: str) -> str:
        """Fetch the ref and find the commit of *name* in its history."""
        mirror.fetch()
        sha = self._resolve_name(mirror, name)
        if not self._is_on_history(mirror, sha):
            raise CodeRejected(sha, f"it is not in the history of {self.source}; only commits in it may run")
        return sha

    def _resolve_name(self, mirror: GitMirror, name: str) -> str:
        """Return the commit of a full SHA, a branch, a tag or an abbreviated SHA."""
        if is_sha(name):
            return name
        ref = name if name.isprintable() and not name.startswith("-") and "*" not in name else ""
        sha = (mirror.resolve_remote(ref) if ref else None) or self._resolve_abbreviation(mirror, ref)
        if sha is None:
            raise CodeRejected(
                name, f"{self.source} has no commit, tag or branch with this name, or more than one"
            )
        return sha

    def _resolve_abbreviation(self, mirror: GitMirror, name: str) -> str | None:
        is_hex = len(name) >= 4 and all(char in "0123456789abcdef" for char in name)
        return mirror.resolve_local(name) if is_hex else None

    def _list_commits(self, programs: SubprocessRunner, limit: int) -> list[Commit]:
        with self._open_mirror(programs) as mirror:
            try:
                mirror.fetch()
            except CodeUnavailable:
                if mirror.followed_commit() is None:
                    raise
            tip = self._followed_tip()
            return mirror.list_commits(limit, of=tip if tip and self._is_rewritten(mirror) else None)

    def _is_rewritten(self, mirror: GitMirror) -> bool:
        """Return whether the followed commit is no longer in the history of the ref."""
        tip, fetched = self._followed_tip(), mirror.followed_commit()
        return tip is not None and fetched is not None and not mirror.is_ancestor(tip, fetched)

    def _accept_new_history(self, mirror: GitMirror, version: str) -> None:
        """Follow the new history from now on, if *version* is only in the new one."""
        tip, fetched = self._followed_tip(), mirror.followed_commit()
        if tip and fetched and self._is_rewritten(mirror) and not mirror.is_ancestor(version, tip):
            atomic_write(self.home / "tip", fetched)

    def _followed_tip(self) -> str | None:
        """Return the commit of the ref when it was last followed."""
        try:
            text = (self.home / "tip").read_text()
        except FileNotFoundError:
            return None
        return text if is_sha(text) else None

    def _is_on_history(self, mirror: GitMirror, version: str) -> bool:
        heads = (mirror.followed_commit(), self._followed_tip())
        return any(mirror.is_ancestor(version, head) for head in heads if head is not None)

    # --- version ---

    def _cached_task(self, version: str) -> Task | None:
        """Return the task, if this process has verified it with the present allowed signers."""
        task, fingerprint = self._loaded_tasks.get(version, (None, None))
        return task if task and fingerprint == self.signers_fingerprint and Path(task.path).is_dir() else None

    def _verify(self, programs: SubprocessRunner, version: str) -> None:
        self._check_sha(version)
        with self._open_mirror(programs) as mirror:
            try:
                self._fetch(mirror, version)
                with mirror.open_objects() as objects:
                    if self._signers is not None:
                        self._signers.check(mirror, objects, version)
            except ObjectCorrupt as error:
                raise CodeRejected(version, f"the repository is corrupt: {error}") from None

    def _check_sha(self, version: str) -> None:
        if not is_sha(version):
            raise CodeRejected(
                version, f"a version of {self.source} is a full commit SHA of 40 hexadecimal digits"
            )

    def _load_task(self, programs: SubprocessRunner, version: str) -> Task:
        self._check_sha(version)
        with self._open_mirror(programs) as mirror:
            fingerprint = self.signers_fingerprint
            try:
                task = self._verify_and_check_out(mirror, programs, version)
            except ObjectCorrupt:  # perhaps only the local copy
                mirror.delete()
                mirror.prepare()
                task = self._check_out_again(mirror, programs, version)
            self._accept_new_history(mirror, version)
            self._lock_version(version)
            self._loaded_tasks[version] = (task, fingerprint)
            return task

    def _check_out_again(self, mirror: GitMirror, programs: SubprocessRunner, version: str) -> Task:
        try:
            return self._verify_and_check_out(mirror, programs, version)
        except ObjectCorrupt as error:
            raise CodeRejected(version, f"the repository is corrupt: {error}") from None

    def _verify_and_check_out(self, mirror: GitMirror, programs: SubprocessRunner, version: str) -> Task:
        """Verify *version*, check it out and return its task. All checks precede the creation of its directory."""
        directory = self.home / version
        if not (directory.is_dir() and mirror.resolve_local(version)):
            self._fetch(mirror, version)
        with mirror.open_objects() as objects:
            if self._signers is not None:
                self._signers.check(mirror, objects, version)
            try:
                entries = checkout.list_tree_files(
                    objects, objects.read_commit(version).tree, self._address.subdirectory
                )
                self._check_out(objects, entries, directory)
            except InvalidTree as error:
                raise CodeRejected(version, str(error)) from None
        return self._install_requirements(self._read(version, directory), programs)

    def _fetch(self, mirror: GitMirror, version: str) -> None:
        if self._is_on_history(mirror, version):
            return
        mirror.fetch()
        if not self._is_on_history(mirror, version):
            raise CodeRejected(version, f"it is not in the history of {self.source}")

    def _check_out(self, objects: GitObjects, entries: list[CheckoutEntry], directory: Path) -> None:
        if directory.is_dir():
            if checkout.describe_difference(entries, directory) is None:
                return
            checkout.remove(directory)
        new = directory.with_name(f".making-{directory.name}")
        try:
            checkout.write(objects, entries, new)
            new.rename(directory)
        finally:
            checkout.sweep(new)

    def _read(self, version: str, directory: Path) -> Task:
        try:
            return read_task(directory, self._libraries, version=version)
        except TaskInvalid as error:
            checkout.remove(directory)
            more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
            raise CodeRejected(version, f"its task is invalid: {error.problems[0]}{more}") from None

    def _install_requirements(self, task: Task, programs: SubprocessRunner) -> Task:
        libraries = Path(f"{task.path}{LIBRARIES_SUFFIX}")
        try:
            if not requirements.is_installed(libraries):
                checkout.remove(libraries)
                missing = requirements.unmet_requirements(task.table.code.install)
                if not missing:
                    return task
                requirements.install(missing, libraries, allowed=self._allow_install, programs=programs)
        except NotInstallable as error:
            raise CodeRejected(task.code_version, str(error)) from None
        return task.model_copy(update={"libraries": str(libraries)})

    # --- locks and cleanup ---

    def _prune(self, programs: SubprocessRunner, keep: frozenset[str]) -> None:
        with self._open_mirror(programs) as mirror:
            for version in [version for version in self._version_locks if version not in keep]:
                os.close(self._version_locks.pop(version))
                self._loaded_tasks.pop(version, None)
            for version in {path.name[:40] for path in self.home.iterdir() if is_sha(path.name[:40])} - keep:
                self._remove_unless_used(version)
            mirror.repack()

    def _remove_unless_used(self, version: str) -> None:
        lock_file = self.home / f"{version}.in-use"
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        else:
            for directory in (self.home / version, self.home / f"{version}{LIBRARIES_SUFFIX}"):
                checkout.remove(directory)
            lock_file.unlink()
        finally:
            os.close(descriptor)

    def _lock_version(self, version: str) -> None:
        """Lock *version* against removal, until this process ends or prunes it."""
        if version not in self._version_locks:
            lock_file = self.home / f"{version}.in-use"
            self._version_locks[version] = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._version_locks[version], fcntl.LOCK_SH)

    @contextmanager
    def _open_mirror(self, programs: SubprocessRunner) -> Iterator[GitMirror]:
        """Open the local copy of the repository and hold its lock."""
        self.home.mkdir(parents=True, exist_ok=True)
        with _lock_file(self.home / "lock", programs):
            for left_behind in chain.from_iterable(map(self.home.glob, LEFTOVERS)):
                left_behind.unlink() if left_behind.is_file() else checkout.sweep(left_behind)
            mirror = GitMirror(self.home / "mirror.git", self._address, programs)
            mirror.prepare()
            yield mirror


@contextmanager
def _lock_file(file: Path, programs: SubprocessRunner) -> Iterator[None]:
    """Lock *file*, for this process and its programs, which may survive it if it is killed."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _wait_for(descriptor, file, programs)
        programs.inherited_fds = (descriptor,)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, file: Path, programs: SubprocessRunner) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if programs.is_ended or time.monotonic() > deadline:
                raise CodeUnavailable(
                    str(file.parent), "another process holds its lock", remedy="find that process and end it"
                ) from None
            time.sleep(0.02)


def _release_locks(version_locks: dict[str, int]) -> None:
    for descriptor in version_locks.values():
        os.close(descriptor)
    version_locks.clear()
