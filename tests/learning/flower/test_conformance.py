"""Flower passes the suite of training libraries."""

from pathlib import Path

from fedbus.learning.conformance import FAILS, LibrarySuite

PYPROJECT = """
[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 3

[tool.fedbus]
model = "{package}.model:build"
"""

MODEL = """
import numpy as np

def build():
    return {"w": np.zeros(3, np.float32)}
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

CLIENT_APP = f"""
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    number = context.node_config["partition-id"]
    if number == {FAILS}:
        raise RuntimeError("no data")
    state = context.state.setdefault("state", ConfigRecord({{"count": 0}}))
    state["count"] += 1
    w = message.content["arrays"]["w"].numpy() + np.float32(number + 1)
    metrics = {{"loss": 1 / (number + 1), "count": state["count"], "num-examples": 30 if number == 0 else 10}}
    content = {{"arrays": ArrayRecord({{"w": Array(w)}}), "metrics": MetricRecord(metrics)}}
    return Message(RecordDict(content), reply_to=message)

@app.evaluate()
def evaluate(message, context):
    w = message.content["arrays"]["w"].numpy()
    metrics = MetricRecord({{"loss": 10 - float(w.mean()), "num-examples": 5}})
    return Message(RecordDict({{"metrics": metrics}}), reply_to=message)
"""


class TestFlower(LibrarySuite):
    library = "flower"

    def write_app(self, directory: Path, package: str) -> None:
        (directory / package).mkdir()
        (directory / "pyproject.toml").write_text(PYPROJECT.format(package=package))
        files = {"__init__": "", "model": MODEL, "server_app": SERVER_APP, "client_app": CLIENT_APP}
        for name, text in files.items():
            (directory / package / f"{name}.py").write_text(text)
