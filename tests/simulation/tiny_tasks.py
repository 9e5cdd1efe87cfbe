"""Tiny tasks for tests, without torch. The clients know their number, the partition id.

*train* adds ``number + 1`` to ``w``, three zeros of float32, on ``number + 1`` samples. It counts its messages in its
state. The key ``faults`` of the configuration makes clients fail: ``"3=raise,5=nan"``.
"""

from pathlib import Path
from uuid import uuid4

from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import read_task

FAULTS = """
import os, signal, time
import numpy as np

def fault_of(config, number):
    return dict(one.split("=") for one in config["faults"].split(",") if one).get(str(number), "")

def trained(w, number, fault):
    if fault == "raise":
        raise RuntimeError("no data")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "sleep":
        time.sleep(60)
    if fault == "nan":
        return np.full_like(w, np.nan)
    if fault == "shape":
        return np.zeros(5, np.float32)
    return w + np.float32(number + 1)
"""

FUNCTIONS = """
import numpy as np
from {package}.faults import fault_of, trained

def initial(config):
    return {{"w": np.zeros(3, np.float32)}}

def load(partition_id):
    return partition_id

def train(weights, number, config, state):
    state["count"] = state.get("count", 0) + 1
    w = trained(weights["w"], number, fault_of(config, number))
    return {{"w": w}}, {{"loss": 1 / (number + 1), "count": state["count"]}}, number + 1

def evaluate(weights, number, config):
    return {{"loss": float(weights["w"].mean())}}, 1
"""

SERVER_APP = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    initial = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    FedAvg().start(grid, initial, num_rounds=context.run_config["num-server-rounds"])
"""

CLIENT_APP = """
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from {package}.faults import fault_of, trained

app = ClientApp()

@app.train()
def train(message, context):
    number = context.node_config["partition-id"]
    state = context.state.setdefault("state", ConfigRecord({{"count": 0}}))
    state["count"] += 1
    w = trained(message.content["arrays"]["w"].numpy(), number, fault_of(context.run_config, number))
    metrics = {{"loss": 1 / (number + 1), "count": state["count"], "num-examples": number + 1}}
    content = {{"arrays": ArrayRecord({{"w": Array(w)}}), "metrics": MetricRecord(metrics)}}
    return Message(RecordDict(content), reply_to=message)

@app.evaluate()
def evaluate(message, context):
    w = message.content["arrays"]["w"].numpy()
    metrics = MetricRecord({{"loss": float(w.mean()), "num-examples": 1}})
    return Message(RecordDict({{"metrics": metrics}}), reply_to=message)
"""


def write_task(directory: Path, library: str) -> Task:
    """Write the task for *library* to *directory*, and read it."""
    package = f"tiny_{uuid4().hex[:8]}"
    (directory / package).mkdir(parents=True)
    files = {"__init__": "", "faults": FAULTS}
    if library == "functions":
        files["functions"] = FUNCTIONS.format(package=package)
        tables = (
            f'library = "functions"\nfunctions = "{package}.functions"\n[tool.fedbus.config]\nfaults = ""\n'
        )
    else:
        files |= {"server_app": SERVER_APP, "client_app": CLIENT_APP.format(package=package)}
        tables = (
            f'library = "{library}"\n[tool.flwr.app.components]\nserverapp = "{package}.server_app:app"\n'
            f'clientapp = "{package}.client_app:app"\n'
            '[tool.flwr.app.config]\nnum-server-rounds = 2\nfaults = ""\n'
        )
    for name, text in files.items():
        (directory / package / f"{name}.py").write_text(text)
    (directory / "pyproject.toml").write_text(
        f'[project]\nname = "tiny"\nversion = "1.0"\n[tool.fedbus]\ntask = "tiny"\n{tables}'
    )
    return read_task(directory, open_library)


def mean_step(*numbers: int) -> float:
    """The sum that a round of the clients *numbers* adds to each element of ``w``."""
    return sum((number + 1) ** 2 for number in numbers) / sum(number + 1 for number in numbers)
