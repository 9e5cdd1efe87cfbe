"""Several at work in one directory of code, and what is killed, broken or edited there."""

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.git_repositories import CommitSigner, Repository
from support.waiting import eventually

from fedbus.contracts.task.task import Task
from fedbus.stores.code.open import CodeRejected, CodeRepository, GitCodeRepository, open_code

MODULE = "moons_app/task.py"

GET_READY = """
import asyncio, sys
from pathlib import Path
from fedbus.stores.code.open import open_code
where, home, version = sys.argv[1:]
print(asyncio.run(open_code(where, Path(home)).task_at(version)).path)
"""


@pytest.fixture
def code_url(repository: Repository) -> str:
    return f"{repository.url}@main"


@contextmanager
def run_other_process(code_url: str, home: Path, version: str) -> Iterator[subprocess.Popen[str]]:
    """A process that gets *version* ready, and prints where it is."""
    command = [sys.executable, "-c", GET_READY, code_url, str(home), version]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def home_of(code: CodeRepository) -> Path:
    assert isinstance(code, GitCodeRepository)
    return code.home


def many_files(number: int) -> dict[str, str]:
    return {f"data/{n}.txt": f"{n}\n" * 100 for n in range(number)}


def leftover_names(home: Path) -> set[str]:
    """The names in *home* that are neither a mirror nor a mark."""
    return {path.name for path in home.iterdir()} - {"mirror.git", "lock", "tip"}


# --- several at once ------------------------------------------------------------------------------


async def test_two_processes_get_the_same_version_ready_at_the_same_time(
    code_url: str, repository: Repository, tmp_path: Path
) -> None:
    version = repository.commit(many_files(300))
    with (
        run_other_process(code_url, tmp_path, version) as one,
        run_other_process(code_url, tmp_path, version) as other,
    ):
        here = await open_code(code_url, tmp_path).load_task(version)
        said = [await asyncio.to_thread(process.communicate) for process in (one, other)]
    assert [out for out, _ in said] == [f"{here.path}\n"] * 2
    assert len(listing(here)) > 300


async def test_agents_of_one_process_do_not_get_in_each_others_way(
    code_url: str, repository: Repository, tmp_path: Path
) -> None:
    versions = [repository.head, *(repository.commit({"n.txt": str(n)}) for n in range(3))]
    agents = [open_code(code_url, tmp_path) for _ in range(4)]
    tasks = await asyncio.gather(*(agent.load_task(one) for agent in agents for one in versions))
    assert [task.code_version for task in tasks] == versions * 4


async def test_whoever_waits_is_not_kept_waiting_by_a_server_that_says_nothing(
    repository: Repository, tmp_path: Path, signers: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        code = open_code(f"git+git://127.0.0.1:{port}/x@main", tmp_path / "home", signers=signers)
        waiting = asyncio.create_task(code.fetch_latest())
        await eventually(lambda: is_locked(home_of(code) / "lock"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await eventually(lambda: not is_locked(home_of(code) / "lock"))  # git has ended with it


def is_locked(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


# --- killed ------------------------------------------------------------------------------------------


async def test_whoever_is_killed_while_files_are_written_leaves_nothing_half(
    code_url: str, repository: Repository, tmp_path: Path
) -> None:
    version = repository.commit(many_files(3000))
    home = home_of(open_code(code_url, tmp_path))
    with run_other_process(code_url, tmp_path, version) as process:
        await eventually(lambda: any(home.glob(".making-*/data/1*.txt")))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (home / version).exists()
    task = await open_code(code_url, tmp_path).load_task(version)
    assert len(listing(task)) > 3000
    assert leftover_names(home) == {version, f"{version}.in-use"}


async def test_what_a_killed_git_leaves_behind_is_in_nobodys_way(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    await code.fetch_latest()
    refs = home_of(code) / "mirror.git" / "refs" / "fedbus"
    (refs / "seen.lock").write_text("")
    (home_of(code) / ".gone-x").mkdir()
    version = repository.commit(by=ada)
    assert await code.fetch_latest() == version
    assert leftover_names(home_of(code)) == set()


# --- edited ---------------------------------------------------------------------------------------------


def changed_in_place(task: Task, how: str) -> None:
    """What a person, or a program that ran there, may do to a version."""
    root = Path(task.path)
    module, package = root / MODULE, root / MODULE.split("/", maxsplit=1)[0]
    for path in (module, package, root):
        path.chmod(0o755)
    match how:
        case "edited":
            module.write_text("stolen = 1\n")
        case "removed":
            module.unlink()
        case "added":
            (root / "numpy.py").write_text("stolen = 1\n")
        case "link":
            module.unlink()
            module.symlink_to("/etc/passwd")
        case "link to a directory":
            (root / "numpy").symlink_to("/etc")
        case _:
            (package / "__pycache__").mkdir()
            (package / "__pycache__" / "task.cpython-311.pyc").write_bytes(b"stolen")


@pytest.mark.parametrize("how", ["edited", "removed", "added", "link", "link to a directory", "bytecode"])
async def test_a_version_that_was_changed_in_place_is_made_anew(
    code: CodeRepository, repository: Repository, code_url: str, tmp_path: Path, signers: Path, how: str
) -> None:
    task = await code.load_task(repository.head)
    before = listing(task)
    changed_in_place(task, how)
    assert listing(task) != before
    again = await open_code(code_url, tmp_path / "home", signers=signers).load_task(repository.head)
    assert again == task
    assert listing(again) == before


def listing(task: Task) -> dict[str, str]:
    """All files of a task, and what is in them."""
    root = Path(task.path)
    files = [path for path in root.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(root)): "link" if path.is_symlink() else path.read_text("latin-1")
        for path in files
    }


async def test_a_version_that_was_removed_comes_back(code: CodeRepository, repository: Repository) -> None:
    task = await code.load_task(repository.head)
    await code.prune([])
    assert not Path(task.path).exists()  # noqa: ASYNC240
    assert await code.load_task(repository.head) == task


# --- room ----------------------------------------------------------------------------------------------------


async def test_versions_that_nobody_needs_are_removed(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    new = repository.commit(by=ada)
    for version in (old, new):
        await code.load_task(version)
    await code.prune([new])
    assert leftover_names(home_of(code)) == {new, f"{new}.in-use"}


async def test_a_version_that_another_agent_uses_stays(
    code: CodeRepository, repository: Repository, code_url: str, tmp_path: Path, signers: Path
) -> None:
    version = repository.head
    other = open_code(code_url, tmp_path / "home", signers=signers)
    for one in (code, other):
        await one.load_task(version)
    await code.prune([])
    assert version in leftover_names(home_of(code))
    await other.prune([])
    assert leftover_names(home_of(code)) == set()


async def test_a_task_with_too_many_files_is_refused(
    code: CodeRepository, repository: Repository, ada: CommitSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.stores.code.checkout.MAX_SOURCE_FILES", 5)
    with pytest.raises(CodeRejected, match=r"too many files \(limit 5\); name the directory of the task"):
        await code.load_task(repository.head)


async def test_a_task_with_too_many_bytes_is_refused(
    code: CodeRepository, repository: Repository, ada: CommitSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.stores.code.checkout.MAX_BYTES", 100)
    with pytest.raises(CodeRejected, match="too large"):
        await code.load_task(repository.head)
    assert leftover_names(home_of(code)) == set()
