"""`fedbus task validate --build`: a task is tried in a scratch directory, and nothing of it is left behind."""

from pathlib import Path

import pytest
from support.cli import FedbusCli

SERVER = """
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

def weights():
    return [np.zeros(3, np.float32)]

@app.main()
def main(grid, context):
    FedAvg(fraction_evaluate=0).start(grid, ArrayRecord(weights()), num_rounds=5)
    open("result.txt", "w").close()
"""
CLIENT = """
from pathlib import Path
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

Path("data.txt").read_text()
app = ClientApp()

@app.train()
def train(msg, context):
    (x,) = msg.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 10, "train_loss": float(x.sum())})
    return Message(RecordDict({"arrays": ArrayRecord([x + 1]), "metrics": metrics}), reply_to=msg)
"""
PYPROJECT = """
[project]
name = "plain-app"
version = "1.0.0"

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"

[tool.fedbus]
model = "server:weights"
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    directory = tmp_path / "task"
    directory.mkdir()
    for name, text in {
        "pyproject.toml": PYPROJECT,
        "server.py": SERVER,
        "client.py": CLIENT,
        "data.txt": "the app reads it by its relative name",
    }.items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture
def fedbus(tmp_path: Path) -> FedbusCli:
    return FedbusCli(tmp_path / "home")


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_a_task_is_tried_and_nothing_is_left_behind(task: Path, fedbus: FedbusCli) -> None:
    before = names_in(task)
    result = await fedbus("task", "validate", str(task), "--build", "--json")
    assert result.code == 0, result.err
    assert result.facts["problems"] == []
    assert result.facts["steps"][0] == "the code is imported, and its model is built"
    assert result.facts["steps"][1].startswith("a run of 1 round with 2 clients finished: train_loss 0")
    assert result.facts["steps"][2].startswith("no predictions yet: version 2 is not served: the task names")
    assert names_in(task) == before
    assert names_in(task.parent) == {"task"}


async def test_a_problem_of_a_trial_names_its_line(task: Path, fedbus: FedbusCli) -> None:
    (task / "server.py").write_text(SERVER.replace("[np.zeros(3, np.float32)]", '{"a": None}["b"]'))
    result = await fedbus("task", "validate", str(task), "--build")
    assert result.code == 1
    line = SERVER.splitlines().index("    return [np.zeros(3, np.float32)]") + 1
    assert f"✗ server:weights did not build a model: KeyError: 'b' (server.py:{line})" in result.out
    assert "the task does not run. See the problem above" in result.err


@pytest.mark.slow
async def test_an_error_on_a_client_names_it_and_its_line(task: Path, fedbus: FedbusCli) -> None:
    (task / "client.py").write_text(CLIENT.replace("float(x.sum())", "float(x.total())"))
    result = await fedbus("task", "validate", str(task), "--build")
    line = CLIENT[: CLIENT.index("float(x.sum())")].count("\n") + 1
    assert result.code == 1
    assert "c1: " in result.out
    assert f"(client.py:{line})" in result.out
