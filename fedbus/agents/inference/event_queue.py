"""The event queue of the inference agent: messages to publish, so that predictions and swaps never wait for the bus.

The queue is bounded. When it is full, the oldest message is dropped; a message that the bus rejects is dropped
too. Each message is published in the trace in which it was queued.
"""

import asyncio
import contextvars
from collections import deque
from typing import Final

import structlog

from fedbus.bus.bus import Bus
from fedbus.bus.errors import PublishRefused
from fedbus.contracts.message import Message

MAX_QUEUED_EVENTS: Final = 1000

log = structlog.get_logger("fedbus.inference")


class EventQueue:
    """A bounded queue of messages to publish."""

    def __init__(self, *, max_queued: int = MAX_QUEUED_EVENTS) -> None:
        self._messages: deque[tuple[Message, contextvars.Context]] = deque(maxlen=max_queued)
        self._added = asyncio.Event()

    def enqueue(self, message: Message) -> None:
        """Queue *message* for publishing. Does not block."""
        if len(self._messages) == self._messages.maxlen:
            log.warning("Event queue full; dropping the oldest event", message=self._messages[0][0].name)
        self._messages.append((message, contextvars.copy_context()))
        self._added.set()

    async def drain_to(self, bus: Bus) -> None:
        """Publish the queued messages to *bus*, forever. On cancellation, unpublished messages stay in the queue."""
        while True:
            while self._messages:
                message, context = self._messages[0]
                try:
                    await asyncio.create_task(
                        bus.publish(message), name=f"publish {message.name}", context=context
                    )
                except (PublishRefused, ValueError) as error:
                    log.warning(
                        "NATS rejected the event; dropping it", message=message.name, reason=str(error)
                    )
                if self._messages and self._messages[0][0] is message:
                    self._messages.popleft()
            self._added.clear()
            await self._added.wait()
