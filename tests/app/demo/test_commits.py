"""The commits of `fedbus demo --commit`."""

import re
import shutil
from pathlib import Path

import pytest
from support.cli import FedbusCli
from support.federation import TINY_TASK

from fedbus.app.demo.commits import DemoCommits
from fedbus.app.demo.examples import mnist_path
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import open_code
from fedbus.stores.tasks.task_directory import read_task


def learning_rate(task: Path) -> float:
    found = re.search(
        r"^(?:lr|learning-rate)\s*=\s*(\S+)", (task / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert found
    return float(found[1])


async def test_each_commit_halves_the_learning_rate(tmp_path: Path) -> None:
    commits = DemoCommits(tmp_path / "home", read_task(mnist_path(), open_library))
    code = open_code(commits.source, tmp_path / "fetched", open_library, signers=commits.allowed_signers)
    before = learning_rate(Path((await code.load_task(await code.fetch_latest())).path))
    for number in (1, 2):
        commits.commit_change()
        assert await code.fetch_latest() == commits.shas[-1]
        task = await code.load_task(commits.shas[-1])
        assert learning_rate(Path(task.path)) == pytest.approx(before / 2**number)
        package = Path(task.path) / task.app["clientapp"].partition(":")[0].partition(".")[0] / "__init__.py"
        assert package.read_text().count("REVISION = ") == 1
        assert package.read_text().endswith(f"REVISION = {number + 1}\n")
    assert len(set(commits.shas)) == 2


async def test_an_app_of_one_module_gets_a_revision_line(
    tmp_path: Path,
) -> None:
    source = tmp_path / "one"
    shutil.copytree(TINY_TASK, source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tiny" / "client_app.py").rename(source / "alone.py")
    table = source / "pyproject.toml"
    table.write_text(table.read_text().replace("tiny.client_app:app", "alone:app"))
    commits = DemoCommits(tmp_path / "home", read_task(source, open_library))
    code = open_code(commits.source, tmp_path / "fetched", open_library, signers=commits.allowed_signers)
    task = await code.load_task(commits.commit_change())
    assert (Path(task.path) / "alone.py").read_text().endswith("\n\nREVISION = 2\n")


async def test_the_original_task_does_not_change(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(TINY_TASK, source, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    DemoCommits(tmp_path / "home", read_task(source, open_library)).commit_change()
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


async def test_without_git_the_error_is_one_line(tmp_path: Path) -> None:
    fedbus = FedbusCli(tmp_path / "home", PATH=str(tmp_path))
    result = await fedbus("demo", "--commit", "--task", str(TINY_TASK), "--clients", "1")
    assert result.code == 6
    assert result.err == "fedbus: cannot commit without git; install it, or omit --commit\n"
