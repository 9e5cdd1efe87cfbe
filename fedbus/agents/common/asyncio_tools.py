"""Structured-concurrency helpers that asyncio 3.11 does not have, and the message loop of an agent."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fedbus.bus.bus import Bus, Delivery
from fedbus.bus.errors import NoResponse
from fedbus.common.retry import retry
from fedbus.contracts.message import Body, Request

T = TypeVar("T")
ReplyT = TypeVar("ReplyT", bound=Body)


async def wait_for_first(*choices: Awaitable[Any]) -> None:
    """Wait for the first of *choices*, and cancel the others before returning; an error in the first is raised."""
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
    """Run *work* until *stop* is set; an error in it is raised."""
    await wait_for_first(stop.wait(), work)


async def wait_within(seconds: float, awaitable: Awaitable[T]) -> T:
    """Await *awaitable*; raises TimeoutError if it takes longer than *seconds*.

    Unlike `asyncio.wait_for` before Python 3.12, this does not lose a cancellation that arrives together with the
    result (python/cpython#86296).
    """
    async with asyncio.timeout(seconds):
        return await awaitable


async def repeat_every(seconds: float, do: Callable[[], Awaitable[None]]) -> None:
    """Call *do* repeatedly, with a pause of *seconds* before each call; an error in it is raised."""
    while True:
        await asyncio.sleep(seconds)
        await do()


async def request_until_answered(bus: Bus, request: Request[ReplyT], *, timeout_s: float = 5.0) -> ReplyT:
    """Send *request* until it is answered, without limit, and return the reply; raises RequestRefused."""
    return await retry(lambda: bus.request(request, timeout_s=timeout_s), on=NoResponse)


async def handle_each(inbox: AsyncIterator[Delivery], handle: Callable[[Any], Awaitable[None]]) -> None:
    """Call *handle* with each message, in the trace of its sender, and acknowledge the message afterwards."""
    async for delivery in inbox:
        with delivery.process():
            await handle(delivery.message)
        await delivery.ack()


class Timers:
    """Named timers; each is a task of one task group."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator["Timers"]:
        """Run timers for the duration of the block; pending ones are cancelled at its end."""
        async with asyncio.TaskGroup() as group:
            timers = cls(group)
            try:
                yield timers
            finally:
                timers.cancel_all()

    def schedule_after(self, name: str, delay_s: float, do: Callable[[], Awaitable[None]]) -> None:
        """Call *do* after *delay_s*, in the current trace. A timer of the same name is replaced."""
        self.cancel(name)
        self._tasks[name] = self._group.create_task(_run_after(delay_s, do), name=name)

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
