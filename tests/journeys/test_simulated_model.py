"""A fleet continues from a simulated model: its first version is the published one, and a later one replaces it."""

import json
from pathlib import Path

import pytest
from support.cli import CliResult, FedbusCli
from support.federation import TINY_TASK
from support.process_federation import ProcessFederation, run_process_federation


def served_version(fleet: ProcessFederation) -> int:
    client = fleet.view.clients.get(("c1", "tiny"))
    return client.served_model.version if client is not None and client.served_model is not None else 0


def last_line(result: CliResult) -> dict[str, object]:
    assert result.code == 0, result.err
    facts: dict[str, object] = json.loads(result.out.splitlines()[-1])
    return facts


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_fleet_continues_from_a_simulated_model(tmp_path: Path) -> None:
    home, store = tmp_path / "home", str(tmp_path / "home" / "models")
    fedbus = FedbusCli(home)
    words = (
        "simulate",
        str(TINY_TASK),
        "--clients",
        "4",
        "--rounds",
        "2",
        "--publish",
        "--store",
        store,
        "--json",
    )
    simulated = last_line(await fedbus(*words))
    model = simulated["model_sha256"]

    async with run_process_federation(tmp_path, ("--rounds", "2", "--quorum", "1"), clients=1) as fleet:
        await fleet.wait_until(lambda: served_version(fleet) == 1)
        manifest = (await fedbus("model", "show", "1", "--task", "tiny", "--json")).facts
        run = await fleet.start_run(rounds=2, quorum=1)
        await fleet.wait_until(lambda: fleet.has_ended(run))
        trained = (await fedbus("model", "show", "2", "--task", "tiny", "--json")).facts
        await fleet.wait_until(lambda: served_version(fleet) == 2)

        better = last_line(await fedbus(*words, "--from", "champion"))
        await fleet.wait_until(lambda: served_version(fleet) == 3)

    assert (manifest["sha256"], manifest["simulation"]["clients"]) == (model, 4)
    assert (trained["parent"], trained["metrics"]["loss"]) == (1, 96.0)
    assert better["published"]["champion"] is True  # type: ignore[index]
    assert (better["published"]["version"], better["loss"]) == (3, 94.0)  # type: ignore[index]
