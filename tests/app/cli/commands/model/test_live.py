"""`fedbus model promote`, `rollback` and `init` with a real server manager and real devices."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support import NatsServer, eventually
from support.all_agents import (
    run_all_agents,
    run_client_side,
    run_server_side,
    served_versions,
    start_run,
    wait_for_run_end,
)
from support.cli import CliResult, FedbusCli
from support.federation import FED, TASK, FederationHarness, RunningAgent, open_federation
from support.prediction_load import send_predictions

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.server import GetServerInfo
from fedbus.learning import weights
from fedbus.stores.models.open import ModelStore, open_model_store


@dataclass
class LiveFederation:
    """A server and two clients after one run: version 2 is served, and its parent is version 1."""

    fed: FederationHarness
    agents: dict[str, dict[AgentName, RunningAgent]]
    fedbus: FedbusCli

    @property
    def store(self) -> ModelStore:
        return open_model_store(self.fed.config.store_url, TASK)

    async def model(self, *words: str) -> CliResult:
        return await self.fedbus("model", *words)


def make_cli(fed: FederationHarness, nats: NatsServer, directory: Path) -> FedbusCli:
    settings = {"FEDBUS_NATS_URL": nats.url, "FEDBUS_FEDERATION": FED, "FEDBUS_STORE": fed.config.store_url}
    return FedbusCli(directory / "person", **settings)


@pytest.fixture
async def fed(nats: NatsServer, tmp_path: Path) -> AsyncIterator[FederationHarness]:
    async with open_federation(nats.url, tmp_path) as fed:
        yield fed


@pytest.fixture
async def live(fed: FederationHarness, nats: NatsServer, tmp_path: Path) -> AsyncIterator[LiveFederation]:
    async with run_all_agents(fed) as agents:
        await wait_for_run_end(fed, await start_run(fed, quorum=2))
        yield LiveFederation(fed, agents, make_cli(fed, nats, tmp_path))


async def wait_until_served(live: LiveFederation, version: int) -> None:
    """Wait until the harness sees *version* on both devices; it follows them on a connection of its own."""
    await live.fed.wait_until(lambda: served_versions(live.fed) == {"c1": version, "c2": version})


async def test_promotions_list_the_devices_and_fail_no_prediction(
    live: LiveFederation,
) -> None:
    async with send_predictions(live.fed) as predictions:
        back = await live.model("rollback", "--reason", "version 2 was poisoned")
        assert back.code == 0, back.err
        assert back.out.splitlines() == [
            "promoted version 1; the previous champion is version 2",
            "serving it: c1, c2",
        ]
        await wait_until_served(live, 1)

        on = await live.model("promote", "v2", "--json")
        assert on.code == 0, on.err
        assert (on.facts["model"]["version"], on.facts["instead_of"]) == (2, 1)
        assert (on.facts["serving"], on.facts["not_yet"]) == (["c1", "c2"], [])
        await wait_until_served(live, 2)
    assert predictions.errors == []
    assert {1, 2} <= set(predictions.versions)
    rows = (await live.model("ls", "--json")).facts
    assert [(one["version"], one["standing"]) for one in rows] == [(2, "champion"), (1, "served before")]
    champion = await live.store.read_champion()
    assert champion is not None
    assert (champion.term, champion.reason) == (4, "promoted by hand")


async def test_a_disconnected_device_loads_the_version_later(
    live: LiveFederation,
) -> None:
    for agent in live.agents["c2"].values():
        await agent.kill()
    result = await live.model("rollback", "--wait", "2")
    assert result.code == 0, result.err
    assert result.out.splitlines()[1:] == [
        "serving it: c1",
        "not serving it yet: c2; disconnected devices load it when they reconnect",
    ]
    assert result.err.splitlines()[-1] == "1 of 2 devices serve version 1; waiting for c2"
    for agent in live.agents["c2"].values():
        agent.start()
    await live.fed.wait_until(lambda: served_versions(live.fed) == {"c1": 1, "c2": 1}, "c2 to take it over")


async def test_a_device_that_rejects_the_version_is_listed(live: LiveFederation) -> None:
    await start_run(live.fed, quorum=2, rounds=1, config={"poison": True})
    await live.fed.wait_for_event("server", "candidate_kept", within_s=60)
    result = await live.model("promote", "v3")
    assert result.code == 0, result.err
    assert [line.partition(":")[0] for line in result.out.splitlines()] == [
        "promoted version 3; the previous champion is version 2",
        "c1 rejected it",
        "c2 rejected it",
    ]
    rows = (await live.fedbus("clients", "ls", "--json")).facts
    assert {one["client"]: one["model_version"] for one in rows} == {"c1": 2, "c2": 2}


async def test_the_server_builds_a_new_lineage_and_the_devices_serve_it(live: LiveFederation) -> None:
    result = await live.model("init", "--new-lineage", "--reason", "begin again")
    assert result.code == 0, result.err
    assert result.out.splitlines() == [
        "promoted version 3; the previous champion is version 2",
        "serving it: c1, c2",
    ]
    manifest = await live.store.read_manifest(3)
    assert (manifest.parent, manifest.lineage, manifest.run) == (None, 2, None)
    lines = (await live.model("show", "--lineage")).out.splitlines()
    assert "the first model of lineage 2" in lines[-1]


async def test_a_refused_request_is_one_line_and_changes_nothing(live: LiveFederation) -> None:
    for words, code, message in (
        (("rollback", "--to", "v2"), 1, "version 2 is the champion already"),
        (("promote", "9"), 1, "has no version 9; it has 1 to 2"),
        (("rollback", "--to", "v9"), 1, "has no version 9"),
        (("promote", "newest"), 2, "'newest' is not a version"),
        (("promote", "1", "--task", "cifar"), 5, f"federation test has no task cifar. Choose one of: {TASK}"),
    ):
        result = await live.model(*words)
        assert (result.code, result.out) == (code, ""), result.err
        assert message in result.err
        assert result.err.count("\n") == 1
    info = await live.fed.bus.request(GetServerInfo(task=TASK))
    assert info.model is not None
    assert (info.model.version, info.term) == (2, 2)


async def test_an_incompatible_version_is_promoted_and_not_served(
    live: LiveFederation, tmp_path: Path
) -> None:
    arrays = {"weight": np.zeros((4, 7), np.float32), "bias": np.zeros(4, np.float32)}
    artifact = weights.save(arrays, tmp_path / "wide.safetensors")
    await live.store.put(tmp_path / "wide.safetensors", artifact.sha256)
    second = await live.store.read_manifest(2)
    await live.store.publish(second.model_copy(update=artifact.model_dump() | {"version": 3, "parent": 2}))
    result = await live.model("promote", "3")
    assert result.code == 0, result.err
    assert "'weight' is float32[4, 7] instead of float32[4, 3]" in result.out, result.out
    assert served_versions(live.fed) == {"c1": 2, "c2": 2}


async def test_without_devices_the_champion_still_changes(
    fed: FederationHarness, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server_side(fed):
        fedbus = make_cli(fed, nats, tmp_path)
        refused = await fedbus("model", "rollback")
        assert (refused.code, refused.out) == (1, "")
        assert "no champion before this one" in refused.err
        result = await fedbus("model", "init", "--new-lineage")
        assert result.code == 0, result.err
        assert result.out.splitlines() == [
            "promoted version 2; the previous champion is version 1",
            "no device serves a model yet",
        ]
        async with run_client_side(fed, "c1", 0, 1):
            await eventually(lambda: served_versions(fed) == {"c1": 2}, within_s=60)
    away = await fedbus("model", "promote", "1")
    assert (away.code, away.out) == (4, "")
    assert "no agent serves it" in away.err
