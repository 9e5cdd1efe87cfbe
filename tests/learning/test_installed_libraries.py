"""The choice of a training library by its name."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedbus.contracts.task.app import LibraryUnusable
from fedbus.learning import installed_libraries as libraries
from fedbus.learning.installed_libraries import GROUP, installed_libraries, open_library
from fedbus.stores.tasks.task_directory import create_task, validate_task


class Minimal:
    """A library without a task."""


def point(name: str, value: str, package: str = "their-package") -> EntryPoint:
    entry = EntryPoint(name, value, GROUP)
    vars(entry)["dist"] = SimpleNamespace(name=package)
    return entry


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replace the installed libraries."""

    def replace(*points: EntryPoint) -> None:
        monkeypatch.setattr(libraries, "entry_points", lambda **_: list(points))
        open_library.cache_clear()

    yield replace
    open_library.cache_clear()


def test_the_libraries_of_fedbus_are_installed() -> None:
    assert {"flower", "functions", "flower-superlink"} <= set(installed_libraries())
    assert open_library("flower") is open_library("flower")


def test_a_library_of_another_package_is_opened_once(install: Any) -> None:
    install(point("theirs", f"{__name__}:Minimal"))
    assert type(open_library("theirs")).__name__ == "Minimal"
    assert open_library("theirs") is open_library("theirs")


def test_a_library_that_is_not_installed_lists_the_others(install: Any) -> None:
    install(point("theirs", "a:B"), point("ours", "a:B"))
    with pytest.raises(LibraryUnusable, match=r"'flowr' is not installed \(installed: ours, theirs\)"):
        open_library("flowr")
    install()
    with pytest.raises(LibraryUnusable, match="install fedbus again, since its package metadata is outdated"):
        open_library("flower")


def test_two_packages_with_one_library_are_named(install: Any) -> None:
    install(point("theirs", "a:B", "first"), point("theirs", "c:D", "second"))
    with pytest.raises(LibraryUnusable, match=r"more than one package provides .* 'theirs': first, second"):
        open_library("theirs")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            "no_such_module:Library",
            "cannot be imported: No module named 'no_such_module'. It needs no_such_module",
        ),
        (f"{__name__}:Missing", "cannot be loaded: AttributeError"),
        (f"{__name__}:point", "cannot be loaded: TypeError"),
    ],
)
def test_a_library_that_cannot_be_opened_names_its_package(install: Any, value: str, reason: str) -> None:
    install(point("theirs", value))
    with pytest.raises(LibraryUnusable) as caught:
        open_library("theirs")
    assert f"the training library 'theirs' ({value} of their-package) {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_library_is_a_problem_of_the_task_with_its_line(tmp_path: Path) -> None:
    create_task(tmp_path / "task", "moons")
    pyproject = tmp_path / "task" / "pyproject.toml"
    pyproject.write_text(
        pyproject.read_text().replace("[tool.fedbus]\n", '[tool.fedbus]\nlibrary = "flowr"\n')
    )
    (problem,) = validate_task(tmp_path / "task", open_library)
    assert pyproject.read_text().splitlines()[problem.line - 1] == 'library = "flowr"'
    assert "the training library 'flowr' is not installed" in problem.what


def test_agents_can_read_apps_without_importing_flower() -> None:
    program = (
        "import sys; from fedbus.learning.installed_libraries import installed_libraries, open_library\n"
        "for name in installed_libraries(): open_library(name)\n"
        "print([name for name in ('flwr', 'torch') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
