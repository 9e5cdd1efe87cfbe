"""An event loop whose time is virtual: if nothing is ready, it jumps to the next timer."""

import asyncio
import random
from collections.abc import Callable
from contextvars import Context
from datetime import datetime
from typing import Any

import async_solipsism

from fedbus.simulation.fleet.settings import EPOCH


class VirtualClock:
    """The clock of a virtual loop, and its only source of chance; see `fedbus.common.clock`."""

    def __init__(self, loop: "VirtualLoop", seed: int, starts_at: datetime) -> None:
        self._time = loop.time
        self._start_ns = int(starts_at.timestamp() * 1e9)
        self._random = random.Random(seed)  # noqa: S311 - a simulation

    def time_ns(self) -> int:
        return self._start_ns + round(self._time() * 1e9)

    def monotonic(self) -> float:
        return self._time()

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def random_bits(self, count: int) -> int:
        return self._random.getrandbits(count)


class _Ticks:
    """Virtual time in whole microseconds; each step is at least one, so that no timer is awaited for ever."""

    resolution = 1e-6

    def __init__(self) -> None:
        self._ticks = 0

    def time(self) -> float:
        return self._ticks * 1e-6

    def advance(self, delta: float) -> None:
        self._ticks += max(1, round(delta * 1e6))


class VirtualLoop(async_solipsism.EventLoop):  # type: ignore[misc]  # has no types
    """A loop with virtual time, ids and jitter that *seed* determines. Calls in threads run at once instead."""

    def __init__(self, seed: int = 0, *, starts_at: datetime = EPOCH) -> None:
        super().__init__()
        ticks = _Ticks()
        self._selector.clock = ticks  # it advances the time instead of waiting
        self.time = ticks.time
        self.clock = VirtualClock(self, seed, starts_at)

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Call *callback* soon: only signal handlers use this, since there are no threads."""
        handle: asyncio.Handle = self.call_soon(callback, *args, context=context)
        return handle

    async def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> Any:  # noqa: ARG002
        return func(*args)
