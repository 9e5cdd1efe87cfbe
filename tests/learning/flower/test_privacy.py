"""Flower's differential privacy and secure aggregation, on the bus and in simulation."""

from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from learning.flower.bus_run import run_on_bus

from fedbus.contracts.run import Scalar
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.weights import Arrays
from fedbus.simulation.settings import SimulationSettings
from fedbus.simulation.simulator import simulate
from fedbus.stores.tasks.task_directory import read_task

CLIENTS = 4
PYPROJECT = """
    [project]
    name = "privacy"

    [tool.flwr.app.components]
    serverapp = "{package}.apps:server"
    clientapp = "{package}.apps:client"

    [tool.flwr.app.config]
    secure = true
    fails = -1

    [tool.fedbus]
    task = "privacy"
"""
SECAGG = """
    import numpy as np
    from flwr.client import NumPyClient
    from flwr.client.mod import secaggplus_mod
    from flwr.clientapp import ClientApp
    from flwr.common import ndarrays_to_parameters
    from flwr.server import LegacyContext, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
    from flwr.serverapp import ServerApp

    class Client(NumPyClient):
        def __init__(self, context):
            self.number, self.config = context.node_config["partition-id"], context.run_config

        def fit(self, parameters, config):
            if self.number == self.config["fails"]:
                raise RuntimeError("the device is switched off")
            random = np.random.default_rng(self.number)
            return [array + random.normal(size=array.shape) for array in parameters], 10 + self.number, {}

    def secure(message, context, call_next):
        if not context.run_config["secure"]:
            return call_next(message, context)
        return secaggplus_mod(message, context, call_next)

    client = ClientApp(lambda context: Client(context).to_client(), mods=[secure])
    server = ServerApp()

    @server.main()
    def main(grid, context):
        initial = ndarrays_to_parameters([np.zeros((3, 4)), np.ones(2)])
        strategy = FedAvg(initial_parameters=initial, fraction_evaluate=0.0, min_fit_clients=4, min_available_clients=4)
        legacy = LegacyContext(context, config=ServerConfig(num_rounds=2), strategy=strategy)
        secagg = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.5, timeout=60.0)
        workflow = DefaultWorkflow(fit_workflow=secagg) if context.run_config["secure"] else DefaultWorkflow()
        workflow(grid, legacy)
"""
PRIVATE = """
    import numpy as np
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import fixedclipping_mod
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

    client = ClientApp(mods=[fixedclipping_mod])
    server = ServerApp()

    @client.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        arrays = {name: Array(array.numpy() + 1 + number) for name, array in message.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid, context):
        strategy = DifferentialPrivacyClientSideFixedClipping(
            FedAvg(fraction_evaluate=0.0), noise_multiplier=0.5, clipping_norm=1.0, num_sampled_clients=4
        )
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros((3, 4), np.float32))}), num_rounds=2)
"""


def write_app(directory: Path, package: str, code: str) -> Path:
    (directory / package).mkdir(parents=True)
    (directory / package / "__init__.py").touch()
    (directory / package / "apps.py").write_text(dedent(code))
    (directory / "pyproject.toml").write_text(dedent(PYPROJECT.format(package=package)))
    return directory


def run_simulated(app: Path, **config: Scalar) -> Arrays:
    task = read_task(app, open_library)
    return simulate(
        SimulationSettings(task=task, clients=CLIENTS, workers=1, seed=3, deterministic=True, config=config)
    ).model


async def test_secure_aggregation_gives_the_plain_mean(tmp_path: Path) -> None:
    app = write_app(tmp_path, "secagg_plain", SECAGG)
    for fails in (-1, 3):  # all clients; and one that drops out after it has shared its keys
        secure = await run_on_bus(app, clients=CLIENTS, rounds=2, config={"fails": fails})
        plain = await run_on_bus(app, clients=CLIENTS, rounds=2, config={"fails": fails, "secure": False})
        assert [sorted(one.failures) for one in secure.rounds[1:]] == [
            [] if fails < 0 else [f"client-000{fails}"]
        ] * 2
        for name, array in plain.final.items():
            np.testing.assert_allclose(secure.final[name], array, atol=1e-2)  # the step of the quantization


@pytest.mark.slow
async def test_secure_aggregation_with_a_dropout_runs_in_simulation(tmp_path: Path) -> None:
    app = write_app(tmp_path, "secagg_simulated", SECAGG)
    plain = await run_on_bus(app, clients=CLIENTS, rounds=2, config={"fails": 3, "secure": False})
    simulated = run_simulated(app, fails=3)
    for name, array in plain.final.items():
        np.testing.assert_allclose(simulated[name], array, atol=1e-2)


async def test_noise_of_a_seed_is_the_same_on_the_bus_and_in_simulation(tmp_path: Path) -> None:
    app = write_app(tmp_path, "private", PRIVATE)
    run = await run_on_bus(app, clients=CLIENTS, rounds=2, seed=3, deterministic=True)
    simulated = run_simulated(app)
    np.testing.assert_array_equal(run.final["w"], simulated["w"])
    assert run.final["w"] == pytest.approx(2 / np.sqrt(12), abs=1.5)  # two updates of norm 1, and noise
    assert np.ptp(run.final["w"]) > 0.01
