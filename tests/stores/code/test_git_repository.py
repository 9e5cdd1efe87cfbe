"""Code repositories: the followed ref, names of commits, and the directory of each version."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.git_repositories import CommitSigner, Repository, create_repository
from support.ports import free_port
from support.waiting import eventually

from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    HistoryRewritten,
    InvalidCodeSource,
    open_code,
)
from fedbus.stores.tasks.task_directory import TaskInvalid, create_task, read_task

# --- a directory -----------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    create_task(tmp_path / "moons", "moons")
    return tmp_path / "moons"


async def test_a_directory_has_one_version(directory: Path, tmp_path: Path) -> None:
    code = open_code(str(directory), tmp_path / "home", open_library)
    version = await code.fetch_latest()
    assert await code.load_task(version) == read_task(directory, open_library)
    assert await code.resolve(version[:15]) == await code.resolve(version[7:20]) == version
    assert (code.can_update, code.requires_signatures, code.source) == (False, False, str(directory))
    assert await code.list_commits() == []


async def test_a_directory_keeps_the_version_of_its_first_read(directory: Path, tmp_path: Path) -> None:
    code = open_code(str(directory), tmp_path / "home", open_library)
    version = await code.fetch_latest()
    (directory / "notes.txt").write_text("later")
    assert await code.fetch_latest() == version


async def test_another_version_of_a_directory_is_rejected_with_advice(
    directory: Path, tmp_path: Path
) -> None:
    code = open_code(str(directory), tmp_path / "home", open_library)
    with pytest.raises(CodeRejected, match=r"one version; to follow new versions.*git\+https://"):
        await code.load_task("0" * 40)
    with pytest.raises(CodeRejected):
        await code.resolve("main")


async def test_a_missing_directory_is_not_a_task(tmp_path: Path) -> None:
    with pytest.raises(TaskInvalid, match="the directory does not exist"):
        await open_code(str(tmp_path / "nowhere"), tmp_path / "home", open_library).fetch_latest()


# --- a ref ---------------------------------------------------------------------------------------


async def test_the_latest_version_is_the_head_of_the_branch(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    assert await code.fetch_latest() == repository.head
    commit = repository.commit(by=ada)
    assert await code.fetch_latest() == commit
    assert code.can_update
    assert code.source == f"file://{repository.path} main"


async def test_another_branch_is_not_followed(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    main = repository.head
    repository.git("switch", "--quiet", "-c", "try")
    other = repository.commit(by=ada)
    assert await code.fetch_latest() == main
    with pytest.raises(CodeRejected, match="not in the history"):
        await code.load_task(other)
    with pytest.raises(CodeRejected, match="not in the history of"):
        await code.resolve("try")


async def test_without_a_ref_the_default_branch_is_followed(repository: Repository, tmp_path: Path) -> None:
    repository.git("branch", "--quiet", "-m", "main", "trunk")
    assert await open_code(repository.url, tmp_path / "home", open_library).fetch_latest() == repository.head


@pytest.mark.parametrize("annotated", [True, False])
async def test_a_tag_can_be_followed(repository: Repository, tmp_path: Path, annotated: bool) -> None:
    repository.git("tag", *(["-a", "-m", "the first"] if annotated else []), "v1.0")
    tagged = repository.head
    repository.commit()
    code = open_code(f"{repository.url}@v1.0", tmp_path / "home", open_library)
    assert await code.fetch_latest() == tagged
    assert (await code.load_task(tagged)).code_version == tagged


async def test_a_full_sha_never_moves(repository: Repository, tmp_path: Path) -> None:
    pinned = repository.head
    repository.commit()
    code = open_code(f"{repository.url}@{pinned}", tmp_path / "home", open_library)
    assert await code.fetch_latest() == pinned
    assert (await code.load_task(pinned)).code_version == pinned
    with pytest.raises(CodeRejected):
        await code.load_task(repository.head)


async def test_the_history_is_listed_newest_first(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    first = repository.head
    second = repository.commit(subject="A better \x1b[31mmodel", by=ada)
    commits = await code.list_commits()
    assert [commit.sha for commit in commits] == [second, first]
    assert commits[0].subject == "A better  [31mmodel"  # without control characters
    assert commits[0].author == "Ada"
    assert commits[0].committed_at.tzinfo is not None
    assert len(await code.list_commits(limit=1)) == 1


# --- names -----------------------------------------------------------------------------------------


async def test_a_commit_can_be_named_by_sha_tag_or_branch(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    first = repository.head
    repository.git("tag", "v1")
    last = repository.commit(by=ada)
    for name in (first, first[:8], "v1"):
        assert await code.resolve(name) == first
    assert await code.resolve("main") == last


@pytest.mark.parametrize("name", ["", "nothing", "-x", "*", "0" * 40, "abcd", "main..v1", "HEAD~1", "\n"])
async def test_a_name_without_a_commit_is_rejected(code: CodeRepository, name: str) -> None:
    with pytest.raises(CodeRejected):
        await code.resolve(name)


@pytest.mark.parametrize("version", ["main", "", "0" * 40, "0" * 39, "A" * 40, f"sha256:{'0' * 64}"])
async def test_a_version_is_a_full_sha_and_nothing_else(code: CodeRepository, version: str) -> None:
    with pytest.raises(CodeRejected):
        await code.load_task(version)


# --- a rewritten history -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["a person", "the server"])
async def test_a_rewritten_history_is_followed_only_on_request(
    code: CodeRepository, repository: Repository, ada: CommitSigner, by: str
) -> None:
    repository.commit(by=ada)
    old = await code.fetch_latest()
    repository.git("reset", "--quiet", "--hard", "HEAD~1")
    new = repository.commit(subject="another", by=ada)
    for _ in range(2):
        with pytest.raises(HistoryRewritten, match="was rewritten") as rewritten:
            await code.fetch_latest()
        assert (rewritten.value.old, rewritten.value.new) == (old, new)
    assert (await code.load_task(old)).code_version == old  # the old version can still be loaded
    assert [commit.sha for commit in await code.list_commits(limit=1)] == [old]
    if by == "a person":
        assert await code.resolve(new[:10]) == new
    else:
        assert (await code.load_task(new)).code_version == new
    assert await code.fetch_latest() == new
    assert [commit.sha for commit in await code.list_commits(limit=1)] == [new]


async def test_a_ref_that_is_reset_is_a_rewritten_history(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    last = repository.commit(by=ada)
    await code.fetch_latest()
    repository.git("reset", "--quiet", "--hard", "HEAD~1")
    with pytest.raises(HistoryRewritten):
        await code.fetch_latest()
    repository.git("reset", "--quiet", "--hard", last)
    assert await code.fetch_latest() == last


async def test_a_rewritten_history_is_noticed_after_a_restart(
    code: CodeRepository, repository: Repository, tmp_path: Path, ada: CommitSigner, signers: Path
) -> None:
    await code.fetch_latest()
    repository.git("checkout", "--quiet", "--orphan", "new")
    repository.commit(subject="new", by=ada)
    repository.git("branch", "--quiet", "-M", "main")
    reopened = open_code(f"{repository.url}@main", tmp_path / "home", open_library, signers=signers)
    with pytest.raises(HistoryRewritten):
        await reopened.fetch_latest()


async def test_a_known_full_sha_needs_no_fetch(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    first = repository.head
    repository.commit(by=ada)
    await code.fetch_latest()
    repository.path.rename(repository.path.with_name("unreachable"))
    assert await code.resolve(first) == first
    with pytest.raises(CodeUnavailable):
        await code.resolve("f" * 40)


# --- an unavailable repository -------------------------------------------------------------------------


async def test_an_unavailable_repository_has_no_effect(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    version = await code.fetch_latest()
    await code.load_task(version)
    unreachable = repository.path.with_name("unreachable")
    repository.path.rename(unreachable)
    with pytest.raises(CodeUnavailable, match="cannot use file://"):
        await code.fetch_latest()
    with pytest.raises(CodeUnavailable):
        await code.load_task("0" * 40)
    assert (await code.load_task(version)).code_version == version
    assert [commit.sha for commit in await code.list_commits()] == [version]
    unreachable.rename(repository.path)
    assert await code.fetch_latest() == version


async def test_a_loaded_version_needs_no_repository(
    code: CodeRepository, repository: Repository, tmp_path: Path, signers: Path
) -> None:
    version = await code.fetch_latest()
    await code.load_task(version)
    repository.path.rename(tmp_path / "unreachable")
    reopened = open_code(f"{repository.url}@main", tmp_path / "home", open_library, signers=signers)
    assert (await reopened.load_task(version)).code_version == version


async def test_a_deleted_ref_is_reported(code: CodeRepository, repository: Repository) -> None:
    await code.fetch_latest()
    repository.git("branch", "--quiet", "-m", "main", "renamed")
    with pytest.raises(CodeUnavailable, match="no branch or tag main; create it there"):
        await code.fetch_latest()


async def test_a_dead_server_is_an_unavailable_repository(
    repository: Repository, tmp_path: Path, signers: Path
) -> None:
    with git_daemon(tmp_path) as (address, kill):
        code = open_code(f"git+{address}/origin@main", tmp_path / "home", open_library, signers=signers)
        await eventually(lambda: is_reachable(code))
        kill()
        with pytest.raises(CodeUnavailable):
            await code.fetch_latest()


async def is_reachable(code: CodeRepository) -> bool:
    try:
        return bool(await code.fetch_latest())
    except CodeUnavailable:
        return False


@contextmanager
def git_daemon(base: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Run ``git daemon`` for the repositories in *base*. Yields its address and a function that kills it."""
    port = free_port()
    options = ["--export-all", f"--base-path={base}", "--listen=127.0.0.1", f"--port={port}", "--reuseaddr"]
    server = subprocess.Popen(["git", "daemon", *options], start_new_session=True)

    def kill() -> None:
        if server.returncode is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    try:
        yield f"git://127.0.0.1:{port}", kill
    finally:
        kill()


# --- a version as a directory ------------------------------------------------------------------------------


async def test_each_version_is_a_task_in_its_own_directory(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    first = await code.fetch_latest()
    module = (repository.path / "moons_app" / "task.py").read_text()
    second = repository.commit({"moons_app/task.py": f"{module}\nADDED = 1\n"}, by=ada)
    before, after = await code.load_task(first), await code.load_task(second)
    assert (before.code_version, after.code_version) == (first, second)
    assert (Path(before.path) / "moons_app" / "task.py").read_text() == module
    assert "ADDED" in (Path(after.path) / "moons_app" / "task.py").read_text()
    assert before.id == after.id == "moons"
    assert await code.load_task(first) == before


async def test_a_task_can_be_in_a_subdirectory(tmp_path: Path) -> None:
    repository = create_repository(tmp_path / "origin", below="tasks/moons")
    repository.commit({"elsewhere.txt": "not part of the task"})
    code = open_code(f"{repository.url}#subdirectory=tasks/moons", tmp_path / "home", open_library)
    task = await code.load_task(await code.fetch_latest())
    assert visible_names(task.path) == {"README.md", "moons_app", "pyproject.toml"}
    other = open_code(f"{repository.url}#subdirectory=tasks/others", tmp_path / "home", open_library)
    with pytest.raises(CodeRejected, match="no directory tasks/others"):
        await other.load_task(repository.head)


def visible_names(directory: str) -> set[str]:
    return {path.name for path in Path(directory).iterdir() if not path.name.startswith(".")}


async def test_files_are_written_as_committed(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    (repository.path / "run.sh").write_text("#!/bin/sh\n")
    (repository.path / "run.sh").chmod(0o755)
    (repository.path / "große Datei.bin").write_bytes(bytes(range(256)) * 9000)
    (repository.path / "link").symlink_to("moons_app/task.py")
    (repository.path / "crlf.txt").write_bytes(b"one\r\ntwo\n")
    repository.commit(by=ada)
    path = Path((await code.load_task(await code.fetch_latest())).path)
    assert os.access(path / "run.sh", os.X_OK)
    assert (path / "große Datei.bin").read_bytes() == bytes(range(256)) * 9000
    assert (path / "link").readlink() == Path("moons_app/task.py")
    assert (path / "crlf.txt").read_bytes() == b"one\r\ntwo\n"
    assert (path / "crlf.txt").stat().st_mode & 0o222 == 0


async def test_an_invalid_task_is_rejected(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    text = (repository.path / "pyproject.toml").read_text()
    repository.commit({"pyproject.toml": text.replace("quorum = 2", "qorum = 2")}, by=ada)
    with pytest.raises(CodeRejected, match=r"pyproject.toml:\d+: unknown key `qorum`") as rejected:
        await code.load_task(await code.fetch_latest())
    assert "\n" not in str(rejected.value)
    repository.commit({"pyproject.toml": text, "moons_app/task.py": "def broken("}, by=ada)
    with pytest.raises(CodeRejected, match=r"moons_app/task.py:1: is not Python"):
        await code.load_task(await code.fetch_latest())
    fixed = repository.git("rev-parse", "HEAD~2")
    assert (await code.load_task(fixed)).code_version == fixed


async def test_the_version_does_not_depend_on_an_outer_repository(
    repository: Repository, tmp_path: Path
) -> None:
    outer = create_repository(tmp_path / "outer")
    code = open_code(repository.url, outer.path / ".fedbus", open_library)
    version = await code.fetch_latest()
    assert (await code.load_task(version)).code_version == version


async def test_a_home_that_cannot_be_written_is_unavailable(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(CodeUnavailable, match="use a writable directory"):
        await open_code(repository.url, tmp_path / "home", open_library).fetch_latest()


# --- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "source"),
    [
        (
            "git+https://host/org/repo@main#subdirectory=examples/mnist",
            "https://host/org/repo main examples/mnist/",
        ),
        ("git+https://host:8443/org/repo.git", "https://host:8443/org/repo.git HEAD"),
        ("git+ssh://git@host/org/repo.git@feature/x-1.0", "ssh://git@host/org/repo.git feature/x-1.0"),
        ("git+ssh://git@host/org/repo.git", "ssh://git@host/org/repo.git HEAD"),
        ("git+file:///srv/git/a b.git@v1", "file:///srv/git/a b.git v1"),
    ],
)
def test_an_address_has_the_format_of_pip(where: str, source: str, tmp_path: Path) -> None:
    assert open_code(where, tmp_path, open_library).source == source


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("https://host/org/repo", r"write git\+https://"),
        ("git+ext::sh -c id", "unknown scheme"),
        ("git+ext://sh", "unknown scheme"),
        ("git+ftp://host/repo", "unknown scheme"),
        ("git+http://host/repo", r"does not authenticate the server; use git\+https://"),
        ("git+https://user:secret@host/repo", "must not hold credentials"),
        ("git+https://token@host/repo", "must not hold credentials"),
        ("git+ssh://git:secret@host/repo", "must not hold credentials"),
        ("git+ssh://-oProxyCommand=id/repo", "invalid host"),
        ("git+ssh://-l@host/repo", "invalid user name"),
        ("git+https:///repo", "invalid host"),
        ("git+https://host", "names no repository"),
        ("git+https://host:port/repo", "invalid address"),
        ("git+file://host/repo", "three slashes"),
        ("git+https://host/repo?x=1", "must not have a query"),
        ("git+https://host/repo@", "invalid branch or tag"),
        ("git+https://host/repo@-x", "invalid branch or tag"),
        ("git+https://host/repo@a..b", "invalid branch or tag"),
        ("git+https://host/repo@a:b", "invalid branch or tag"),
        ("git+https://host/repo@main#egg=x", "write #subdirectory="),
        ("git+https://host/repo@main#subdirectory=../x", "not a directory inside"),
        ("git+https://host/repo@main#subdirectory=", "not a directory inside"),
        ("git+https://host/repo@main#subdirectory=a/.git", "not a directory inside"),
    ],
)
def test_an_invalid_address_is_rejected_without_secrets(where: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidCodeSource, match=reason) as error:
        open_code(where, tmp_path, open_library)
    assert "secret" not in str(error.value)
    assert "token" not in str(error.value)


def test_each_address_has_its_own_directory(tmp_path: Path) -> None:
    from fedbus.stores.code.address import parse_address  # noqa: PLC0415

    keys = {
        parse_address(f"git+https://host/org/repo{rest}", signed=False).directory_name
        for rest in ("", "@main", "@next", "#subdirectory=a", "#subdirectory=b")
    }
    assert len(keys) == 5
    assert all(key.startswith("repo-") for key in keys)
