"""Concurrent use of one home of a code repository, and killed processes or edited files in it."""

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
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRejected, CodeRepository, GitCodeRepository, open_code

MODULE = "moons_app/task.py"

LOADS_TASK = """
import asyncio, sys
from pathlib import Path
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import open_code
where, home, version = sys.argv[1:]
print(asyncio.run(open_code(where, Path(home), open_library).load_task(version)).path)
"""


@pytest.fixture
def code_url(repository: Repository) -> str:
    return f"{repository.url}@main"


@contextmanager
def run_other_process(code_url: str, home: Path, version: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that loads *version* and prints its directory."""
    command = [sys.executable, "-c", LOADS_TASK, code_url, str(home), version]
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
    """Return the names in *home* without the mirror, the lock and the tip."""
    return {path.name for path in home.iterdir()} - {"mirror.git", "lock", "tip"}


# --- concurrent use -------------------------------------------------------------------------------


async def test_two_processes_can_load_the_same_version_at_once(
    code_url: str, repository: Repository, tmp_path: Path
) -> None:
    version = repository.commit(many_files(300))
    with (
        run_other_process(code_url, tmp_path, version) as first,
        run_other_process(code_url, tmp_path, version) as second,
    ):
        task = await open_code(code_url, tmp_path, open_library).load_task(version)
        outputs = [await asyncio.to_thread(process.communicate) for process in (first, second)]
    assert [stdout for stdout, _ in outputs] == [f"{task.path}\n"] * 2
    assert len(read_files(task)) > 300


async def test_agents_of_one_process_can_load_versions_concurrently(
    code_url: str, repository: Repository, tmp_path: Path
) -> None:
    versions = [repository.head, *(repository.commit({"n.txt": str(n)}) for n in range(3))]
    agents = [open_code(code_url, tmp_path, open_library) for _ in range(4)]
    tasks = await asyncio.gather(*(agent.load_task(version) for agent in agents for version in versions))
    assert [task.code_version for task in tasks] == versions * 4


async def test_a_fetch_from_a_silent_server_can_be_cancelled(
    repository: Repository, tmp_path: Path, signers: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        code = open_code(
            f"git+git://127.0.0.1:{port}/x@main", tmp_path / "home", open_library, signers=signers
        )
        fetch = asyncio.create_task(code.fetch_latest())
        await eventually(lambda: is_locked(home_of(code) / "lock"))
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        await eventually(lambda: not is_locked(home_of(code) / "lock"))  # git has ended too


def is_locked(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


# --- killed processes --------------------------------------------------------------------------------


async def test_a_killed_checkout_leaves_no_partial_version(
    code_url: str, repository: Repository, tmp_path: Path
) -> None:
    version = repository.commit(many_files(3000))
    home = home_of(open_code(code_url, tmp_path, open_library))
    with run_other_process(code_url, tmp_path, version) as process:
        await eventually(lambda: any(home.glob(".making-*/data/1*.txt")))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (home / version).exists()
    task = await open_code(code_url, tmp_path, open_library).load_task(version)
    assert len(read_files(task)) > 3000
    assert leftover_names(home) == {version, f"{version}.in-use"}


async def test_leftovers_of_a_killed_git_are_removed(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    await code.fetch_latest()
    refs = home_of(code) / "mirror.git" / "refs" / "fedbus"
    (refs / "seen.lock").write_text("")
    (home_of(code) / ".gone-x").mkdir()
    version = repository.commit(by=ada)
    assert await code.fetch_latest() == version
    assert leftover_names(home_of(code)) == set()


# --- edited files ---------------------------------------------------------------------------------------


def edit_version(task: Task, edit: str) -> None:
    """Change the files of a version, as a person or a program may do."""
    root = Path(task.path)
    module, package = root / MODULE, root / MODULE.split("/", maxsplit=1)[0]
    for path in (module, package, root):
        path.chmod(0o755)
    match edit:
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


@pytest.mark.parametrize("edit", ["edited", "removed", "added", "link", "link to a directory", "bytecode"])
async def test_an_edited_version_is_checked_out_again(
    code: CodeRepository, repository: Repository, code_url: str, tmp_path: Path, signers: Path, edit: str
) -> None:
    task = await code.load_task(repository.head)
    files_before = read_files(task)
    edit_version(task, edit)
    assert read_files(task) != files_before
    loaded = await open_code(code_url, tmp_path / "home", open_library, signers=signers).load_task(
        repository.head
    )
    assert loaded == task
    assert read_files(loaded) == files_before


def read_files(task: Task) -> dict[str, str]:
    """Return the content of all files of a task, by name."""
    root = Path(task.path)
    files = [path for path in root.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(root)): "link" if path.is_symlink() else path.read_text("latin-1")
        for path in files
    }


async def test_a_removed_version_can_be_loaded_again(code: CodeRepository, repository: Repository) -> None:
    task = await code.load_task(repository.head)
    await code.prune([])
    assert not Path(task.path).exists()  # noqa: ASYNC240
    assert await code.load_task(repository.head) == task


# --- cleanup -------------------------------------------------------------------------------------------------


async def test_unused_versions_are_removed(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    new = repository.commit(by=ada)
    for version in (old, new):
        await code.load_task(version)
    await code.prune([new])
    assert leftover_names(home_of(code)) == {new, f"{new}.in-use"}


async def test_a_version_that_another_agent_uses_is_kept(
    code: CodeRepository, repository: Repository, code_url: str, tmp_path: Path, signers: Path
) -> None:
    version = repository.head
    other = open_code(code_url, tmp_path / "home", open_library, signers=signers)
    for agent in (code, other):
        await agent.load_task(version)
    await code.prune([])
    assert version in leftover_names(home_of(code))
    await other.prune([])
    assert leftover_names(home_of(code)) == set()


async def test_a_task_with_too_many_files_is_rejected(
    code: CodeRepository, repository: Repository, ada: CommitSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.stores.code.checkout.MAX_SOURCE_FILES", 5)
    with pytest.raises(CodeRejected, match=r"too many files \(limit 5\); name the directory of the task"):
        await code.load_task(repository.head)


async def test_a_task_with_too_many_bytes_is_rejected(
    code: CodeRepository, repository: Repository, ada: CommitSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.stores.code.checkout.MAX_BYTES", 100)
    with pytest.raises(CodeRejected, match="too large"):
        await code.load_task(repository.head)
    assert leftover_names(home_of(code)) == set()
