"""Small pieces of structured concurrency that asyncio 3.11 leaves to us."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from fedbus.bus.bus import Bus, Delivery
from fedbus.bus.errors import NoResponse
from fedbus.common.retry import retry
from fedbus.contracts.message import Request

T = TypeVar("T")


async def wait_for_first(*choices: Awaitable[Any]) -> None:
    """Wait for the first of *choices*, and end the others before returning.

    An error in the first is raised here.
    """
    tasks = [asyncio.ensure_future(choice) for choice in choices]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def run_until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do *work* until *stop* is set; an error in it is raised here."""
    await wait_for_first(stop.wait(), work)


async def wait_within(seconds: float, waited_for: Awaitable[T]) -> T:
    """What is *waited_for*; raises TimeoutError where it takes longer.

    Not `asyncio.wait_for`: before Python 3.12 that loses a cancellation that comes together with the result, and
    whoever was to end goes on (python/cpython#86296).
    """
    async with asyncio.timeout(seconds):
        return await waited_for


async def repeat_every(seconds: float, do: Callable[[], Awaitable[None]]) -> None:
    """Do it again and again, so long after the last time; an error in it is raised here."""
    while True:
        await asyncio.sleep(seconds)
        await do()


async def request_until_answered(bus: Bus, request: Request, *, timeout_s: float = 5.0) -> Any:
    """The answer to *request*, however long its server takes to come up; raises RequestRefused."""
    return await retry(lambda: bus.request(request, timeout_s=timeout_s), on=NoResponse)


async def handle_each(inbox: AsyncIterator[Delivery], handle: Callable[[Any], Awaitable[None]]) -> None:
    """Hand each message to *handle*, in the trace of its sender, and acknowledge it when that is done."""
    async for delivery in inbox:
        with delivery.process():
            await handle(delivery.message)
        await delivery.ack()


class Timers:
    """Things to do at a time, unless something comes before: each is a named task with a parent."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator["Timers"]:
        """Timers for as long as the block runs; those that wait are cancelled at its end."""
        async with asyncio.TaskGroup() as group:
            timers = cls(group)
            try:
                yield timers
            finally:
                timers.cancel_all()

    def at(self, name: str, when: datetime, do: Callable[[], Awaitable[None]]) -> None:
        """Do it at *when*, in the trace of now. A timer of the same name is replaced."""
        self.after(name, max(0.0, (when - datetime.now(UTC)).total_seconds()), do)

    def after(self, name: str, delay_s: float, do: Callable[[], Awaitable[None]]) -> None:
        self.cancel(name)
        self._tasks[name] = self._group.create_task(_run_after(delay_s, do), name=name)

    def waits(self, name: str) -> bool:
        """Whether a timer of this *name* is set and has not gone off."""
        task = self._tasks.get(name)
        return task is not None and not task.done()

    def cancel(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def cancel_all(self) -> None:
        for name in list(self._tasks):
            self.cancel(name)


async def _run_after(delay_s: float, do: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(delay_s)
    await do()
