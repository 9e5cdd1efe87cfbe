"""One of several agents holds the lease; another takes over when the holder releases it or fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from support import NatsServer, OwnNatsServer, eventually

from fedbus.bus import lease as leases
from fedbus.bus import streams
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import LeaseLost
from fedbus.bus.lease import Lease
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import FederationId

FED = FederationId("test")

SHORT_S = 0.2


@pytest.fixture
async def buses(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[list[Bus]]:
    """Two schedulers that often renew and await a lease. It expires after a minute, or after the parameter."""
    monkeypatch.setattr(streams, "LEASE_S", getattr(request, "param", 60.0))
    monkeypatch.setattr(leases, "LEASE_S", SHORT_S)
    monkeypatch.setattr(leases, "RENEW_S", SHORT_S)
    monkeypatch.setattr(leases, "RELEASE_TIMEOUT_S", 60.0)
    async with AsyncExitStack() as stack:
        identity = Identity(FED, "workflow-scheduler")
        both = [await stack.enter_async_context(Bus.connect(nats.url, identity)) for _ in range(2)]
        await both[0].create_streams()
        yield both


class LeaseHolder:
    """Holds the lease in a task of its own, until it is released."""

    def __init__(self, bus: Bus) -> None:
        self.is_holding = False
        self.is_lost = False
        self._released = asyncio.Event()
        self.task = asyncio.ensure_future(self._hold(bus))

    async def _hold(self, bus: Bus) -> None:
        try:
            async with Lease.acquire(bus, task="tiny", agent=AgentName.WORKFLOW_SCHEDULER):
                self.is_holding = True
                await self._released.wait()
        except LeaseLost:
            self.is_lost = True
        finally:
            self.is_holding = False

    async def release(self) -> None:
        self._released.set()
        await self.task


async def renewals(bus: Bus) -> int:
    """The number of messages of all leases since the stream exists."""
    _, last = await bus.sequence_range(streams.lease_stream(FED))
    return last


async def test_the_next_agent_acquires_a_released_lease(buses: list[Bus]) -> None:
    first = LeaseHolder(buses[0])
    await eventually(lambda: first.is_holding)
    second = LeaseHolder(buses[1])
    await asyncio.sleep(3 * SHORT_S)  # so that the second tries; otherwise this passes, too
    before = await renewals(buses[0])

    async def is_renewed() -> bool:
        return await renewals(buses[0]) >= before + 3

    await eventually(is_renewed)
    assert first.is_holding
    assert not second.is_holding
    await first.release()
    await eventually(lambda: second.is_holding)
    await second.release()


async def test_a_cancelled_holder_releases_the_lease(buses: list[Bus]) -> None:
    first = LeaseHolder(buses[0])
    await eventually(lambda: first.is_holding)
    first.task.cancel()
    second = LeaseHolder(buses[1])
    await eventually(lambda: second.is_holding)
    await second.release()


@pytest.mark.parametrize("buses", [2.0], indirect=True)
async def test_a_silent_holder_loses_the_lease_and_gets_an_error(
    buses: list[Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    renew, resume = buses[0].publish_to_stream, asyncio.Event()
    silent = LeaseHolder(buses[0])
    await eventually(lambda: silent.is_holding)

    async def renew_late(subject: str, headers: dict[str, str], body: bytes) -> int:
        await resume.wait()
        return await renew(subject, headers, body)

    monkeypatch.setattr(buses[0], "publish_to_stream", renew_late)
    second = LeaseHolder(buses[1])
    await eventually(lambda: second.is_holding)
    resume.set()
    await eventually(lambda: silent.is_lost)
    await second.release()


async def test_a_holder_keeps_its_lease_when_acknowledgements_are_lost(
    buses: list[Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = buses[0].publish_to_stream

    async def publish_twice(subject: str, headers: dict[str, str], body: bytes) -> int:
        await publish(subject, headers, body)  # without its acknowledgement, it is published again
        return await publish(subject, headers, body)

    monkeypatch.setattr(buses[0], "publish_to_stream", publish_twice)
    holder = LeaseHolder(buses[0])
    await eventually(lambda: holder.is_holding)
    before = await renewals(buses[1])

    async def is_renewed() -> bool:
        return await renewals(buses[1]) >= before + 3

    await eventually(is_renewed)
    assert holder.is_holding
    await holder.release()
    assert not holder.is_lost


async def test_a_lease_survives_a_killed_nats_server(buses: list[Bus], own_nats: OwnNatsServer) -> None:
    first = LeaseHolder(buses[0])
    await eventually(lambda: first.is_holding)
    await own_nats.kill()
    await own_nats.start()
    second = LeaseHolder(buses[1])
    await eventually(lambda: first.is_holding or second.is_holding)
    await (first if first.is_holding else second).release()
    await eventually(lambda: second.is_holding or second.task.done())
    second.task.cancel()
    await asyncio.wait([second.task])
    assert first.is_holding + second.is_holding == 0
