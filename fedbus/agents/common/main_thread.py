"""Blocking calls in the main thread of a process whose event loop runs in another thread.

The code of a task may need the main thread: only there do `signal.signal` and `asyncio.run` with signals work, and
libraries check for it.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from queue import SimpleQueue
from threading import Event
from typing import Final, ParamSpec, TypeVar

import structlog

P = ParamSpec("P")
T = TypeVar("T")

UNWIND_S: Final = 1.0
"""The time that blocking code has for its clean-up after the event loop has ended, in seconds."""

log = structlog.get_logger("fedbus.main_thread")


class MainThread:
    """Runs calls of the event loop in the main thread, one at a time."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._at_end: list[Callable[[], None]] = []
        self._ended = Event()
        self._released = Event()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in the main thread, in the caller's context, and return its result.

        If the caller is cancelled, a call that has begun continues.
        """
        context, future = copy_context(), Future[T]()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    result = context.run(function, *args, **kwargs)
                except BaseException as error:  # noqa: BLE001 - the caller gets it
                    future.set_exception(error)
                else:
                    future.set_result(result)

        self._calls.put(call)
        return await asyncio.wrap_future(future)

    def at_end(self, function: Callable[[], None]) -> None:
        """Call *function* in the main thread before the process ends, unless the main thread is blocked then."""
        self._at_end.append(function)

    def serve(self) -> None:
        """Run the calls until `end`, and return after `release`. Called in the main thread."""
        while (call := self._calls.get()) is not None:
            call()
        for function in reversed(self._at_end):
            try:
                function()
            except Exception as error:
                log.warning("Clean-up failed", exc_info=error)
        self._ended.set()
        self._released.wait()

    def end(self) -> bool:
        """End `serve`, and wait at most `UNWIND_S` for the current call and the clean-up. Return whether it ended."""
        self._calls.put(None)
        return self._ended.wait(UNWIND_S)

    def release(self) -> None:
        """Let `serve` return."""
        self._released.set()
