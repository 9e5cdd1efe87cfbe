"""The example task of the demo, by training library."""

from pathlib import Path

import pytest

from fedbus.app.demo.examples import mnist_path, mnist_path_for
from fedbus.learning.installed_libraries import installed_libraries, open_library
from fedbus.stores.tasks.task_directory import read_task


@pytest.mark.parametrize("library", installed_libraries())
def test_each_installed_library_has_an_mnist_task(library: str, tmp_path: Path) -> None:
    task = read_task(mnist_path_for(library, tmp_path), open_library)
    assert task.table.library == library
    assert task.table.samples


def test_a_library_without_an_example_gets_a_copy_of_the_default_one(tmp_path: Path) -> None:
    copy = mnist_path_for("flower-superlink", tmp_path)
    changed = {
        path.relative_to(copy)
        for path in copy.rglob("*")
        if path.is_file() and path.read_bytes() != (mnist_path() / path.relative_to(copy)).read_bytes()
    }
    assert changed == {Path("pyproject.toml")}
