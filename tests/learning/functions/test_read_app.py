"""A task of the library `functions` is checked without an import of its code."""

from pathlib import Path

import pytest

from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import create_task, read_task, validate_task

from .local_run import FUNCTIONS, PYPROJECT, LocalRun


def write(directory: Path, functions: str = FUNCTIONS, pyproject: str = PYPROJECT, extra: str = "") -> Path:
    (directory / "tiny_app").mkdir()
    (directory / "tiny_app" / "functions.py").write_text(functions)
    (directory / "pyproject.toml").write_text(pyproject.format(extra=extra))
    return directory


def test_a_task_is_read_without_its_code_being_imported(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("import numpy", "raise SystemExit\nimport numpy")
    task = read_task(
        write(tmp_path, functions, extra="[tool.fedbus.config]\noptimizer.lr = 0.1"), open_library
    )
    assert task.app == {
        name: f"tiny_app.functions:{name}" for name in ("load", "train", "evaluate", "initial")
    }
    assert task.run_config == {"optimizer.lr": 0.1}
    assert (task.app_rounds, task.plan_run().total_rounds, task.predict) == (3, 3, None)


def test_a_function_predict_serves(tmp_path: Path) -> None:
    functions = FUNCTIONS + "\ndef predict(weights, inputs):\n    return inputs\n"
    assert read_task(write(tmp_path, functions), open_library).predict == "tiny_app.functions:predict"


@pytest.mark.parametrize(
    ("old", "new", "extra", "problem"),
    [
        (
            "def train",
            "def trian",
            "",
            "tiny_app/functions.py:1: does not define `train`: did you mean `trian`?",
        ),
        (
            "weights, data, config):\n    weights",
            "weights, data):\n    weights",
            "",
            "functions.py:10: `train` cannot",
        ),
        (
            "",
            "",
            "[tool.fedbus.config]\nserver-round = 1",
            "pyproject.toml:10: `server-round` is set by fedbus: choose",
        ),
        ("", "", "[tool.fedbus.config]\nsizes = [1, 2]", "pyproject.toml:10: `sizes` has the type list"),
        (
            "def load",
            "def aggregate(weights, updates, config): return weights\n\ndef load",
            '[tool.fedbus.aggregation]\nstrategy = "krum"',
            "pyproject.toml:10: strategy 'krum' has no effect: the module defines `aggregate`: remove one",
        ),
        (
            "",
            "",
            "[tool.fedbus.contribution]\nevery = 1",
            "pyproject.toml:10: `every` has no effect with the library functions: remove it",
        ),
        (
            "",
            "",
            '[tool.fedbus.aggregation]\nstrategy = "fedmagic"',
            "pyproject.toml:10: invalid value 'fedmagic' of `strategy` in [tool.fedbus.aggregation]",
        ),
        (
            "",
            "",
            "[tool.fedbus.aggregation]\neta = 1.0",
            "`eta` has no effect: it belongs to strategy 'fedadam'",
        ),
    ],
)
def test_a_problem_names_file_line_and_advice(
    tmp_path: Path, old: str, new: str, extra: str, problem: str
) -> None:
    problems = validate_task(write(tmp_path, FUNCTIONS.replace(old, new, 1), extra=extra), open_library)
    assert len(problems) == 1
    assert problem in str(problems[0])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "pyproject.toml:5: [tool.fedbus] lacks `functions`: write the module"),
        (
            'functions = "tiny_app.missing"',
            "the module 'tiny_app.missing' does not exist: create tiny_app/missing.py",
        ),
        (
            'functions = "tiny_app.functions:train"',
            "functions 'tiny_app.functions:train' is not the name of a module",
        ),
        ("functions = 3", "functions 3 is not the name of a module"),
    ],
)
def test_a_module_that_is_not_there_is_a_problem(tmp_path: Path, line: str, problem: str) -> None:
    pyproject = PYPROJECT.replace('functions = "tiny_app.functions"', line)
    assert problem in "\n".join(map(str, validate_task(write(tmp_path, pyproject=pyproject), open_library)))


def test_keys_of_this_library_are_refused_for_flower(tmp_path: Path) -> None:
    create_task(tmp_path / "moons", "moons")
    pyproject = tmp_path / "moons" / "pyproject.toml"
    text = pyproject.read_text().replace("[tool.fedbus]\n", '[tool.fedbus]\nfunctions = "moons_app.task"\n')
    pyproject.write_text(
        text + '\n[tool.fedbus.config]\nlr = 0.1\n\n[tool.fedbus.aggregation]\nstrategy = "krum"\n'
    )
    problems = [str(problem) for problem in validate_task(tmp_path / "moons", open_library)]
    assert len(problems) == 3
    assert (
        '`functions` has no effect with the library flower: add library = "functions", or remove it'
        in problems[0]
    )
    assert "`config` has no effect with the library flower" in problems[1]
    assert "`strategy` has no effect with the library flower" in problems[2]


def test_a_new_task_is_valid_and_learns(tmp_path: Path) -> None:
    create_task(tmp_path / "circle", "circle", library="functions")
    assert validate_task(tmp_path / "circle", open_library) == []
    run = LocalRun(read_task(tmp_path / "circle", open_library), clients=3, rounds=8)
    assert run.metric("eval_accuracy")[-1] > 0.9
