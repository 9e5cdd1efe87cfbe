"""References to a task's code, and the errors of invalid ones."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from flwr.serverapp import ServerApp

from fedbus.learning import task_code
from fedbus.learning.flower.task_code import load_server_app
from fedbus.learning.task_code import BadTask

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    modules, path = set(sys.modules), list(sys.path)

    def write_file(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path

    yield write_file
    for name in set(sys.modules) - modules:
        if name.startswith("zoo"):
            del sys.modules[name]
    sys.path[:] = path


def test_a_reference_resolves_to_the_named_object(write: Write) -> None:
    path = write(
        "zoo_a/server.py", "from flwr.serverapp import ServerApp\napp = ServerApp()\nclass Box: app = app\n"
    )
    assert isinstance(load_server_app(path, "zoo_a.server:app"), ServerApp)
    assert isinstance(load_server_app(path, "zoo_a.server:Box.app"), ServerApp)


def test_a_missing_name_is_reported_with_suggestions(write: Write) -> None:
    path = write("zoo_b.py", "import os\ndef build_model(): ...\ndef predict(): ...\n")
    with pytest.raises(BadTask) as error:
        task_code.load_function(path, "zoo_b:build_modle")
    expected = f"{path / 'zoo_b.py'} has no 'build_modle', which 'zoo_b:build_modle' names; it has build_model, predict"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("reference", "text", "reason"),
    [
        ("zoo_c", "", "'zoo_c' is not a valid reference. Write module:name"),
        ("zoo_none:app", "", "has no module 'zoo_none': zoo_none.py does not exist"),
        ("zoo_c:app", "import no_such_library", "imports 'no_such_library', which is not installed"),
        ("zoo_c:app", "def app(:", "cannot be imported: SyntaxError"),
        ("zoo_c:app", "1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("zoo_c:app", "app = 5", "'zoo_c:app' is of type int, expected ServerApp"),
    ],
)
def test_an_error_is_one_line(write: Write, reference: str, text: str, reason: str) -> None:
    path = write("zoo_c.py", text)
    with pytest.raises(BadTask) as error:
        load_server_app(path, reference)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_task_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadTask, match="no task at"):
        task_code.load(tmp_path / "nowhere", "a:b")


def test_a_value_that_is_not_callable_is_rejected(write: Write) -> None:
    with pytest.raises(BadTask, match="is of type int, which is not callable"):
        task_code.load_function(write("zoo_d.py", "model = 5"), "zoo_d:model")


def test_each_version_loads_its_own_modules(write: Write, tmp_path: Path) -> None:
    write("v1/zoo_e.py", "from zoo_f import n")
    write("v1/zoo_f.py", "n = 1")
    write("v2/zoo_e.py", "from zoo_f import n")
    write("v2/zoo_f.py", "n = 2")
    assert [task_code.load(tmp_path / version, "zoo_e:n") for version in ("v1", "v2", "v1")] == [1, 2, 1]


def test_several_threads_may_load_a_new_task_at_the_same_time(write: Write, tmp_path: Path) -> None:
    for number in range(30):
        write(f"{number}/zoo_t/__init__.py", "")
        write(f"{number}/zoo_t/model.py", f"def build(): return {number}\n")
        barrier = Barrier(4)

        def build(number: int = number, barrier: Barrier = barrier) -> object:
            barrier.wait()
            return task_code.load_function(tmp_path / str(number), "zoo_t.model:build")()

        with ThreadPoolExecutor(4) as threads:
            assert {future.result() for future in [threads.submit(build) for _ in range(4)]} == {number}


def test_each_version_loads_its_own_libraries(write: Write, tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        write(f"{version}/zoo_g.py", "from zoo_library import n")
        write(f"{version}.libs/zoo_library.py", f"n = {version!r}")
    assert [task_code.load(tmp_path / version, "zoo_g:n") for version in ("v1", "v2", "v1")] == [
        "v1",
        "v2",
        "v1",
    ]


def test_a_library_of_the_machine_precedes_one_of_the_task(write: Write, tmp_path: Path) -> None:
    write("v1/zoo_h.py", "from this_machine import n")
    write("v1.libs/this_machine.py", "n = 'installed'")
    write("machine/this_machine.py", "n = 'here'")
    sys.path.append(str(tmp_path / "machine"))
    assert task_code.load(tmp_path / "v1", "zoo_h:n") == "here"
    del sys.modules["this_machine"]
