"""`fedbus experiment` as a user calls it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.cli import CliResult, run_fedbus
from support.waiting import eventually

from fedbus.app.failures import ExitCode

PYPROJECT = """
[project]
name = "mean"
version = "1.0.0"

[tool.fedbus]
task = "mean"
library = "functions"
functions = "mean.functions"

[tool.fedbus.config]
step = 0.5
"""

FUNCTIONS = '''
"""Learns the mean of the clients' numbers: client k has the number k + 1."""

import numpy as np


def initial(config):
    return {"mean": np.zeros(1)}


def load(partition_id):
    return partition_id + 1.0


def train(weights, data, config):
    weights["mean"] += config["step"] * (data - weights["mean"])
    return weights, {"train_loss": float((data - weights["mean"][0]) ** 2)}, 1


def evaluate(weights, data, config):
    return {"eval_loss": float((data - weights["mean"][0]) ** 2)}, 1


def evaluate_global(weights, config):
    return {"loss": float((2 - weights["mean"][0]) ** 2)}
'''


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task whose loss after R rounds of step s is (2 · (1 - s)^R)² with three clients."""
    package = tmp_path / "task/mean"
    package.mkdir(parents=True)
    (tmp_path / "task/pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    (package / "functions.py").write_text(FUNCTIONS)
    return tmp_path / "task"


def environment(tmp_path: Path) -> Mapping[str, str]:
    return {"FEDBUS_HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "COLUMNS": "200"}


def run_experiment(tmp_path: Path, *arguments: str | Path) -> CliResult:
    return run_fedbus("experiment", *map(str, arguments), environment=environment(tmp_path))


def test_two_settings_are_compared_and_continued(tmp_path: Path, task: Path) -> None:
    command: list[str | Path] = [
        "compare",
        "step=0.5",
        "step=0.25",
        "--task",
        task,
        "--clients",
        "3",
        "--rounds",
        "2",
    ]
    command += ["--seeds", "1", "--metric", "loss", "--jobs", "1", "--out", tmp_path / "out"]
    shown = run_experiment(tmp_path, *command)
    assert shown.code == ExitCode.OK, shown
    assert "2 cells; computing time" in shown.out
    facts = json.loads((tmp_path / "out/results.json").read_text())
    losses = [cell["outcome"]["rounds"][-1]["loss"] for cell in facts["cells"]]
    assert losses == pytest.approx([0.25, (2 * 0.75**2) ** 2])
    assert facts["tables"][0]["rows"] == [["loss", "0.2500", "1.2656", "+1.0156"]]
    assert (tmp_path / "out/compare.png").is_file()

    (tmp_path / "out/cells/seed=1,side=B.json").write_text("damaged")
    again = run_experiment(tmp_path, *command)
    assert again.code == ExitCode.OK, again
    assert "side=B.json is not the result of a cell" in again.err
    assert "2 cells, 1 of them stored before" in again.out


def test_the_experiments_are_listed(tmp_path: Path) -> None:
    shown = run_experiment(tmp_path, "ls", "--json")
    assert [one["name"] for one in shown.facts] == [
        "delay",
        "heterogeneity",
        "devices",
        "continual",
        "compare A B",
    ]


def test_the_list_fits_into_80_columns(tmp_path: Path) -> None:
    shown = run_experiment(tmp_path, "ls")
    assert max(len(line.rstrip()) for line in shown.out.splitlines()) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("dealy",), ExitCode.USAGE, "No such command 'dealy'. Did you mean 'delay'?"),
        (("continual", "--data", "nothing"), ExitCode.NOT_FOUND, "needs the data of MNIST: the data folder"),
        (("compare", "fedavg", "foo"), ExitCode.USAGE, "'foo' is no strategy, mode or directory of a task"),
        (
            ("heterogeneity", "--algorithm", "foo"),
            ExitCode.USAGE,
            "unknown algorithm 'foo'. Choose from FedAvg, FedProx, SCAFFOLD, FedAdam",
        ),
        (("delay", "--out", "/proc/x"), ExitCode.MACHINE, "cannot write /proc/x"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, arguments: tuple[str, ...], code: ExitCode, message: str
) -> None:
    shown = run_experiment(tmp_path, *arguments)
    assert (shown.code, message in shown.err) == (code, True), shown
    assert "Traceback" not in shown.err


@pytest.mark.slow
async def test_ctrl_c_keeps_the_finished_cells(tmp_path: Path, task: Path) -> None:
    out = tmp_path / "out"
    command = ["experiment", "compare", "step=0.5", "step=0.25", "--task", str(task), "--seeds", "20"]
    process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [sys.executable, "-m", "fedbus", *command, "--out", str(out), "--jobs", "1"],
        env={**os.environ, **environment(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await eventually(lambda: any(out.glob("cells/*.json")), within_s=60)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == ExitCode.INTERRUPTED
    assert f"interrupted. The finished cells are in {out}; the same command continues" in error
    assert "Traceback" not in error
    assert list(out.glob("cells/*.json"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["continual", "heterogeneity", "devices", "delay"])
def test_each_experiment_has_a_quick_version(tmp_path: Path, name: str) -> None:
    data = os.environ.get("FEDBUS_DATA_DIR")
    if not data or not Path(data, "mnist").is_dir():
        pytest.skip("FEDBUS_DATA_DIR has no MNIST")
    shown = run_experiment(tmp_path, name, "--quick", "--data", data, "--out", tmp_path / "out")
    assert shown.code == ExitCode.OK, shown
    assert (tmp_path / "out/README.md").is_file()
    assert list((tmp_path / "out").glob("*.png"))
