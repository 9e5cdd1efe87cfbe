"""Pulling plugs in the middle of a round: the run goes on, and predictions with it."""

import os
import signal

import aiohttp
import pytest
from support.process_federation import TASK, ProcessFederation


def read_states(site: ProcessFederation, run: str) -> list[str]:
    return [
        one.transition.event for one in site.view.history if one.data.kind == "run" and one.data.thing == run
    ]


async def test_a_nats_server_killed_in_the_middle_of_a_round_costs_no_run(site: ProcessFederation) -> None:
    run = await site.start_run()
    await site.wait_until(lambda: site.is_in_round(run, 2))
    os.kill(site.stack.nats.pid, signal.SIGKILL)
    await site.wait_until(lambda: site.has_ended(run))

    assert read_states(site, run)[-1] == "run_finished"
    assert [one.round for one in site.run_facts(run).rounds] == [0, 1, 2, 3, 4]
    assert site.stack.nats.starts == 2
    assert site.stack.restarts == {}, "nobody else fell"


@pytest.mark.fault
async def test_a_device_that_goes_in_the_middle_of_a_round_is_left_behind_and_comes_back(
    site: ProcessFederation,
) -> None:
    run = await site.start_run()
    await site.wait_until(lambda: site.is_in_round(run, 2))
    site.find_process("client", "up", "c2").kill()
    await site.wait_until(lambda: site.has_ended(run))
    assert read_states(site, run)[-1] == "run_finished"
    assert [one.round for one in site.run_facts(run).rounds] == [0, 1, 2, 3, 4]

    again = await site.start_run()
    await site.wait_until(lambda: site.has_ended(again))
    assert set(site.run_facts(again).rounds[-1].participants) == {"c1", "c2", "c3"}


@pytest.mark.fault
async def test_a_server_side_that_goes_takes_the_run_up_from_the_last_round(site: ProcessFederation) -> None:
    run = await site.start_run()
    await site.wait_until(lambda: site.is_in_round(run, 3))
    site.find_process("server", "up").kill()
    await site.wait_until(lambda: site.has_ended(run))

    assert "server_lost" in read_states(site, run)
    assert read_states(site, run)[-1] == "run_finished"
    assert [one.round for one in site.run_facts(run).rounds] == [0, 1, 2, 3, 4]
    assert site.run_facts(run).rounds[-1].loss == pytest.approx(96.0), (
        "each round trained once and counted once"
    )


@pytest.mark.fault
async def test_a_flower_server_that_is_killed_is_started_again_from_the_last_round(
    site: ProcessFederation,
) -> None:
    run = await site.start_run()
    await site.wait_until(lambda: site.is_in_round(run, 3))
    site.find_process("child", "server").kill()
    await site.wait_until(lambda: site.has_ended(run))

    assert read_states(site, run).count("server_recovered") == 1
    assert read_states(site, run)[-1] == "run_finished"
    assert site.run_facts(run).rounds[-1].loss == pytest.approx(96.0)


@pytest.mark.fault
async def test_a_trainer_that_is_killed_ends_nothing_for_the_others(site: ProcessFederation) -> None:
    run = await site.start_run()
    await site.wait_until(lambda: site.is_in_round(run, 2))
    site.find_process("child", "trainer").kill()
    await site.wait_until(lambda: site.has_ended(run))

    assert read_states(site, run)[-1] == "run_finished"
    assert any(one.failures for one in site.run_facts(run).rounds), "the round says who failed"


@pytest.mark.fault
async def test_predictions_go_on_without_bus_and_server(site: ProcessFederation) -> None:
    run = await site.start_run()
    await site.wait_until(lambda: site.has_ended(run) and site.view.do_all_serve_champion(TASK, 3))
    endpoints = [client.endpoint for client in site.view.clients.values()]
    site.find_process("server", "up").kill()
    os.kill(site.stack.nats.pid, signal.SIGKILL)

    async with aiohttp.ClientSession() as session:
        for endpoint in endpoints * 20:
            async with session.post(f"{endpoint}/predict", json={"inputs": [[0.1, 0.2, 0.3]]}) as response:
                assert response.status == 200
                assert (await response.json())["model_version"] == 2
