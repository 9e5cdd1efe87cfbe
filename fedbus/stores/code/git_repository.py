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

    follows = True

    def __init__(
        self, address: CodeAddress, home: Path, *, signers: Path | None, allow_install: Collection[str] = ()
    ) -> None:
        self.source = str(address)
        self.verifies = signers is not None
        self._address = address
        self.home = home.absolute()
        check_git()
        self._signers = None if signers is None else AllowedSigners(signers)
        self._allow_install = frozenset(allow_install)
        self._ready: dict[str, tuple[Task, object]] = {}
        self._held: dict[str, int] = {}
        weakref.finalize(self, _release_locks, self._held)

    @property
    def trust(self) -> object:
        return None if self._signers is None else self._signers.fingerprint

    async def newest(self) -> str:
        return await self._in_thread(self._newest)

    async def resolve(self, name: str) -> str:
        return await self._in_thread(self._resolve, name)

    async def history(self, limit: int = 20) -> list[Commit]:
        return await self._in_thread(self._history, limit)

    async def task_at(self, version: str) -> Task:
        if (task := self._at_hand(version)) is not None:
            return task
        return await self._in_thread(self._task_at, version)

    async def verify(self, version: str) -> None:
        await self._in_thread(self._verify, version)

    async def prune(self, keep: Collection[str]) -> None:
        await self._in_thread(self._prune, frozenset(keep))

    async def _in_thread(
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

    def _newest(self, programs: SubprocessRunner) -> str:
        with self._mirror(programs) as mirror:
            old, new = self._tip(), mirror.look()
            if old is not None and not mirror.is_ancestor(old, new):
                raise HistoryRewritten(self.source, old, new)
            if old != new:
                atomic_write(self.home / "tip", new)
            return new

    def _resolve(self, programs: SubprocessRunner, name: str) -> str:
        with self._mirror(programs) as mirror:
            is_here = is_sha(name) and self._is_on_history(mirror, name)  # then no fetch is needed
            sha = name if is_here else self._asked_for(mirror, name)
            self._accept(mirror, sha)
            return sha

    def _asked_for(self, mirror: GitMirror, name: str) -> str:
        """Fetch the ref and find the commit of *name* in its history."""
        mirror.look()
        sha = self._meaning(mirror, name)
        if not self._is_on_history(mirror, sha):
            raise CodeRejected(sha, f"it is not in the history of {self.source}; only commits in it may run")
        return sha

    def _meaning(self, mirror: GitMirror, name: str) -> str:
        """The commit of a full SHA, a branch, a tag or an abbreviated SHA."""
        if is_sha(name):
            return name
        ref = name if name.isprintable() and not name.startswith("-") and "*" not in name else ""
        found = (mirror.named(ref) if ref else None) or self._abbreviated(mirror, ref)
        if found is None:
            raise CodeRejected(
                name, f"{self.source} has no commit, tag or branch with this name, or more than one"
            )
        return found

    def _abbreviated(self, mirror: GitMirror, name: str) -> str | None:
        is_hex = len(name) >= 4 and all(letter in "0123456789abcdef" for letter in name)
        return mirror.commit(name) if is_hex else None

    def _history(self, programs: SubprocessRunner, limit: int) -> list[Commit]:
        with self._mirror(programs) as mirror:
            try:
                mirror.look()
            except CodeUnavailable:
                if mirror.seen() is None:
                    raise
            tip = self._tip()
            return mirror.history(limit, of=tip if tip and self._is_rewritten(mirror) else None)

    def _is_rewritten(self, mirror: GitMirror) -> bool:
        """Whether the followed commit is no longer in the history of the ref."""
        tip, seen = self._tip(), mirror.seen()
        return tip is not None and seen is not None and not mirror.is_ancestor(tip, seen)

    def _accept(self, mirror: GitMirror, version: str) -> None:
        """Follow the new history from now on, if *version* is only in the new one."""
        tip, seen = self._tip(), mirror.seen()
        if tip and seen and self._is_rewritten(mirror) and not mirror.is_ancestor(version, tip):
            atomic_write(self.home / "tip", seen)

    def _tip(self) -> str | None:
        """The commit of the ref when it was last followed."""
        try:
            text = (self.home / "tip").read_text()
        except FileNotFoundError:
            return None
        return text if is_sha(text) else None

    def _is_on_history(self, mirror: GitMirror, version: str) -> bool:
        known = (mirror.seen(), self._tip())
        return any(mirror.is_ancestor(version, one) for one in known if one is not None)

    # --- version ---

    def _at_hand(self, version: str) -> Task | None:
        """The task, if this process has verified it with the present allowed signers."""
        task, trusted = self._ready.get(version, (None, None))
        return task if task and trusted == self.trust and Path(task.path).is_dir() else None

    def _verify(self, programs: SubprocessRunner, version: str) -> None:
        self._assert_sha(version)
        with self._mirror(programs) as mirror:
            try:
                self._fetch(mirror, version)
                with mirror.objects() as objects:
                    if self._signers is not None:
                        self._signers.check(mirror, objects, version)
            except ObjectCorrupt as error:
                raise CodeRejected(version, f"the repository is corrupt: {error}") from None

    def _assert_sha(self, version: str) -> None:
        if not is_sha(version):
            raise CodeRejected(
                version, f"a version of {self.source} is a full commit SHA of 40 hexadecimal digits"
            )

    def _task_at(self, programs: SubprocessRunner, version: str) -> Task:
        self._assert_sha(version)
        with self._mirror(programs) as mirror:
            trusted = self.trust
            try:
                task = self._verified(mirror, programs, version)
            except ObjectCorrupt:  # perhaps only the local copy
                mirror.forget()
                mirror.prepare()
                task = self._afresh(mirror, programs, version)
            self._accept(mirror, version)
            self._hold(version)
            self._ready[version] = (task, trusted)
            return task

    def _afresh(self, mirror: GitMirror, programs: SubprocessRunner, version: str) -> Task:
        try:
            return self._verified(mirror, programs, version)
        except ObjectCorrupt as error:
            raise CodeRejected(version, f"the repository is corrupt: {error}") from None

    def _verified(self, mirror: GitMirror, programs: SubprocessRunner, version: str) -> Task:
        """The task at *version*. All checks of the commit come before its directory exists."""
        directory = self.home / version
        if not (directory.is_dir() and mirror.commit(version)):
            self._fetch(mirror, version)
        with mirror.objects() as objects:
            if self._signers is not None:
                self._signers.check(mirror, objects, version)
            try:
                entries = checkout.list_tree_files(
                    objects, objects.commit(version).tree, self._address.subdirectory
                )
                self._check_out(objects, entries, directory)
            except InvalidTree as error:
                raise CodeRejected(version, str(error)) from None
        return self._with_libraries(self._read(version, directory), programs)

    def _fetch(self, mirror: GitMirror, version: str) -> None:
        if self._is_on_history(mirror, version):
            return
        mirror.look()
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
            return read_task(directory, version=version)
        except TaskInvalid as error:
            checkout.remove(directory)
            more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
            raise CodeRejected(version, f"its task is invalid: {error.problems[0]}{more}") from None

    def _with_libraries(self, task: Task, programs: SubprocessRunner) -> Task:
        libraries = Path(f"{task.path}{LIBRARIES_SUFFIX}")
        try:
            if not requirements.is_installed(libraries):
                checkout.remove(libraries)
                wanting = requirements.unmet_requirements(task.table.code.install)
                if not wanting:
                    return task
                requirements.install(wanting, libraries, allowed=self._allow_install, programs=programs)
        except NotInstallable as error:
            raise CodeRejected(task.code_version, str(error)) from None
        return task.model_copy(update={"libraries": str(libraries)})

    # --- locks and cleanup ---

    def _prune(self, programs: SubprocessRunner, keep: frozenset[str]) -> None:
        with self._mirror(programs) as mirror:
            for version in [one for one in self._held if one not in keep]:
                os.close(self._held.pop(version))
                self._ready.pop(version, None)
            for version in {path.name[:40] for path in self.home.iterdir() if is_sha(path.name[:40])} - keep:
                self._remove_unless_used(version)
            mirror.tidy()

    def _remove_unless_used(self, version: str) -> None:
        mark = self.home / f"{version}.in-use"
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        else:
            for directory in (self.home / version, self.home / f"{version}{LIBRARIES_SUFFIX}"):
                checkout.remove(directory)
            mark.unlink()
        finally:
            os.close(descriptor)

    def _hold(self, version: str) -> None:
        """Lock *version* against removal, until this process ends or prunes it."""
        if version not in self._held:
            mark = self.home / f"{version}.in-use"
            self._held[version] = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._held[version], fcntl.LOCK_SH)

    @contextmanager
    def _mirror(self, programs: SubprocessRunner) -> Iterator[GitMirror]:
        """The local copy of the repository, with the lock held."""
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
        programs.inherited = (descriptor,)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, file: Path, programs: SubprocessRunner) -> None:
    until = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if programs.over or time.monotonic() > until:
                raise CodeUnavailable(
                    str(file.parent), "another process holds its lock", remedy="find that process and end it"
                ) from None
            time.sleep(0.02)


def _release_locks(held: dict[str, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)
    held.clear()
