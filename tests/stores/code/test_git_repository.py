"""Code that is followed: what the ref points at, which commit a name means, and each version as a directory."""

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.git_repositories import CommitSigner, Repository, create_repository
from support.waiting import eventually

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


async def test_a_directory_is_one_version_of_its_own(directory: Path, tmp_path: Path) -> None:
    code = open_code(str(directory), tmp_path / "home")
    version = await code.fetch_latest()
    assert await code.load_task(version) == read_task(directory)
    assert await code.resolve(version[:15]) == await code.resolve(version[7:20]) == version
    assert (code.can_update, code.requires_signatures, code.source) == (False, False, str(directory))
    assert await code.list_commits() == []


async def test_a_directory_is_the_version_that_it_was_when_it_was_read(
    directory: Path, tmp_path: Path
) -> None:
    code = open_code(str(directory), tmp_path / "home")
    version = await code.fetch_latest()
    (directory / "notes.txt").write_text("later")
    assert await code.fetch_latest() == version


async def test_nothing_else_comes_from_a_directory_and_it_says_how_it_would(
    directory: Path, tmp_path: Path
) -> None:
    code = open_code(str(directory), tmp_path / "home")
    with pytest.raises(CodeRejected, match=r"one version; to follow new versions.*git\+https://"):
        await code.load_task("0" * 40)
    with pytest.raises(CodeRejected):
        await code.resolve("main")


async def test_a_directory_that_is_no_task_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(TaskInvalid, match="the directory does not exist"):
        await open_code(str(tmp_path / "nowhere"), tmp_path / "home").fetch_latest()


# --- a ref ---------------------------------------------------------------------------------------


async def test_the_newest_version_is_what_the_branch_points_at_now(
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


async def test_without_a_ref_the_repositorys_own_first_branch_is_followed(
    repository: Repository, tmp_path: Path
) -> None:
    repository.git("branch", "--quiet", "-m", "main", "trunk")
    assert await open_code(repository.url, tmp_path / "home").fetch_latest() == repository.head


@pytest.mark.parametrize("annotated", [True, False])
async def test_a_tag_may_be_followed(repository: Repository, tmp_path: Path, annotated: bool) -> None:
    repository.git("tag", *(["-a", "-m", "the first"] if annotated else []), "v1.0")
    tagged = repository.head
    repository.commit()
    code = open_code(f"{repository.url}@v1.0", tmp_path / "home")
    assert await code.fetch_latest() == tagged
    assert (await code.load_task(tagged)).code_version == tagged


async def test_a_whole_sha_never_moves(repository: Repository, tmp_path: Path) -> None:
    pinned = repository.head
    repository.commit()
    code = open_code(f"{repository.url}@{pinned}", tmp_path / "home")
    assert await code.fetch_latest() == pinned
    assert (await code.load_task(pinned)).code_version == pinned
    with pytest.raises(CodeRejected):
        await code.load_task(repository.head)


async def test_the_history_is_told_newest_first(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    first = repository.head
    second = repository.commit(subject="A better \x1b[31mmodel", by=ada)
    commits = await code.list_commits()
    assert [one.sha for one in commits] == [second, first]
    assert commits[0].subject == "A better  [31mmodel"  # what would steer a terminal is not passed on
    assert commits[0].author == "Ada"
    assert commits[0].committed_at.tzinfo is not None
    assert len(await code.list_commits(limit=1)) == 1


# --- names -----------------------------------------------------------------------------------------


async def test_a_commit_may_be_named_in_each_of_its_ways(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    first = repository.head
    repository.git("tag", "v1")
    last = repository.commit(by=ada)
    for name in (first, first[:8], "v1"):
        assert await code.resolve(name) == first
    assert await code.resolve("main") == last


@pytest.mark.parametrize("name", ["", "nothing", "-x", "*", "0" * 40, "abcd", "main..v1", "HEAD~1", "\n"])
async def test_a_name_that_means_no_commit_is_refused(code: CodeRepository, name: str) -> None:
    with pytest.raises(CodeRejected):
        await code.resolve(name)


@pytest.mark.parametrize("version", ["main", "", "0" * 40, "0" * 39, "A" * 40, f"sha256:{'0' * 64}"])
async def test_a_version_is_a_full_sha_and_nothing_else(code: CodeRepository, version: str) -> None:
    with pytest.raises(CodeRejected):
        await code.load_task(version)


# --- a history that is rewritten ---------------------------------------------------------------------


@pytest.mark.parametrize("by", ["a person", "the server"])
async def test_a_rewritten_history_is_not_followed_until_somebody_says_so(
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
    assert (await code.load_task(old)).code_version == old  # who is on it stays on it
    assert [one.sha for one in await code.list_commits(limit=1)] == [old]
    if by == "a person":
        assert await code.resolve(new[:10]) == new
    else:
        assert (await code.load_task(new)).code_version == new
    assert await code.fetch_latest() == new
    assert [one.sha for one in await code.list_commits(limit=1)] == [new]


async def test_a_ref_that_goes_back_is_a_rewritten_history_too(
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
    repository.git("checkout", "--quiet", "--orphan", "anew")
    repository.commit(subject="anew", by=ada)
    repository.git("branch", "--quiet", "-M", "main")
    again = open_code(f"{repository.url}@main", tmp_path / "home", signers=signers)
    with pytest.raises(HistoryRewritten):
        await again.fetch_latest()


async def test_a_full_sha_that_is_known_here_is_not_asked_for(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    first = repository.head
    repository.commit(by=ada)
    await code.fetch_latest()
    repository.path.rename(repository.path.with_name("away"))
    assert await code.resolve(first) == first
    with pytest.raises(CodeUnavailable):
        await code.resolve("f" * 40)


# --- a repository that is away -------------------------------------------------------------------------


async def test_a_repository_that_is_away_changes_nothing(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    version = await code.fetch_latest()
    await code.load_task(version)
    away = repository.path.with_name("away")
    repository.path.rename(away)
    with pytest.raises(CodeUnavailable, match="cannot use file://"):
        await code.fetch_latest()
    with pytest.raises(CodeUnavailable):
        await code.load_task("0" * 40)
    assert (await code.load_task(version)).code_version == version
    assert [one.sha for one in await code.list_commits()] == [version]
    away.rename(repository.path)
    assert await code.fetch_latest() == version


async def test_a_version_that_was_here_once_needs_no_repository(
    code: CodeRepository, repository: Repository, tmp_path: Path, signers: Path
) -> None:
    version = await code.fetch_latest()
    await code.load_task(version)
    repository.path.rename(tmp_path / "away")
    again = open_code(f"{repository.url}@main", tmp_path / "home", signers=signers)
    assert (await again.load_task(version)).code_version == version


async def test_a_ref_that_is_deleted_is_told_as_such(code: CodeRepository, repository: Repository) -> None:
    await code.fetch_latest()
    repository.git("branch", "--quiet", "-m", "main", "gone")
    with pytest.raises(CodeUnavailable, match="no branch or tag main; create it there"):
        await code.fetch_latest()


async def test_a_server_that_dies_is_a_repository_that_is_away(
    repository: Repository, tmp_path: Path, signers: Path
) -> None:
    with git_daemon(tmp_path) as (address, kill):
        code = open_code(f"git+{address}/origin@main", tmp_path / "home", signers=signers)
        await eventually(lambda: reachable(code))
        kill()
        with pytest.raises(CodeUnavailable):
            await code.fetch_latest()


async def reachable(code: CodeRepository) -> bool:
    try:
        return bool(await code.fetch_latest())
    except CodeUnavailable:
        return False


@contextmanager
def git_daemon(base: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Git's own server for the repositories in *base*: its address, and what kills it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


async def test_a_version_is_a_task_in_a_directory_of_its_own(
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


async def test_a_task_may_lie_deep_in_its_repository(tmp_path: Path) -> None:
    repository = create_repository(tmp_path / "origin", below="tasks/moons")
    repository.commit({"elsewhere.txt": "no part of the task"})
    code = open_code(f"{repository.url}#subdirectory=tasks/moons", tmp_path / "home")
    task = await code.load_task(await code.fetch_latest())
    assert visible(task.path) == {"README.md", "moons_app", "pyproject.toml"}
    other = open_code(f"{repository.url}#subdirectory=tasks/others", tmp_path / "home")
    with pytest.raises(CodeRejected, match="no directory tasks/others"):
        await other.load_task(repository.head)


def visible(directory: str) -> set[str]:
    return {path.name for path in Path(directory).iterdir() if not path.name.startswith(".")}


async def test_files_are_as_they_were_committed(
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


async def test_a_task_that_is_not_in_order_is_no_version(
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


async def test_a_version_is_not_recognised_by_a_repository_around_it(
    repository: Repository, tmp_path: Path
) -> None:
    around = create_repository(tmp_path / "around")
    code = open_code(repository.url, around.path / ".fedbus")
    version = await code.fetch_latest()
    assert (await code.load_task(version)).code_version == version


async def test_a_home_that_cannot_be_written_is_told(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(CodeUnavailable, match="use a writable directory"):
        await open_code(repository.url, tmp_path / "home").fetch_latest()


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
def test_an_address_is_written_as_for_pip(where: str, source: str, tmp_path: Path) -> None:
    assert open_code(where, tmp_path).source == source


@pytest.mark.parametrize(
    ("where", "said"),
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
def test_what_is_no_address_is_refused_and_no_secret_repeated(where: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidCodeSource, match=said) as refused:
        open_code(where, tmp_path)
    assert "secret" not in str(refused.value)
    assert "token" not in str(refused.value)


def test_each_address_has_a_directory_of_its_own(tmp_path: Path) -> None:
    from fedbus.stores.code.address import parse_address  # noqa: PLC0415

    keys = {
        parse_address(f"git+https://host/org/repo{rest}", signed=False).directory_name
        for rest in ("", "@main", "@next", "#subdirectory=a", "#subdirectory=b")
    }
    assert len(keys) == 5
    assert all(key.startswith("repo-") for key in keys)
