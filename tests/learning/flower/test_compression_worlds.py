"""Compressed updates give the same model on the bus and in simulation, one by one and in partial sums."""

from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from learning.flower.bus_run import run_on_bus

from fedbus.learning.installed_libraries import open_library
from fedbus.simulation.settings import SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.tasks.task_directory import read_task

CLIENTS, ROUNDS = 4, 3
FLOWER = {
    "pyproject.toml": """
        [project]
        name = "flower-worlds"
        [tool.flwr.app.components]
        serverapp = "flower_worlds:server"
        clientapp = "flower_worlds:client"
        [tool.fedbus]
        task = "worlds"
        compression = "int8"
    """,
    "flower_worlds.py": """
        import numpy as np
        from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
        from flwr.serverapp.strategy import FedAvg

        client, server = ClientApp(), ServerApp()

        @client.train()
        def train(message, context):
            number = context.node_config["partition-id"]
            step = np.random.default_rng(number).normal(size=(30, 20)).astype(np.float32)
            array = Array(message.content["arrays"]["w"].numpy() + step)
            metrics = MetricRecord({"num-examples": 1 + number})
            return Message(RecordDict({"arrays": ArrayRecord({"w": array}), "metrics": metrics}), reply_to=message)

        @server.main()
        def main(grid, context):
            initial = ArrayRecord({"w": Array(np.zeros((30, 20), np.float32))})
            FedAvg(fraction_evaluate=0.0).start(grid, initial, num_rounds=3)
    """,
}
FUNCTIONS = {
    "pyproject.toml": """
        [project]
        name = "functions-worlds"
        [tool.fedbus]
        task = "worlds"
        library = "functions"
        functions = "functions_worlds"
        compression = "int8"
    """,
    "functions_worlds.py": """
        import numpy as np

        def load(partition_id):
            return partition_id

        def initial(config):
            return {"w": np.zeros((30, 20), np.float32)}

        def train(weights, data, config):
            step = np.random.default_rng(data).normal(size=(30, 20)).astype(np.float32)
            return {"w": weights["w"] + step}, {}, 1 + data

        def evaluate(weights, data, config):
            return {}, 1
    """,
}


async def check_worlds(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).write_text(dedent(text))
    task = read_task(directory, open_library)
    bus = await run_on_bus(directory, clients=CLIENTS, rounds=ROUNDS, seed=1, deterministic=True)
    in_order = simulate(
        SimulationSettings(task=task, clients=CLIENTS, rounds=ROUNDS, workers=1, seed=1, deterministic=True)
    )
    in_sums = simulate(SimulationSettings(task=task, clients=CLIENTS, rounds=ROUNDS, workers=2, seed=1))
    np.testing.assert_array_equal(in_order.model["w"], bus.final["w"])
    np.testing.assert_allclose(in_sums.model["w"], bus.final["w"], atol=1e-5)

    weights = np.arange(1, CLIENTS + 1)
    steps = [np.random.default_rng(number).normal(size=(30, 20)) for number in range(CLIENTS)]
    exact = ROUNDS * np.average(steps, axis=0, weights=weights)
    error = np.abs(bus.final["w"] - exact).max()
    assert 1e-4 < error < 0.02  # the updates were compressed, and their errors fed back


async def test_a_flower_app_gives_the_same_model_in_both_worlds(tmp_path: Path) -> None:
    await check_worlds(tmp_path, FLOWER)


@pytest.mark.slow
async def test_functions_give_the_same_model_in_both_worlds(tmp_path: Path) -> None:
    await check_worlds(tmp_path, FUNCTIONS)
