"""A lease: of several agents that could act, one does, and another takes over soon after it falls silent.

A lease is one message in a stream that forgets after `LEASE_S`. Taking it is to say it where nothing is
(``Nats-Expected-Last-Subject-Sequence: 0``), keeping it is to say it again behind one's own last word: so
the broker decides, by its own clock, and no two agents' clocks need agree. Who lets go says an
empty word, and the next one has it at once.

A lease alone does not keep two from acting: who was frozen learns only afterwards that it has lost
it. What it guards must be moved behind its own last transition (see `lives`), by whoever takes the
lease first of all: from then on the old holder is refused.
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
"""How long whoever ends may take to say so: after that the lease runs out by itself."""

log = structlog.get_logger("fedbus.lease")


class Lease:
    """The right to be the one *agent* of a task. Make one with `held`."""

    def __init__(self, bus: Bus, *, task: str, agent: AgentName) -> None:
        self._bus = bus
        self._stream = lease_stream(bus.fed)
        self._subject = subjects.lease(bus.fed, task, agent)
        self._sequence = 0

    @classmethod
    @asynccontextmanager
    async def held(cls, bus: Bus, *, task: str, agent: AgentName) -> AsyncIterator["Lease"]:
        """Wait for the lease, and keep it for as long as the block runs; raises LeaseLost inside where it cannot."""
        lease = cls(bus, task=task, agent=agent)
        await lease._wait_until_acquired()
        try:
            async with background_task(lease._renew_forever(), name=f"keep the lease of {agent}"):
                yield lease
        finally:
            await lease._release()

    @property
    def holder(self) -> str:
        """Who we are, to whoever looks."""
        return self._bus.identity.holder

    async def check(self) -> None:
        """Raises LeaseLost where another has it by now."""
        await self._write(self.holder.encode())

    async def _wait_until_acquired(self) -> None:
        waits = False
        async with self._bus.subscribe(self._subject) as said:
            while not await self._try_acquire():
                if not waits:
                    log.info("Lease held by another agent; waiting", lease=self._subject)
                waits = True
                with contextlib.suppress(NatsTimeout):
                    while (await next_message(said, LEASE_S)).data:  # its holder is there
                        pass
        log.info("Lease acquired", lease=self._subject)

    async def _try_acquire(self) -> bool:
        """Try once."""
        last = await self._bus.last_raw_message(self._stream, self._subject)
        if last is not None and last.data:
            return False
        self._sequence = int(last.seq or 0) if last else 0
        try:
            await self.check()
        except LeaseLost:  # somebody was faster
            return False
        return True

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self.check()

    async def _release(self) -> None:
        with contextlib.suppress(LeaseLost, TimeoutError, NatsError):
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await self._write(b"")

    async def _write(self, word: bytes) -> None:
        headers = {EXPECTED_SEQUENCE_HEADER: str(self._sequence)}
        try:
            self._sequence = await self._bus.store(self._subject, headers, word)
        except PublishRefused as refused:
            if WRONG_SEQUENCE_CODE not in str(refused):
                raise
            raise LeaseLost(self._subject) from None
