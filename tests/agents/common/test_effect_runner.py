"""The effects that all agents share, performed without a bus and without an agent."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, cast

import pytest
import structlog
from structlog.testing import capture_logs
from support.waiting import eventually

from fedbus.agents.common.asyncio_tools import Timers
from fedbus.agents.common.effect_runner import EffectRunner
from fedbus.agents.common.machine import (
    CancelTimer,
    Log,
    Publish,
    Reply,
    RequestId,
    RetryLater,
    StartTimer,
    TimerFired,
)
from fedbus.bus.bus import Bus
from fedbus.contracts.client import ClientDeclined
from fedbus.contracts.message import Body, Message, Refused

TRACE: ContextVar[str] = ContextVar("TRACE", default="no trace")
REFUSED = Refused(reason="the kitchen is closed")


class KitchenTimer(StrEnum):
    OVEN = "oven"
    TEA = "tea"


@dataclass(frozen=True)
class Ordered:
    """A request for a dish."""

    id: RequestId


@dataclass(frozen=True)
class Cooked:
    """The result of `Cook`."""

    dish: str


@dataclass(frozen=True)
class Cook:
    """A job with the result *result*, or with an error."""

    result: Cooked | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Simmer:
    """A job that does not end."""


KitchenEvent: TypeAlias = Ordered | Cooked | TimerFired[KitchenTimer]
KitchenJob: TypeAlias = Cook | Simmer


class RecordingBus:
    def __init__(self) -> None:
        self.published: list[Message] = []

    async def publish(self, message: Message) -> None:
        self.published.append(message)


class Kitchen:
    """An agent that records each event, with the trace that it is handled in."""

    def __init__(self, timers: Timers, timer_context: Callable[[], Context]) -> None:
        self.bus = RecordingBus()
        self.handled: list[tuple[KitchenEvent, str]] = []
        self.cancelled_jobs: list[KitchenJob] = []
        self.running_jobs: list[KitchenJob] = []
        self.reply: Body | None = REFUSED
        self.error: Exception | None = None
        self.runner: EffectRunner[KitchenEvent, KitchenJob, KitchenTimer] = EffectRunner(
            cast("Bus", self.bus),
            timers,
            structlog.get_logger(),
            decide=self.decide,
            result_of=self.result_of,
            timer_context=timer_context,
        )

    async def decide(self, event: KitchenEvent) -> None:
        self.handled.append((event, TRACE.get()))
        if self.error is not None:
            raise self.error
        if isinstance(event, Ordered) and self.reply is not None:
            await self.runner.perform(Reply(event.id, self.reply))

    async def result_of(self, job: KitchenJob) -> Cooked | None:
        self.running_jobs.append(job)
        try:
            if isinstance(job, Simmer):
                await asyncio.Event().wait()
            elif job.error is not None:
                raise job.error
            return job.result if isinstance(job, Cook) else None
        except asyncio.CancelledError:
            self.cancelled_jobs.append(job)
            raise
        finally:
            self.running_jobs.remove(job)


@asynccontextmanager
async def open_kitchen(timer_context: Callable[[], Context] = copy_context) -> AsyncIterator[Kitchen]:
    async with Timers.open() as timers:
        yield Kitchen(timers, timer_context)


# --- actions ----------------------------------------------------------------------------------------


async def test_a_message_is_published_before_the_next_effect() -> None:
    message = ClientDeclined(task="kitchen", client="c1", run="r1", reason="busy")
    async with open_kitchen() as kitchen:
        await kitchen.runner.perform(Publish(message))

        assert kitchen.bus.published == [message]


async def test_a_log_entry_has_the_level_and_the_data_of_its_effect() -> None:
    with capture_logs() as lines:
        async with open_kitchen() as kitchen:
            await kitchen.runner.perform(Log("warning", "Oven too hot", {"dish": "pie"}))

    assert lines == [{"event": "Oven too hot", "log_level": "warning", "dish": "pie"}]


# --- timers -----------------------------------------------------------------------------------------


async def test_a_timer_fires_as_an_event_in_the_current_trace() -> None:
    TRACE.set("dinner")
    async with open_kitchen() as kitchen:
        await kitchen.runner.perform(StartTimer(KitchenTimer.OVEN, 0.0))
        await eventually(lambda: bool(kitchen.handled))

    assert kitchen.handled == [(TimerFired(KitchenTimer.OVEN), "dinner")]


async def test_timers_may_fire_outside_the_current_trace() -> None:
    TRACE.set("dinner")
    async with open_kitchen(timer_context=Context) as kitchen:
        await kitchen.runner.perform(StartTimer(KitchenTimer.OVEN, 0.0))
        await eventually(lambda: bool(kitchen.handled))

    assert kitchen.handled == [(TimerFired(KitchenTimer.OVEN), "no trace")]


async def test_a_retry_fires_after_the_backoff_of_its_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    backoffs = {3: 0.0}
    monkeypatch.setattr("fedbus.agents.common.effect_runner.backoff_s", backoffs.__getitem__)
    async with open_kitchen() as kitchen:
        await kitchen.runner.perform(RetryLater(KitchenTimer.TEA, 3))
        await eventually(lambda: bool(kitchen.handled))

    assert kitchen.handled == [(TimerFired(KitchenTimer.TEA), "no trace")]


async def test_a_cancelled_or_replaced_timer_does_not_fire() -> None:
    async with open_kitchen() as kitchen:
        for effect in (
            StartTimer(KitchenTimer.TEA, 0.0),
            StartTimer(KitchenTimer.OVEN, 0.0),
            CancelTimer(KitchenTimer.TEA),
            StartTimer(KitchenTimer.OVEN, 0.0),
        ):
            await kitchen.runner.perform(effect)
        await eventually(lambda: bool(kitchen.handled))

    assert [event for event, _ in kitchen.handled] == [TimerFired(KitchenTimer.OVEN)]


# --- jobs -------------------------------------------------------------------------------------------


async def test_the_result_of_a_job_is_an_event_in_its_trace() -> None:
    async with open_kitchen() as kitchen:
        TRACE.set("dinner")
        kitchen.runner.start_job(Cook(Cooked("pie")))
        TRACE.set("tea")
        await eventually(lambda: bool(kitchen.handled))

    assert kitchen.handled == [(Cooked("pie"), "dinner")]


async def test_a_job_without_a_result_is_no_event() -> None:
    async with open_kitchen() as kitchen:
        kitchen.runner.start_job(Cook(result=None))
        await kitchen.runner.perform(StartTimer(KitchenTimer.TEA, 0.0))
        await eventually(lambda: bool(kitchen.handled))

    assert [event for event, _ in kitchen.handled] == [TimerFired(KitchenTimer.TEA)]


async def test_a_job_replaces_the_running_job_of_its_class() -> None:
    async with open_kitchen() as kitchen:
        kitchen.runner.start_job(Simmer())
        await eventually(lambda: bool(kitchen.running_jobs))
        kitchen.runner.start_job(Cook(Cooked("pie")))
        kitchen.runner.start_job(Simmer())
        await eventually(lambda: bool(kitchen.handled and kitchen.cancelled_jobs and kitchen.running_jobs))

        assert kitchen.cancelled_jobs == [Simmer()]


async def test_cancelling_a_job_leaves_those_of_other_classes() -> None:
    async with open_kitchen() as kitchen:
        kitchen.runner.start_job(Simmer())
        await eventually(lambda: bool(kitchen.running_jobs))
        kitchen.runner.cancel_job(Cook)
        kitchen.runner.start_job(Cook(Cooked("pie")))
        await eventually(lambda: bool(kitchen.handled))
        assert not kitchen.cancelled_jobs

        kitchen.runner.cancel_job(Simmer)
        await eventually(lambda: kitchen.cancelled_jobs == [Simmer()])


async def test_pending_timers_and_jobs_end_with_their_task_group() -> None:
    async with open_kitchen() as kitchen:
        kitchen.runner.start_job(Simmer())
        await kitchen.runner.perform(StartTimer(KitchenTimer.OVEN, 3600.0))
        await eventually(lambda: bool(kitchen.running_jobs))

    assert kitchen.cancelled_jobs == [Simmer()]
    assert not kitchen.handled


async def test_the_error_of_a_job_ends_the_task_group() -> None:
    error = RuntimeError("the oven is broken")

    async def start_job() -> None:
        async with open_kitchen() as kitchen:
            kitchen.runner.start_job(Cook(error=error))
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup) as raised:
        await start_job()
    assert raised.value.exceptions == (error,)


# --- requests ---------------------------------------------------------------------------------------


async def test_each_request_gets_the_reply_to_its_own_id() -> None:
    async with open_kitchen() as kitchen:
        assert await kitchen.runner.ask(Ordered) == REFUSED
        assert await kitchen.runner.ask(Ordered) == REFUSED

    assert [event for event, _ in kitchen.handled] == [Ordered(RequestId(1)), Ordered(RequestId(2))]


async def test_a_request_waits_for_a_reply_of_a_later_event() -> None:
    async with open_kitchen() as kitchen:
        kitchen.reply = None
        request = asyncio.create_task(kitchen.runner.ask(Ordered))
        await eventually(lambda: bool(kitchen.handled))
        assert not request.done()

        await kitchen.runner.perform(Reply(RequestId(1), REFUSED))
        assert await request == REFUSED


async def test_a_second_or_a_late_reply_is_ignored() -> None:
    async with open_kitchen() as kitchen:
        kitchen.reply = None
        request = asyncio.create_task(kitchen.runner.ask(Ordered))
        await eventually(lambda: bool(kitchen.handled))
        for _ in range(2):
            await kitchen.runner.perform(Reply(RequestId(1), REFUSED))
        assert await request == REFUSED

        await kitchen.runner.perform(Reply(RequestId(1), REFUSED))


async def test_a_failed_decision_on_a_request_ends_the_task_group() -> None:
    error = RuntimeError("the oven is broken")

    async def ask() -> None:
        async with open_kitchen() as kitchen:
            kitchen.error = error
            with pytest.raises(RuntimeError, match="the oven is broken"):
                await kitchen.runner.ask(Ordered)
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup) as raised:
        await ask()
    assert raised.value.exceptions == (error,)
