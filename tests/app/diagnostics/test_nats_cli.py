"""The commands in docs/nats-cli.md, and what they need from fedbus."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import nats as nats_py
import pytest
from support import NatsServer, eventually
from support.federation import RunningAgent, tiny_task

from fedbus.app.composition.agents import CLIENT_AGENTS, SERVER_AGENTS, AgentConfig, ClientConfig
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import FederationNotFound, NoResponse
from fedbus.bus.streams import stream_names
from fedbus.contracts.identifiers import FederationId, client_id
from fedbus.contracts.permissions import Role, permissions_for
from fedbus.contracts.subjects import USERS

PAGE = Path(__file__).parents[3] / "docs" / "nats-cli.md"
DEV = FederationId("dev")
COMMANDS = [
    line.strip().partition("  #")[0].strip()
    for line in PAGE.read_text().splitlines()
    if re.match(r" {4}(nats|fedbus) ", line)
]
WITHOUT_WORDS = ("nats sub 'fedbus.dev.client", "nats req ")
"""These need a run, or a task of that name."""


@pytest.fixture
async def site(nats: NatsServer, tmp_path: Path) -> AsyncIterator[AgentConfig]:
    """A running server side and one client."""
    site = AgentConfig(nats.url, DEV, tmp_path / "home", tiny_task(tmp_path))
    device = ClientConfig(site, client_id("c1"), {"partition-id": 0, "num-partitions": 1})
    agents = [partial(run, site) for run in SERVER_AGENTS.values()]
    agents += [partial(run, device) for run in CLIENT_AGENTS.values()]
    async with AsyncExitStack() as stack:
        for run in agents:
            agent = RunningAgent(run)
            agent.start()
            stack.push_async_callback(agent.stop)
        bus = await stack.enter_async_context(Bus.connect(nats.url, Identity(DEV, "cli", USERS)))

        async def is_serving() -> bool:
            try:
                return [one.target for one in await bus.current_states("client")] == ["serving"]
            except (FederationNotFound, NoResponse):
                return False

        await eventually(is_serving, within_s=60)
        yield site


async def request_all(url: str, verb: str) -> list[dict[str, Any]]:
    """Return the replies of all micro services to PING, INFO or STATS."""
    connection = await nats_py.connect(url, connect_timeout=30)
    inbox = connection.new_inbox()
    answers = await connection.subscribe(inbox)
    await connection.publish(f"$SRV.{verb}", b"", reply=inbox)
    found: list[dict[str, Any]] = []
    try:
        while True:
            answer = await answers.next_msg(timeout=0.5)
            if answer.data:  # without any service, NATS sends an empty reply
                found.append(json.loads(answer.data))
    except nats_py.errors.TimeoutError:
        await connection.close()
    return found


async def test_every_agent_answers_ping_info_and_stats(site: AgentConfig) -> None:
    wanted = {f"fedbus-{agent}" for agent in (*SERVER_AGENTS, *CLIENT_AGENTS, "registrar")}

    for verb in ("PING", "INFO", "STATS"):

        async def have_all_answered(verb: str = verb) -> bool:
            return wanted <= {one["name"] for one in await request_all(site.nats_url, verb)}

        await eventually(have_all_answered, within_s=60)
    for one in await request_all(site.nats_url, "INFO"):
        assert one["description"], one
        assert one["metadata"]["federation"] == "dev", one


async def test_streams_and_consumers_have_descriptions(site: AgentConfig) -> None:
    connection = await nats_py.connect(site.nats_url, connect_timeout=30)
    js = connection.jetstream()

    async def is_enrolled() -> bool:
        try:
            return len(await js.consumers_info("FEDBUS_dev_EVENTS")) >= 6
        except nats_py.js.errors.NotFoundError:
            return False

    await eventually(is_enrolled, within_s=60)
    for stream in await js.streams_info():
        assert stream.config.description, stream.config.name
        assert (stream.config.metadata or {}).get("fedbus-federation") == "dev", stream.config.name
    durable = [one for one in await js.consumers_info("FEDBUS_dev_EVENTS") if one.config.durable_name]
    for consumer in durable:
        assert consumer.config.description, consumer.name
        assert {"fedbus-agent", "fedbus-owner", "fedbus-task"} <= (consumer.config.metadata or {}).keys()
    await connection.close()


@pytest.mark.skipif(shutil.which("nats") is None, reason="the nats CLI is not installed")
@pytest.mark.parametrize("command", [one for one in COMMANDS if not one.startswith(WITHOUT_WORDS)])
async def test_a_command_of_the_page_works(site: AgentConfig, tmp_path: Path, command: str) -> None:
    environment = os.environ | {
        "FEDBUS_NATS_URL": site.nats_url,
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    line = f"fedbus context dev --select && timeout 20 {command}"
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", line, env=environment, stderr=subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) > 10


def test_the_page_names_existing_streams_and_subjects() -> None:
    text = "\n".join(one for one in COMMANDS if one.startswith("nats "))
    streams = set(re.findall(r"FEDBUS_\w+", text))
    named = set(re.findall(r"fedbus\.dev\.[^\s']+", text))
    services = set(re.findall(r"fedbus-[a-z-]+", text))
    assert len(streams) > 3
    assert len(named) > 2
    assert len(services) > 0
    assert streams <= set(stream_names(DEV))
    readable = permissions_for(DEV, Role.USER)
    for subject in named:
        assert any(_is_covered(one, subject) for one in (*readable.subscribe, *readable.publish)), subject
    assert services <= {f"fedbus-{agent}" for agent in (*SERVER_AGENTS, *CLIENT_AGENTS)}
    subscriptions = [one for one in COMMANDS if one.startswith("nats sub")]
    assert all(re.search(r" --(count|wait) ", one) for one in subscriptions), "each ends by itself"


def _is_covered(allowed: str, subject: str) -> bool:
    """Return whether the pattern *allowed* covers all subjects that the pattern *subject* matches."""
    pattern, tokens = allowed.split("."), subject.split(".")
    for place, token in enumerate(pattern):
        if token == ">":
            return len(tokens) > place
        if place >= len(tokens) or tokens[place] == ">" or token not in ("*", tokens[place]):
            return False
    return len(pattern) == len(tokens)
