"""Runs of apps without a torch model, without a result, and with a part of a model."""

import re
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import numpy as np
from support import NatsServer
from support.all_agents import run_all_agents, start_run
from support.federation import FederationHarness, open_federation

from fedbus.contracts.model import Manifest
from fedbus.contracts.run import RUN, RunData, RunState
from fedbus.learning import weights
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.models.open import open_model_store
from fedbus.stores.tasks.task_directory import read_task

HEAD = """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()
"""


@asynccontextmanager
async def federation_of(
    nats: NatsServer, directory: Path, name: str, code: str, table: str = ""
) -> AsyncIterator[FederationHarness]:
    """Run all agents of an app in the module *name*, with two clients that are ready."""
    app = directory / name
    app.mkdir()
    (app / f"{name}.py").write_text(HEAD + textwrap.dedent(code))
    (app / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\n{table}\n[tool.flwr.app.components]\n'
        f'serverapp = "{name}:server"\nclientapp = "{name}:client"\n'
    )
    async with (
        open_federation(nats.url, directory, task=read_task(app, open_library)) as fed,
        run_all_agents(fed),
    ):
        yield fed


async def run_once(fed: FederationHarness) -> RunData:
    """Run to the end, until both clients have the champion."""
    run, task = await start_run(fed), fed.config.task.id
    await fed.wait_until(lambda: fed.last_transition("run", run).target in RUN.final, f"the end of {run}", 60)
    end = fed.last_transition("run", run)
    assert end.target == RunState.FINISHED, end.reason
    await fed.wait_until(
        lambda: fed.view.do_all_serve_champion(task, 2), "both clients to have the champion", 60
    )
    assert isinstance(end.facts, RunData)
    return end.facts


async def read_version(fed: FederationHarness, version: int) -> tuple[Manifest, weights.Arrays]:
    store = open_model_store(fed.config.store_url, fed.config.task.id)
    manifest = await store.read_manifest(version)
    return manifest, weights.load(await store.local_path(manifest.sha256))


NUMPY_APP = """
@client.train()
def train(msg, context):
    (x,) = msg.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 10, "train_loss": float(x.sum())})
    return Message(RecordDict({"arrays": ArrayRecord([x + 1]), "metrics": metrics}), reply_to=msg)

@server.main()
def main(grid, context):
    FedAvg(fraction_evaluate=0).start(grid, ArrayRecord([np.zeros(3, np.float32)]), num_rounds=2)
"""


async def test_the_second_run_of_a_numpy_app_continues_from_the_first(
    nats: NatsServer, tmp_path: Path
) -> None:
    """There is no table of fedbus: the first version is empty, and no device serves; each trains."""
    async with federation_of(nats, tmp_path, "plain_app", NUMPY_APP) as fed:
        assert (await read_version(fed, 1))[1] == {}
        assert {one.not_served for one in fed.view.clients.values()} == {
            "version 1 is not served: it is empty. The first run of the task makes a model"
        }
        first = await run_once(fed)
        assert (first.plan.rounds, max(one.round for one in first.rounds)) == (0, 2)
        await run_once(fed)
        manifest, arrays = await read_version(fed, 3)
        assert manifest.rounds == 2
        assert [one.tolist() for one in arrays.values()] == [[4, 4, 4]]
        reasons = {one.not_served for one in fed.view.clients.values()}
        assert all(re.match("version 3 is not served: the task names neither", one) for one in reasons)


ANALYTICS_APP = """
@client.query()
def query(msg, context):
    value = 10.0 * (1 + int(context.node_config["partition-id"]))
    return Message(RecordDict({"sum": MetricRecord({"value": value})}), reply_to=msg)

@server.main()
def main(grid, context):
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    values = [reply.content["sum"]["value"] for reply in grid.send_and_receive(messages)]
    assert sorted(values) == [10.0, 20.0]
"""


async def test_a_run_without_a_model_makes_a_version_of_its_base(nats: NatsServer, tmp_path: Path) -> None:
    async with federation_of(nats, tmp_path, "analytics_app", ANALYTICS_APP) as fed:
        await run_once(fed)
        (base, _), (result, arrays) = await read_version(fed, 1), await read_version(fed, 2)
        assert (result.sha256, arrays) == (base.sha256, {})
        await run_once(fed)
        assert (await read_version(fed, 3))[0].parent == 2


PERSONALISED_APP = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.body(x))

@client.train()
def train(msg, context):
    state = msg.content["arrays"].to_torch_state_dict()
    arrays = ArrayRecord({name: tensor + 1 for name, tensor in state.items()})
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

@server.main()
def main(grid, context):
    FedAvg(fraction_evaluate=0).start(grid, ArrayRecord(Model().body.state_dict()), num_rounds=1)
"""


async def test_devices_serve_the_whole_model_of_which_a_part_is_trained(
    nats: NatsServer, tmp_path: Path
) -> None:
    table = '[tool.fedbus]\nmodel = "personal_app:Model"'
    async with federation_of(nats, tmp_path, "personal_app", PERSONALISED_APP, table) as fed:
        await run_once(fed)
        before, after = (await read_version(fed, 1))[1], (await read_version(fed, 2))[1]
        for name, array in after.items():
            np.testing.assert_allclose(
                array, before[name] + (1 if name.startswith("body.") else 0), rtol=1e-6
            )
        endpoint = next(one.endpoint for one in fed.view.clients.values())
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{endpoint}/predict", json={"inputs": [[1, 2]]}) as response,
        ):
            body = await response.json()
        hidden = after["body.weight"] @ [1, 2] + after["body.bias"]
        expected = after["head.weight"] @ hidden + after["head.bias"]
        assert body["model_version"] == 2
        np.testing.assert_allclose(body["outputs"], expected, rtol=1e-4)
