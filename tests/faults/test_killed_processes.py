"""A process killed in the middle of a round: the run continues, and so do predictions."""

import os
import signal

import aiohttp
import pytest
from support.process_federation import TASK, ProcessFederation


def run_events(federation: ProcessFederation, run: str) -> list[str]:
    return [
        entry.transition.event
        for entry in federation.view.history
        if entry.data.kind == "run" and entry.data.key == run
    ]


@pytest.mark.fault
async def test_a_run_survives_a_killed_nats_server(federation: ProcessFederation) -> None:
    run = await federation.start_run()
    await federation.wait_until(lambda: federation.is_in_round(run, 2))
    os.kill(federation.stack.nats.pid, signal.SIGKILL)
    await federation.wait_until(lambda: federation.has_ended(run))

    assert run_events(federation, run)[-1] == "run_finished"
    assert [result.round for result in federation.run_facts(run).rounds] == [0, 1, 2, 3, 4]
    assert federation.stack.nats.starts == 2
    assert federation.stack.restarts == {}, "no other process restarted"


@pytest.mark.fault
async def test_a_run_continues_without_a_killed_device(
    federation: ProcessFederation,
) -> None:
    run = await federation.start_run()
    await federation.wait_until(lambda: federation.is_in_round(run, 2))
    federation.find_process("client", "up", "c2").kill()
    await federation.wait_until(lambda: federation.has_ended(run))
    assert run_events(federation, run)[-1] == "run_finished"
    assert [result.round for result in federation.run_facts(run).rounds] == [0, 1, 2, 3, 4]

    next_run = await federation.start_run()
    await federation.wait_until(lambda: federation.has_ended(next_run))
    assert set(federation.run_facts(next_run).rounds[-1].participants) == {"c1", "c2", "c3"}


@pytest.mark.fault
async def test_a_killed_server_side_resumes_from_the_last_checkpoint(federation: ProcessFederation) -> None:
    run = await federation.start_run()
    await federation.wait_until(lambda: federation.is_in_round(run, 3))
    federation.find_process("server", "up").kill()
    await federation.wait_until(lambda: federation.has_ended(run))

    assert "server_lost" in run_events(federation, run)
    assert run_events(federation, run)[-1] == "run_finished"
    assert [result.round for result in federation.run_facts(run).rounds] == [0, 1, 2, 3, 4]
    assert federation.run_facts(run).rounds[-1].loss == pytest.approx(96.0), "each round is trained once"


@pytest.mark.fault
async def test_a_killed_flower_server_resumes_from_the_last_checkpoint(
    federation: ProcessFederation,
) -> None:
    run = await federation.start_run()
    await federation.wait_until(lambda: federation.is_in_round(run, 3))
    federation.find_process("child", "server").kill()
    await federation.wait_until(lambda: federation.has_ended(run))

    assert run_events(federation, run).count("server_recovered") == 1
    assert run_events(federation, run)[-1] == "run_finished"
    assert federation.run_facts(run).rounds[-1].loss == pytest.approx(96.0)


@pytest.mark.fault
async def test_a_run_continues_without_a_killed_trainer(federation: ProcessFederation) -> None:
    run = await federation.start_run()
    await federation.wait_until(lambda: federation.is_in_round(run, 2))
    federation.find_process("child", "trainer").kill()
    await federation.wait_until(lambda: federation.has_ended(run))

    assert run_events(federation, run)[-1] == "run_finished"
    assert any(result.failures for result in federation.run_facts(run).rounds), (
        "the round reports the failed client"
    )


@pytest.mark.fault
async def test_predictions_continue_without_bus_and_server(federation: ProcessFederation) -> None:
    run = await federation.start_run()
    await federation.wait_until(
        lambda: federation.has_ended(run) and federation.view.do_all_serve_champion(TASK, 3)
    )
    endpoints = [client.endpoint for client in federation.view.clients.values()]
    federation.find_process("server", "up").kill()
    os.kill(federation.stack.nats.pid, signal.SIGKILL)

    async with aiohttp.ClientSession() as session:
        for endpoint in endpoints * 20:
            async with session.post(f"{endpoint}/predict", json={"inputs": [[0.1, 0.2, 0.3]]}) as response:
                assert response.status == 200
                assert (await response.json())["model_version"] == 2
