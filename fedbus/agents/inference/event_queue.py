"""What the inference agent has to tell, in order, until the bus takes it: neither predictions nor swaps wait for that.

A bounded queue: where the bus is away for very long the oldest figures are let go, and so is what the bus will not
have: no figure is worth a prediction. Each message goes out in the trace in which it was said.
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

log = structlog.get_logger("fedbus.inference_sayings")


class EventQueue:
    """What is said, until it is heard."""

    def __init__(self, *, max_waiting: int = MAX_QUEUED_EVENTS) -> None:
        self._waiting: deque[tuple[Message, contextvars.Context]] = deque(maxlen=max_waiting)
        self._more = asyncio.Event()

    def say(self, message: Message) -> None:
        """Say it as soon as there is a bus. Never waits."""
        if len(self._waiting) == self._waiting.maxlen:
            log.warning("the oldest of what waits for the bus is let go", word=self._waiting[0][0].word)
        self._waiting.append((message, contextvars.copy_context()))
        self._more.set()

    async def tell(self, bus: Bus) -> None:
        """Hand what was said to *bus*, for ever. What it has not taken when this is cancelled stays."""
        while True:
            while self._waiting:
                message, context = self._waiting[0]
                try:
                    await asyncio.create_task(
                        bus.publish(message), name=f"say {message.word}", context=context
                    )
                except (PublishRefused, ValueError) as error:
                    log.warning(
                        "the bus does not take what was to be said", word=message.word, reason=str(error)
                    )
                if self._waiting and self._waiting[0][0] is message:
                    self._waiting.popleft()
            self._more.clear()
            await self._more.wait()
