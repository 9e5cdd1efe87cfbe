"""Performs the effects that agents share: messages, replies, timers, log entries and jobs."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from itertools import count
from typing import Generic, TypeAlias, TypeVar, assert_never

from structlog.typing import FilteringBoundLogger

from fedbus.agents.common.asyncio_tools import Timers
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.common.machine import (
    CancelTimer,
    Log,
    Publish,
    Reply,
    RequestId,
    RetryLater,
    StartTimer,
    Timer,
    TimerFired,
)
from fedbus.bus.bus import Bus
from fedbus.common.retry import backoff_s
from fedbus.contracts.message import Body

Event = TypeVar("Event")
Job = TypeVar("Job")

CommonEffect: TypeAlias = Publish | Reply | StartTimer[Timer] | RetryLater[Timer] | CancelTimer[Timer] | Log


@log_method_calls
class EffectRunner(Generic[Event, Job, Timer]):
    """Performs the effects that all agents share, for one machine.

    Timers and jobs are tasks of *timers*: an error in one ends its task group. Their events go to *decide*, like
    those of messages and requests.

    Args:
        bus: Publishes the messages.
        timers: Run the timers, and the jobs under the names of their classes.
        log: Writes the log entries.
        decide: Lets the machine handle an event, and performs its effects.
        result_of: Performs a job and returns the event of its result, or None.
        timer_context: Returns the context variables, trace and cause included, that a timer starts with.

    """

    def __init__(
        self,
        bus: Bus,
        timers: Timers,
        log: FilteringBoundLogger,
        *,
        decide: Callable[[Event | TimerFired[Timer]], Awaitable[None]],
        result_of: Callable[[Job], Awaitable[Event | TimerFired[Timer] | None]],
        timer_context: Callable[[], Context] = copy_context,
    ) -> None:
        self._bus = bus
        self._timers = timers
        self._log = log
        self._decide = decide
        self._result_of = result_of
        self._timer_context = timer_context
        self._request_ids = count(1)
        self._replies: dict[RequestId, asyncio.Future[Body]] = {}

    # --- actions ------------------------------------------------------------------------------------

    async def perform(self, effect: CommonEffect[Timer]) -> None:
        """Perform *effect*, before the next one of its event."""
        match effect:
            case Publish(message=message):
                await self._bus.publish(message)
            case Reply(id=id, body=body):
                if (reply := self._replies.get(id)) is not None and not reply.done():
                    reply.set_result(body)
            case StartTimer(timer=timer, delay_s=delay_s):
                self._start_timer(timer, delay_s)
            case RetryLater(timer=timer, attempt=attempt):
                self._start_timer(timer, backoff_s(attempt))
            case CancelTimer(timer=timer):
                self._timers.cancel(timer)
            case Log(level=level, event=text, data=data):
                getattr(self._log, level)(text, **data)
            case _:
                assert_never(effect)

    def _start_timer(self, timer: Timer, delay_s: float) -> None:
        fire = partial(self._decide, TimerFired(timer))
        self._timer_context().run(self._timers.schedule_after, timer, delay_s, fire)

    # --- jobs ---------------------------------------------------------------------------------------

    def start_job(self, job: Job) -> None:
        """Run *job* in its own task, in the current trace. It cancels a running job of the same class."""
        self._timers.schedule_after(type(job).__name__, 0.0, partial(self._do, job))

    def cancel_job(self, kind: type[Job]) -> None:
        """Cancel the job of the class *kind*, if one is running."""
        self._timers.cancel(kind.__name__)

    async def _do(self, job: Job) -> None:
        if (result := await self._result_of(job)) is not None:
            await self._decide(result)

    # --- requests -----------------------------------------------------------------------------------

    async def ask(self, request: Callable[[RequestId], Event]) -> Body:
        """Let the machine handle a request, and return its reply."""
        request_id = RequestId(next(self._request_ids))
        reply: asyncio.Future[Body] = asyncio.get_running_loop().create_future()
        self._replies[request_id] = reply
        try:
            await self._decide(request(request_id))
            return await reply
        except Exception as error:  # nats-py would only log it: a half-performed decision ends the task group
            self._timers.schedule_after("failed decision", 0.0, partial(_raise, error))
            raise
        finally:
            del self._replies[request_id]


async def _raise(error: Exception) -> None:
    raise error
