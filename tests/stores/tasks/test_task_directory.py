"""Task directories: read as Flower does, checked without an import, and created."""

import os
import subprocess
from pathlib import Path

import pytest

from fedbus.contracts.identifiers import BadId
from fedbus.contracts.run import RunOverrides
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.errors import StoreError
from fedbus.stores.tasks.task_directory import (
    Problem,
    TaskInvalid,
    code_version,
    create_task,
    read_task,
    validate_task,
)

GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")


def git(directory: Path, *arguments: str) -> str:
    result = subprocess.run(
        [*GIT, "-C", str(directory), *arguments], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    create_task(tmp_path / "moons", "moons")
    return tmp_path / "moons"


@pytest.fixture
def task_repository(task: Path) -> Path:
    """The task in a clean Git repository."""
    git(task, "init", "-q")
    git(task, "add", ".")
    git(task, "commit", "-q", "-m", "the task")
    return task


def edit(file: Path, old: str, new: str) -> int:
    """Replace *old* by *new*, and return its line number."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return text[: text.index(old)].count("\n") + 1


def only_problem(task: Path) -> Problem:
    problems = validate_task(task, open_library)
    assert len(problems) == 1, problems
    assert "\n" not in str(problems[0])
    return problems[0]


# --- create and read ------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["moons", "my-task", "1st"])
def test_a_new_task_is_valid(tmp_path: Path, id: str) -> None:
    create_task(tmp_path / "new", id)
    assert validate_task(tmp_path / "new", open_library) == []
    assert read_task(tmp_path / "new", open_library).id == id


def test_a_new_task_does_not_overwrite_files(task: Path) -> None:
    with pytest.raises(StoreError, match="is not empty"):
        create_task(task, "other")


def test_a_new_task_needs_a_valid_id(tmp_path: Path) -> None:
    with pytest.raises(BadId):
        create_task(tmp_path / "new", "No Id")
    assert not (tmp_path / "new").exists()


def test_a_task_is_read_from_its_tables(task: Path) -> None:
    loaded = read_task(task, open_library)
    assert loaded.app == {
        "serverapp": "moons_app.server_app:app",
        "clientapp": "moons_app.client_app:app",
    }
    assert loaded.table.model == "moons_app.task:Net"
    assert loaded.plan_run().quorum == 2
    assert loaded.path == str(task)


def test_the_run_configuration_is_flattened_as_flower_does(task: Path) -> None:
    edit(task / "pyproject.toml", "lr = 0.1", "optimizer.lr = 0.1\noptimizer.name.short = 'sgd'")
    config = read_task(task, open_library).run_config
    assert config["optimizer.lr"] == 0.1
    assert config["optimizer.name.short"] == "sgd"


# --- problems ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "what", "advice"),
    [
        ("quorum = 2", "qorum = 2", "unknown key `qorum`", "did you mean `quorum`?"),
        ("every-s", "every", "unknown key `every` in [tool.fedbus.schedule]", "did you mean `every-s`?"),
        ("recruit-s = 60", "hue = 60", "unknown key `hue`", "known keys: task, library, model"),
        (
            "rounds = 3   ",
            "rounds = 0   ",
            "invalid value 0 of `rounds` in [tool.fedbus]",
            "greater than or equal to 1",
        ),
        ("rounds = 3   ", "rounds = 'x' ", "invalid value 'x'", "valid integer"),
        ("round-s = 600", "round-s = -1", "invalid value -1 of `round-s` in [tool.fedbus]", "greater than 0"),
        (
            'task = "moons"',
            'task = "a.b"',
            "invalid value 'a.b' of `task` in [tool.fedbus]",
            "lower-case letters",
        ),
        (
            "moons_app.task:Net",
            "moons_app.task.Net",
            "invalid value 'moons_app.task.Net'",
            "write module:name",
        ),
        (
            "moons_app.task:Net",
            "moons_app.tusk:Net",
            "model 'moons_app.tusk:Net' does not exist",
            "moons_app/tusk.py",
        ),
        (
            "moons_app.task:Net",
            "moons_app.task:Nett",
            "'moons_app.task:Nett' does not exist",
            "did you mean 'Net'?",
        ),
        ("moons_app.task:samples", "moons_app.task:probes", "does not exist", "task.py defines np, torch"),
        (
            "server_app:app",
            "server_app:main2",
            "serverapp 'moons_app.server_app:main2'",
            "did you mean 'main'?",
        ),
        ("client_app:app", "client_ap:app", "clientapp 'moons_app.client_ap:app'", "moons_app/client_ap.py"),
        (
            "clientapp = ",
            "clientap = ",
            "[tool.flwr.app.components] lacks `clientapp`",
            "instead of `clientap`",
        ),
        ("lr = 0.1", "lr = [0.1]", "`lr` has the type list", "use a number"),
    ],
)
def test_a_problem_has_its_line(task: Path, old: str, new: str, what: str, advice: str) -> None:
    line = edit(task / "pyproject.toml", old, new)
    problem = only_problem(task)
    assert what in problem.what
    assert advice in problem.advice
    assert problem.file == "pyproject.toml"
    if "lacks" not in problem.what:
        assert problem.line == line


def test_all_problems_are_reported_in_the_order_of_lines(task: Path) -> None:
    edit(task / "pyproject.toml", "quorum = 2", "qorum = 2")
    edit(task / "pyproject.toml", "server_app:app", "server_ap:app")
    problems = validate_task(task, open_library)
    assert [problem.line for problem in problems] == sorted(problem.line for problem in problems)
    with pytest.raises(TaskInvalid, match=r"pyproject\.toml:\d+: serverapp .* \(and 1 more\)$") as invalid:
        read_task(task, open_library)
    assert invalid.value.problems == problems


def test_a_missing_section_is_named(task: Path) -> None:
    edit(task / "pyproject.toml", "[tool.flwr.app.components]", "[tool.else]")
    assert any(
        "no section [tool.flwr.app.components]" in problem.what
        for problem in validate_task(task, open_library)
    )


def flower_app(directory: Path, name: str = 'name = "My_App 2.0"') -> Path:
    """Write a Flower app without a table of fedbus, as `flwr new` does."""
    package = directory / "my_app"
    package.mkdir(parents=True)
    for module in ("server_app", "client_app"):
        (package / f"{module}.py").write_text("app = None\n")
    (directory / "pyproject.toml").write_text(
        f"""
[project]
{name}
version = "1.0.0"

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "my_app.server_app:app"
clientapp = "my_app.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 5
"""
    )
    return directory


def test_an_app_without_a_table_of_fedbus_is_a_task(tmp_path: Path) -> None:
    loaded = read_task(flower_app(tmp_path), open_library)
    assert loaded.id == "my-app-2-0"
    assert loaded.table.model is None
    assert (loaded.plan_run().rounds, loaded.plan_run().total_rounds) == (0, 5)


def test_the_rounds_of_the_run_configuration_are_the_total(tmp_path: Path) -> None:
    loaded = read_task(flower_app(tmp_path), open_library)
    assert loaded.plan_run(RunOverrides(config={"num-server-rounds": 2})).total_rounds == 2
    assert loaded.plan_run(RunOverrides(config={"num-server-rounds": 2}, rounds=7)).total_rounds == 7


@pytest.mark.parametrize("value", ['"x"', '"-3"', "true", "2.5", "-1"])
def test_a_number_of_rounds_that_is_none_has_its_line(tmp_path: Path, value: str) -> None:
    line = edit(flower_app(tmp_path) / "pyproject.toml", "rounds = 5", f"rounds = {value}")
    problem = only_problem(tmp_path)
    assert (problem.file, problem.line) == ("pyproject.toml", line)
    assert "`num-server-rounds` is " in problem.what
    assert problem.advice == "use a whole number, for example 3"


@pytest.mark.parametrize("value", ['"5"', '" 5 "', "5.0"])
def test_an_app_may_convert_its_number_of_rounds(tmp_path: Path, value: str) -> None:
    edit(flower_app(tmp_path) / "pyproject.toml", "rounds = 5", f"rounds = {value}")
    assert read_task(tmp_path, open_library).plan_run().total_rounds == 5


def test_a_run_configuration_that_is_no_table_has_its_line(tmp_path: Path) -> None:
    file = flower_app(tmp_path) / "pyproject.toml"
    edit(file, "[tool.flwr.app.config]\nnum-server-rounds = 5\n", "")
    line = edit(file, 'publisher = "me"', 'config = "x"')
    problem = only_problem(tmp_path)
    assert (problem.line, problem.what) == (line, "tool.flwr.app.config is not a table")


def test_an_app_without_any_name_needs_one(tmp_path: Path) -> None:
    problem = only_problem(flower_app(tmp_path, name='name = "???"'))
    assert (problem.line, problem.advice) == (3, "set `name` in [project]")
    assert "no id" in problem.what


def test_invalid_toml_is_reported_with_its_line(task: Path) -> None:
    line = edit(task / "pyproject.toml", "quorum = 2", "quorum = ")
    assert (only_problem(task).line, only_problem(task).what) == (line, "cannot be read")


def test_a_directory_without_an_app_is_rejected(tmp_path: Path) -> None:
    assert "has none" in only_problem(tmp_path).what
    assert "the directory does not exist" in only_problem(tmp_path / "nowhere").what


def test_invalid_python_is_reported_with_its_line(task: Path) -> None:
    line = edit(task / "moons_app" / "server_app.py", "def evaluate_global(", "def evaluate_global[(")
    problem = only_problem(task)
    assert (problem.file, problem.line, problem.what) == ("moons_app/server_app.py", line, "is not Python")


def test_a_check_runs_no_code_of_the_task(task: Path) -> None:
    source = task / "moons_app" / "task.py"
    source.write_text(f"raise SystemExit('imported')\n{source.read_text()}")
    (task / "moons_app" / "__init__.py").write_text("raise SystemExit('imported')")
    assert validate_task(task, open_library) == []


@pytest.mark.parametrize(
    "definition",
    [
        "Other = object",
        "Other: type = object",
        "from collections import OrderedDict as Other",
        "try:\n    import torch\nexcept ImportError:\n    Other = None",
        "if True:\n    class Other: ...",
        "async def Other(): ...",
        "first, Other = 1, 2",
        "from somewhere import *",
    ],
)
def test_a_name_can_be_defined_in_any_way(task: Path, definition: str) -> None:
    (task / "moons_app" / "other.py").write_text(definition)
    edit(task / "pyproject.toml", "moons_app.task:Net", "moons_app.other:Other")
    assert validate_task(task, open_library) == []


def test_a_reference_can_name_a_package(task: Path) -> None:
    (task / "moons_app" / "__init__.py").write_text("class Net: ...")
    edit(task / "pyproject.toml", "moons_app.task:Net", "moons_app:Net")
    assert validate_task(task, open_library) == []


# --- code version ---------------------------------------------------------------------------------


def test_the_version_of_clean_code_is_its_commit(task_repository: Path) -> None:
    assert read_task(task_repository, open_library).code_version == git(task_repository, "rev-parse", "HEAD")


def test_the_version_of_a_task_in_a_subdirectory_is_the_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    create_task(tmp_path / "tasks" / "moons", "moons")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "the task")
    (tmp_path / "elsewhere.txt").write_text("changed, but not in the task")
    assert code_version(tmp_path / "tasks" / "moons") == git(tmp_path, "rev-parse", "HEAD")


@pytest.mark.parametrize("change", ["edited", "added", "removed", "staged"])
def test_the_version_of_changed_code_is_a_digest(task_repository: Path, change: str) -> None:
    module = task_repository / "moons_app" / "task.py"
    match change:
        case "edited":
            module.write_text(module.read_text() + "\n")
        case "added":
            (task_repository / "moons_app" / "new.py").write_text("")
        case "removed":
            module.unlink()
        case _:
            (task_repository / "moons_app" / "new.py").write_text("")
            git(task_repository, "add", ".")
    assert code_version(task_repository).startswith("sha256:")


def test_files_that_git_ignores_are_not_part_of_the_code(task_repository: Path) -> None:
    (task_repository / ".gitignore").write_text("*.log\n")
    git(task_repository, "add", ".")
    git(task_repository, "commit", "-q", "-m", "ignore logs")
    (task_repository / "train.log").write_text("noise")
    assert code_version(task_repository) == git(task_repository, "rev-parse", "HEAD")


def test_without_git_the_version_depends_on_the_files(task: Path) -> None:
    before = code_version(task)
    assert before.startswith("sha256:")
    (task / "moons_app" / "__pycache__").mkdir()
    (task / "moons_app" / "__pycache__" / "task.pyc").write_bytes(b"noise")
    assert code_version(task) == before
    edit(task / "moons_app" / "task.py", "Two numbers", "2 numbers")
    assert code_version(task) != before


def test_a_task_that_git_ignores_has_a_digest(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("moons/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "no task")
    create_task(tmp_path / "moons", "moons")
    before = code_version(tmp_path / "moons")
    assert before.startswith("sha256:")
    edit(tmp_path / "moons" / "moons_app" / "task.py", "Two numbers", "2 numbers")
    assert code_version(tmp_path / "moons") != before


def test_no_program_that_a_repository_configures_is_run(task_repository: Path) -> None:
    spy = task_repository.parent / "spy.sh"
    spy.write_text(f'#!/bin/sh\ntouch "{task_repository.parent}/run"\ncat\n')
    spy.chmod(0o755)
    (task_repository / ".gitattributes").write_text("*.py filter=spy\n")
    for key in (
        "core.fsmonitor",
        "filter.spy.clean",
        "filter.spy.smudge",
        "filter.spy.process",
        "core.pager",
    ):
        git(task_repository, "config", key, str(spy))
    module = task_repository / "moons_app" / "task.py"
    os.utime(module, (0, 0))  # git would read the file again, through the filter
    module.write_text(module.read_text() + "\n")
    assert code_version(task_repository).startswith("sha256:")
    assert not (task_repository.parent / "run").exists()


def test_git_variables_of_the_caller_have_no_effect(
    task_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = git(task_repository, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other.git"))
    assert code_version(task_repository) == expected


def test_an_invalid_expression_is_marked_with_a_caret(task: Path) -> None:
    pyproject = task / "pyproject.toml"
    text = pyproject.read_text()
    pyproject.write_text(text + '\n[tool.fedbus.eligibility]\nrule = "labelled >= 64 and bettery > 30"\n')
    (problem,) = validate_task(task, open_library)
    assert problem.line == len(text.splitlines()) + 3
    assert str(problem).splitlines()[1:] == ["    labelled >= 64 and bettery > 30", "    " + " " * 19 + "^"]
    assert "unknown variable 'bettery': did you mean battery?" in str(problem)

    pyproject.write_text(text + '\n[tool.fedbus.eligibility]\nrule = "labelled >= 64 and battery > 30"\n')
    assert read_task(task, open_library).table.eligibility.rule == "labelled >= 64 and battery > 30"
