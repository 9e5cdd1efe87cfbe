"""The facts of a device, and the eligibility rule of its task."""

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from support import NatsServer
from support.fake_server import RUN, FakeServer, send_infer_ready, wait_for_infer_start
from support.federation import TASK, FederationHarness, open_federation, tiny_task

from fedbus.agents.client_manager.eligibility import CAPTURED_DATABASE, read_device_facts
from fedbus.app.composition.agents import client_manager
from fedbus.contracts.client import ClientDeclined, ClientStart
from fedbus.contracts.expressions.eligibility_rule import RULE_VARIABLES
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.stores.captured.store import CapturedData


def task_with(directory: Path, rule: str, again_s: float = 0.1) -> Task:
    task = tiny_task(directory)
    table = {"rule": rule, "again-s": again_s}
    return task.model_copy(
        update={
            "table": TaskTable.model_validate({**task.table.model_dump(by_alias=True), "eligibility": table})
        }
    )


async def capture(directory: Path, labelled: int) -> None:
    captured = CapturedData(directory / CAPTURED_DATABASE)
    for _ in range(labelled):
        captured.add(np.zeros(3, np.float32), np.zeros(4, np.float32), 1, model_version=1)
    await captured.flush()
    await captured.close()


def test_every_variable_of_a_rule_is_read_on_every_device(tmp_path: Path) -> None:
    facts = read_device_facts(set(RULE_VARIABLES), tmp_path, None)
    assert facts.keys() == RULE_VARIABLES.keys()
    assert facts["labelled"] == 0
    assert facts["model_age"] is None
    assert all(0 <= (facts[name] or 0) <= 100 for name in ("cpu", "memory", "disk"))


def test_only_the_variables_of_a_rule_are_read(tmp_path: Path) -> None:
    assert read_device_facts({"hour"}, tmp_path, None).keys() == {"hour"}


def test_the_age_of_a_model_is_that_of_its_file(tmp_path: Path) -> None:
    model = tmp_path / "v1.safetensors"
    model.touch()
    an_hour_ago = time.time() - 3600
    os.utime(model, (an_hour_ago, an_hour_ago))
    assert read_device_facts({"model_age"}, tmp_path, model)["model_age"] == pytest.approx(3600, abs=60)


async def test_rows_that_are_held_out_do_not_count(tmp_path: Path) -> None:
    await capture(tmp_path, 12)
    assert read_device_facts({"labelled"}, tmp_path, None)["labelled"] == 12
    held_out = read_device_facts({"labelled"}, tmp_path, None, holdout_share=0.5)["labelled"]
    assert held_out is not None
    assert held_out < 12


@pytest.fixture
async def federation_with_rule(nats: NatsServer, tmp_path: Path) -> AsyncIterator[FederationHarness]:
    async with open_federation(nats.url, tmp_path, task=task_with(tmp_path, "labelled >= 3")) as fed:
        yield fed


async def test_an_ineligible_client_joins_the_run_when_it_may(
    federation_with_rule: FederationHarness,
) -> None:
    device = federation_with_rule.client_config("c1")
    async with FakeServer(federation_with_rule).serve() as server:
        await server.set_model(1)
        async with federation_with_rule.run_agent(lambda stop: client_manager(device, stop)):
            await send_infer_ready(federation_with_rule, await wait_for_infer_start(federation_with_rule))
            await federation_with_rule.wait_for_state("client", "serving")
            server.open_run = server.make_invitation()
            await server.send_invitation()
            declined = await federation_with_rule.wait_for_message(ClientDeclined)
            assert (declined.run, declined.rule, declined.facts) == (RUN, "labelled >= 3", {"labelled": 0})
            assert declined.reason == "labelled is 0, and should be at least 3"

            await capture(device.directory, 20)
            start = await federation_with_rule.wait_for_message(ClientStart)
            assert (start.run, start.task) == (RUN, TASK)
            assert len(federation_with_rule.messages_of(ClientDeclined)) == 1, (
                "the same reason is not published repeatedly"
            )
