"""The demo repository, with real git and a real key."""

from pathlib import Path

import pytest

from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.demo_repository import CommitFailed, DemoRepository
from fedbus.stores.code.open import GitNotInstalled, open_code
from fedbus.stores.tasks.task_directory import create_task


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A task in a directory with files that do not belong into a repository."""
    path = tmp_path / "moons"
    create_task(path, "moons")
    (path / "__pycache__").mkdir()
    (path / "__pycache__" / "x.pyc").write_bytes(b"")
    return path


def tracked_files(repository: DemoRepository) -> set[str]:
    return set(repository._git("ls-files").splitlines())


async def test_a_demo_repository_is_followed_and_its_signatures_are_valid(
    tmp_path: Path, template: Path
) -> None:
    repository = DemoRepository.create(tmp_path / "task", template)
    code = open_code(repository.source, tmp_path / "home", open_library, signers=repository.allowed_signers)
    first = await code.fetch_latest()
    assert (await code.load_task(first)).id == "moons"
    table = (template / "pyproject.toml").read_text()
    second = repository.commit("A remark", {"pyproject.toml": f"{table}\n# a remark\n"})
    assert await code.fetch_latest() == second
    directory = Path((await code.load_task(second)).path)
    assert (directory / "pyproject.toml").read_text().endswith("# a remark\n")
    subjects = [commit.subject for commit in await code.list_commits()]
    assert subjects == ["A remark", "Add the task from moons"]


def test_caches_are_not_committed(tmp_path: Path, template: Path) -> None:
    names = tracked_files(DemoRepository.create(tmp_path / "task", template))
    assert "pyproject.toml" in names
    assert not any("__pycache__" in name for name in names)


def test_the_git_settings_of_the_user_have_no_effect(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = tmp_path / "gitconfig"
    hostile.write_text("[commit]\n\tgpgSign = true\n[core]\n\thooksPath = /nowhere\n[gpg]\n\tformat = x509\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(hostile))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
    repository = DemoRepository.create(tmp_path / "task", template)
    assert repository.commit("Add a note", {"note.txt": "x"}) == repository._git("rev-parse", "HEAD").strip()


def test_an_empty_commit_fails_with_the_text_of_git(tmp_path: Path, template: Path) -> None:
    repository = DemoRepository.create(tmp_path / "task", template)
    with pytest.raises(CommitFailed, match="nothing to commit"):
        repository.commit("Nothing")


def test_without_git_the_error_gives_advice(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GitNotInstalled, match="install it, or omit --commit"):
        DemoRepository.create(tmp_path / "task", template)
    assert not (tmp_path / "task").exists(), "no directory is created"
