"""Processes whose connection nats-server rejects end with one line and exit code 7."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import eventually
from support.cli import CliResult, FedbusCli
from support.federation import tiny_task
from support.trusted_bus import FED, TrustedBus, trusted_bus

from fedbus.app.failures import ExitCode, describe_error
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import AccessDenied, BusClosed
from fedbus.contracts.permissions import Role
from fedbus.contracts.subjects import USERS

PROCESSES_OF_C1 = ("client-manager", "flower-client", "inference,device-monitor")
"""The agents of client c1 in three processes, as in a pod."""


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[TrustedBus]:
    async with trusted_bus(tmp_path) as bus:
        yield bus


def make_cli(bus: TrustedBus, directory: Path) -> FedbusCli:
    return FedbusCli(
        directory / "home",
        FEDBUS_TASK=str(directory / "tiny_task"),
        FEDBUS_FEDERATION=FED,
        FEDBUS_NATS_URL=bus.url,
        FEDBUS_CA=str(bus.federation.ca_path),
    )


def assert_denied(result: CliResult, reason: str) -> None:
    assert result.code == ExitCode.DENIED, result
    *_, last = result.err.splitlines()
    assert last.startswith("fedbus: NATS server tls://localhost:"), result.err
    assert reason in last
    assert "Traceback" not in result.err + result.out


async def wait_for_services(bus: TrustedBus, *services: str) -> None:
    """Wait until all *services*, each a name and an owner, are running."""
    user = Identity(FED, "cli", USERS)
    async with Bus.connect(bus.url, user, access=bus.access_for(Role.USER)) as user_bus:

        async def are_running() -> bool:
            return set(services) <= {f"{one.name} {one.owner}" for one in await user_bus.discover_agents()}

        await eventually(are_running, within_s=90)


async def test_a_revoked_agent_ends_with_one_line_and_exit_code_7(bus: TrustedBus, tmp_path: Path) -> None:
    tiny_task(tmp_path)
    fedbus, kit = make_cli(bus, tmp_path), str(bus.access_for("c1").creds)
    async with asyncio.TaskGroup() as group:
        server = group.create_task(
            fedbus("server", "up", FEDBUS_CREDS=str(bus.access_for(Role.SERVER).creds))
        )
        agents = [
            group.create_task(fedbus("agent", names, "--client", "c1", FEDBUS_CREDS=kit))
            for names in PROCESSES_OF_C1
        ]
        await wait_for_services(
            bus, *(f"fedbus-{name} c1" for names in PROCESSES_OF_C1 for name in names.split(","))
        )
        bus.federation.revoke("c1")
        await bus.push()
        for agent in agents:
            assert_denied(await agent, "revoked")
        assert not server.done()
        bus.federation.revoke("server")
        await bus.push()
        assert_denied(await server, "revoked")


async def test_an_agent_with_expired_credentials_ends_with_code_7(bus: TrustedBus, tmp_path: Path) -> None:
    tiny_task(tmp_path)
    bus.federation.admit("c1", days=8 / 86400).write(tmp_path / "kit")
    result = await make_cli(bus, tmp_path)("client", "up", "c1", FEDBUS_KIT=str(tmp_path / "kit"))
    assert_denied(result, "expired")


async def test_credentials_of_another_federation_are_one_line(bus: TrustedBus, tmp_path: Path) -> None:
    tiny_task(tmp_path)
    kit = str(bus.access_for("c1").creds)
    result = await make_cli(bus, tmp_path)("client", "up", "c2", FEDBUS_CREDS=kit, FEDBUS_FEDERATION="other")
    assert (result.code, result.err.count("\n")) == (ExitCode.DENIED, 1), result.err
    assert "of client c1 of federation test, but this is client c2 of federation other" in result.err


def test_of_several_errors_the_denied_access_is_reported() -> None:
    denied = AccessDenied("nats://here", "these credentials were revoked", "Get others")
    several = ExceptionGroup("", [BusClosed("closed"), ExceptionGroup("", [KeyError("x"), denied])])
    assert describe_error(several) == (str(denied), ExitCode.DENIED)
