"""A lease: one of several equal agents acts, and another takes over soon after it fails.

A lease is one message in a stream with a maximum age of `LEASE_S`. An agent acquires the lease by publishing to
the empty subject (``Nats-Expected-Last-Subject-Sequence: 0``), and renews it by publishing after its own last
message. So the NATS server decides, by its own clock, and the agents' clocks need not agree. To release the
lease, the holder publishes an empty message, and the next agent acquires it at once.

A lease alone does not prevent two agents from acting: a process that was frozen notices only afterwards that it
has lost the lease. What the lease protects must therefore be a lifecycle (see `lifecycles`): the new holder
publishes a transition first, and from then on NATS rejects the transitions of the old holder. Before a holder
acknowledges a message that the next holder would need, it checks its lease.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import structlog
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout

from fedbus.bus.background import background_task
from fedbus.bus.bus import Bus
from fedbus.bus.errors import LeaseLost, PublishRefused
from fedbus.bus.lifecycles import EXPECTED_SEQUENCE_HEADER, WRONG_SEQUENCE_CODE
from fedbus.bus.nats.cancellation import next_message
from fedbus.bus.streams import LEASE_S, lease_stream
from fedbus.contracts import subjects
from fedbus.contracts.agent_names import AgentName

RENEW_S: Final = LEASE_S / 4
RELEASE_TIMEOUT_S: Final = 1.0
"""The limit for releasing the lease at shutdown; after that it expires by itself."""

log = structlog.get_logger("fedbus.lease")


class Lease:
    """The exclusive right to act as the *agent* of a task. Create it with `held`."""

    def __init__(self, bus: Bus, *, task: str, agent: AgentName) -> None:
        self._bus = bus
        self._stream = lease_stream(bus.fed)
        self._subject = subjects.lease(bus.fed, task, agent)
        self._sequence = 0
        self._publishing = asyncio.Lock()
        """Each message of a lease expects the sequence of the one before."""
        self.holder: Final = bus.identity.blob_holder
        """The content of the lease message: a unique name."""

    @classmethod
    @asynccontextmanager
    async def acquire(cls, bus: Bus, *, task: str, agent: AgentName) -> AsyncIterator["Lease"]:
        """Wait for the lease and renew it for the duration of the block.

        Raises:
            LeaseLost: Inside the block, when the lease cannot be renewed.

        """
        lease = cls(bus, task=task, agent=agent)
        await lease._wait_until_acquired()
        try:
            async with background_task(lease._renew_forever(), name=f"keep the lease of {agent}"):
                yield lease
        finally:
            await lease._release()

    async def check(self) -> None:
        """Renew the lease now. It returns only if this agent has held the lease without interruption.

        Raises:
            LeaseLost: Another agent has acquired it, or it has expired.

        """
        async with self._publishing:
            try:
                await self._publish(self.holder.encode())
            except LeaseLost:
                last = await self._bus.last_raw_message(self._stream, self._subject)
                if last is None or last.data != self.holder.encode():
                    raise
                # the renewal was stored, and only its acknowledgement lost
                self._sequence = int(last.seq or 0)

    async def _wait_until_acquired(self) -> None:
        is_waiting = False
        async with self._bus.subscribe(self._subject) as renewals:
            while not await self._try_acquire():
                if not is_waiting:
                    log.info("Lease held by another agent; waiting", lease=self._subject)
                is_waiting = True
                with contextlib.suppress(NatsTimeout):
                    while (await next_message(renewals, LEASE_S)).data:  # the holder renews it
                        pass
        log.info("Lease acquired", lease=self._subject)

    async def _try_acquire(self) -> bool:
        """Try to acquire the lease once."""
        last = await self._bus.last_raw_message(self._stream, self._subject)
        if last is not None and last.data:
            return False
        self._sequence = int(last.seq or 0) if last else 0
        try:
            await self.check()
        except LeaseLost:  # another agent was faster
            return False
        return True

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self.check()

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S), self._publishing:
                await self._publish(b"")
        except LeaseLost:
            pass  # another agent has it
        except (TimeoutError, NatsError) as error:
            reason = str(error) or f"no reply within {RELEASE_TIMEOUT_S:g} s"
            log.info("Lease not released; it expires by itself", lease=self._subject, reason=reason)

    async def _publish(self, body: bytes) -> None:
        headers = {EXPECTED_SEQUENCE_HEADER: str(self._sequence)}
        try:
            self._sequence = await self._bus.publish_to_stream(self._subject, headers, body)
        except PublishRefused as refused:
            if WRONG_SEQUENCE_CODE not in str(refused):
                raise
            raise LeaseLost(self._subject) from None
