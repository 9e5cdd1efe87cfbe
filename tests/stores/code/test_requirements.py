"""Packages that a task requires: present, installed if the device allows it, or rejected."""

from collections.abc import Collection
from pathlib import Path

import pytest
from support.git_repositories import Repository
from support.wheels import build_wheel, restrict_pip_to

from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRejected, open_code


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only package index that pip uses."""
    restrict_pip_to(tmp_path / "index", monkeypatch)
    return tmp_path / "index"


async def prepare_code(repository: Repository, *requirements: str, allowed: Collection[str] = ()) -> Task:
    """Commit *requirements*, and load the task."""
    version = commit_requirements(repository, *requirements)
    return await open_code(
        repository.url, repository.path.parent / "home", open_library, allow_install=allowed
    ).load_task(version)


def commit_requirements(repository: Repository, *requirements: str) -> str:
    text = (repository.path / "pyproject.toml").read_text()
    table = f"\n[tool.fedbus.code]\ninstall = {list(requirements)!r}\n"
    return repository.commit({"pyproject.toml": text.partition(table)[0] + table})


async def test_a_present_package_is_not_installed(repository: Repository, index: Path) -> None:
    task = await prepare_code(repository, "numpy>=2", "pydantic", 'nonsense; python_version < "3"')
    assert task.libraries == ""


async def test_a_package_that_is_not_allowed_is_rejected_by_name(repository: Repository, index: Path) -> None:
    build_wheel(index, "moonlib", "1.0", "")
    with pytest.raises(
        CodeRejected, match="does not allow the installation of moonlib; allow it, or install it by hand"
    ):
        await prepare_code(repository, "moonlib>=1")


@pytest.mark.parametrize("allowed", [{"Moon_Lib"}, {"*"}])
async def test_an_allowed_package_is_installed_next_to_the_code(
    repository: Repository, index: Path, allowed: set[str]
) -> None:
    build_wheel(index, "moon_lib", "1.0", "old = True")
    build_wheel(index, "moon_lib", "1.2", "phase = 'full'")
    task = await prepare_code(repository, "moon-lib>=1.1", allowed=allowed)
    assert task.libraries == f"{task.path}.libs"
    assert (Path(task.libraries) / "moon_lib.py").read_text() == "phase = 'full'"
    (index / "moon_lib-1.2-py3-none-any.whl").unlink()  # it is not installed again
    reopened = open_code(repository.url, repository.path.parent / "home", open_library, allow_install=allowed)
    assert await reopened.load_task(task.code_version) == task


async def test_dependencies_must_be_allowed_too(repository: Repository, index: Path) -> None:
    build_wheel(index, "moonlib", "1.0", "", requires=("tidelib>=1",))
    build_wheel(index, "tidelib", "1.0", "high = 1")
    with pytest.raises(CodeRejected, match="does not allow the installation of tidelib"):
        await prepare_code(repository, "moonlib", allowed=["moonlib"])
    task = await prepare_code(repository, "moonlib", allowed=["moonlib", "tidelib"])
    assert (Path(task.libraries) / "tidelib.py").exists()


async def test_a_package_of_the_machine_is_not_replaced(repository: Repository, index: Path) -> None:
    build_wheel(index, "numpy", "1.0", "")
    with pytest.raises(CodeRejected, match=r"needs numpy 1\.0, but this machine has 2\."):
        await prepare_code(repository, "numpy<2", allowed=["*"])


async def test_an_unknown_package_is_reported_with_the_text_of_pip(
    repository: Repository, index: Path
) -> None:
    with pytest.raises(CodeRejected, match="pip: No matching distribution found for moonlib"):
        await prepare_code(repository, "moonlib", allowed=["*"])


async def test_nothing_is_built_from_source(repository: Repository, index: Path) -> None:
    (index / "moonlib-1.0.tar.gz").write_bytes(b"its setup.py would be run")
    with pytest.raises(CodeRejected, match="No matching distribution"):
        await prepare_code(repository, "moonlib", allowed=["*"])


@pytest.mark.parametrize("requirement", ["--index-url=http://x", "a b", "x @ https://host/x.whl", "./here"])
async def test_an_invalid_requirement_is_rejected(
    repository: Repository, index: Path, requirement: str
) -> None:
    with pytest.raises(CodeRejected, match="is not a package requirement"):
        await prepare_code(repository, requirement, allowed=["*"])


async def test_a_missing_check_function_is_rejected(repository: Repository) -> None:
    text = (repository.path / "pyproject.toml").read_text()
    table = '\n[tool.fedbus.code]\ncheck = "moons_app.task:chekc"\n'
    version = repository.commit({"pyproject.toml": text + table})
    with pytest.raises(CodeRejected, match=r"check 'moons_app\.task:chekc' does not exist"):
        await open_code(repository.url, repository.path.parent / "home", open_library).load_task(version)
