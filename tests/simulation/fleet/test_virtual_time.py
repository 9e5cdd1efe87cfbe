"""Virtual time: it jumps to the next timer, and a seed determines times, ids and pauses."""

import asyncio
import time
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from fedbus.common import clock
from fedbus.common.retry import backoff_s
from fedbus.contracts.envelope import id_timestamp, uuid7
from fedbus.simulation.fleet.settings import EPOCH
from fedbus.simulation.fleet.virtual_time import VirtualLoop

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], seed: int = 0) -> T:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(seed)) as runner:
        return runner.run(work)


async def sleep_a_day() -> timedelta:
    before = clock.now()
    await asyncio.sleep(86_400.0 - 1)
    return clock.now() - before


def test_a_day_of_virtual_time_takes_no_time() -> None:
    start = time.monotonic()
    assert run(sleep_a_day()) == timedelta(days=1, seconds=-1)
    assert time.monotonic() - start < 5


async def random_values() -> list[str]:
    return [uuid7(), f"{backoff_s(3)}", f"{clock.random_bits(64)}"]


def test_a_seed_determines_ids_and_pauses() -> None:
    assert run(random_values(), seed=1) == run(random_values(), seed=1)
    assert run(random_values(), seed=1) != run(random_values(), seed=2)


def test_an_id_has_the_virtual_time() -> None:
    async def make() -> str:
        await asyncio.sleep(60)
        return uuid7()

    assert id_timestamp(run(make())) == EPOCH + timedelta(seconds=60)


def test_a_call_in_a_thread_runs_at_once() -> None:
    async def call() -> tuple[int, float]:
        value = await asyncio.to_thread(lambda: 7)
        return value, asyncio.get_running_loop().time()

    assert run(call()) == (7, 0.0)


def test_outside_a_loop_the_time_is_that_of_the_system() -> None:
    assert abs(clock.time_s() - time.time()) < 5


def test_timers_closer_than_a_microsecond_all_fire() -> None:
    async def wait() -> int:
        loop, fired = asyncio.get_running_loop(), list[int]()
        for number in range(5):
            loop.call_at(1.0 + number * 1e-8, fired.append, number)
        await asyncio.sleep(2)
        return len(fired)

    assert run(wait()) == 5
