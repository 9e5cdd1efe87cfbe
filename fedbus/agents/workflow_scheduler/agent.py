"""The workflow scheduler agent: performs what `SchedulerMachine` decides for one task.

A task may have several schedulers. The one that holds the lease leads; the others wait for it. A leader that was
frozen is rejected at its first transition, because the one that took over has moved the schedule, and then waits for
the lease again.

Every message, request, timer and result is an event. One event at a time is handled: its effects are performed before
the next one is decided on; a message is acknowledged after it was handled. Jobs run in tasks of their own, and their
results are events.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import Context as Variables
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, assert_never

import structlog
from opentelemetry import trace
from opentelemetry.context import Context

from fedbus import __version__
from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import Timers, handle_each, request_until_answered, run_until
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.common.effect_runner import EffectRunner
from fedbus.agents.common.machine import (
    CancelTimer,
    Log,
    Reply,
    RetryLater,
    StartTimer,
)
from fedbus.agents.workflow_scheduler.effects import (
    CancelOpening,
    CancelServerRun,
    Cause,
    CreateRun,
    CreateSchedule,
    Effect,
    FollowOtherTasks,
    Job,
    JoinRunTrace,
    LoadCodeAtStartup,
    LoadDeployedCode,
    LoadRun,
    MoveRun,
    MoveSchedule,
    Query,
    RequestCancellation,
    RequestOpening,
    Trace,
    TracedEffect,
)
from fedbus.agents.workflow_scheduler.events import (
    CancellationAnswered,
    CodeResult,
    DeployedCodeLoaded,
    DeployedCodeRejected,
    DeployedCodeUnavailable,
    Event,
    OpeningAnswered,
    OtherRunMoved,
    RunStartRequested,
    RunStopRequested,
    SchedulerStarted,
    SchedulerTimer,
    ServiceStarted,
    TimedMessage,
    TriggerMessageReceived,
)
from fedbus.agents.workflow_scheduler.machine import SchedulerConfig, SchedulerMachine
from fedbus.agents.workflow_scheduler.records import ScheduleRecord
from fedbus.agents.workflow_scheduler.runs import SCHEDULED
from fedbus.agents.workflow_scheduler.trigger_inputs import TRIGGER_MESSAGES
from fedbus.bus.bus import Bus, Delivery, Handler
from fedbus.bus.errors import LeaseLost, NoResponse, RequestRefused, StaleOwner
from fedbus.bus.lease import Lease
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.common import clock
from fedbus.common.retry import RetryBackoff
from fedbus.contracts import subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.causation import cause_scope
from fedbus.contracts.message import Body, Request
from fedbus.contracts.run import (
    RUN,
    RunChanges,
    RunData,
    RunEvent,
    RunOverrides,
    RunState,
    StartRun,
    StopRun,
)
from fedbus.contracts.scheduling import (
    SCHEDULE,
    ScheduleChanges,
    ScheduleData,
    ScheduleEvent,
    ScheduleOverrides,
    ScheduleState,
)
from fedbus.contracts.server import SERVER, CancelRun, OpenRun
from fedbus.contracts.task.task import Task
from fedbus.contracts.telemetry import get_tracer
from fedbus.contracts.transition import Transition
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    DirectoryCodeRepository,
)

AGENT: Final = AgentName.WORKFLOW_SCHEDULER
INPUTS_CONSUMER: Final = AgentName.WORKFLOW_SCHEDULER_INPUTS
SERVER_REPLY_S: Final = 45.0
"""The limit of one reply of the server manager to open_run and cancel_run."""

RunHandle: TypeAlias = LifecycleHandle[RunState, RunEvent, RunData, RunChanges]
ScheduleHandle: TypeAlias = LifecycleHandle[ScheduleState, ScheduleEvent, ScheduleData, ScheduleChanges]

log = structlog.get_logger("fedbus.workflow_scheduler")
tracer = get_tracer("fedbus.workflow_scheduler")


@log_method_calls
class WorkflowScheduler:
    """The scheduler of one task.

    Args:
        bus: The bus, as the workflow scheduler.
        task: The task, at the version that the scheduler is started with.
        overrides: Replace values of the task's plan.
        schedule: Replace values of the task's schedule.
        code: The repository of the task's code; None: the directory of *task*, which does not change.

    """

    def __init__(
        self,
        bus: Bus,
        task: Task,
        *,
        overrides: RunOverrides | None = None,
        schedule: ScheduleOverrides | None = None,
        code: CodeRepository | None = None,
    ) -> None:
        self._bus = bus
        self._task = task
        self._config = SchedulerConfig(task, overrides or RunOverrides(), schedule or ScheduleOverrides())
        self._code = code or DirectoryCodeRepository(Path(task.path), open_library)
        self.ready = asyncio.Event()
        """Set while this scheduler leads."""

    async def run(self, stop: asyncio.Event) -> None:
        """Schedule until *stop* is set. The current run continues, and the next leader follows it."""
        await self._bus.create_streams()
        backoff = RetryBackoff()
        while not stop.is_set():
            try:
                await run_until(stop, self._lead())
            except* (LeaseLost, StaleOwner) as lost:
                log.warning("Another scheduler leads; waiting for the lease", reason=str(_first_error(lost)))
                self.ready.clear()
            await backoff.pause(stop)

    async def _lead(self) -> None:
        """Wait for the lease, and schedule for as long as this scheduler holds it."""
        async with (
            Lease.acquire(self._bus, task=self._task.id, agent=AGENT) as lease,
            LifecycleStore.open(self._bus) as lifecycles,
            Timers.open() as timers,
            self._bus.consume(AGENT, task=self._task.id) as server,
            self._bus.consume(INPUTS_CONSUMER, task=self._task.id) as inputs,
        ):
            leadership = _Leadership(self._bus, self._config, self._code, lifecycles, timers)
            await leadership.run(lease, server, inputs, self.ready)


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@log_method_calls
class _Leadership:
    """One machine, from the moment the scheduler gets the lease until it loses it."""

    _machine: SchedulerMachine
    _schedule: ScheduleHandle
    _run: RunHandle

    def __init__(
        self,
        bus: Bus,
        config: SchedulerConfig,
        code: CodeRepository,
        lifecycles: LifecycleStore,
        timers: Timers,
    ) -> None:
        self._bus = bus
        self._config = config
        self._task = config.task.id
        self._code = code
        self._lives = lifecycles
        self._runner: EffectRunner[Event, Job, SchedulerTimer] = EffectRunner(
            bus,
            timers,
            log,
            decide=self._decide,
            result_of=self._result_of,
            timer_context=Variables,  # empty: the trace and the cause of an event do not lead to its timers
        )
        self._decisions = asyncio.Lock()
        """Held while one event is handled."""
        self._due_trace = ""
        """The trace of a due run whose schedule has none, because an older fedbus wrote it."""

    async def run(
        self,
        lease: Lease,
        server: AsyncIterator[Delivery],
        inputs: AsyncIterator[Delivery],
        ready: asyncio.Event,
    ) -> None:
        await self._decide(await self._load(lease.holder))
        ask = self._runner.ask
        handlers: dict[type[Request[Body]], Handler] = {
            StartRun: lambda request: ask(lambda request_id: RunStartRequested(request_id, request)),
            StopRun: lambda request: ask(lambda request_id: RunStopRequested(request_id, request)),
        }
        async with self._bus.serve(handlers, task=self._task, version=__version__):
            ready.set()
            await self._decide(ServiceStarted())
            async with asyncio.TaskGroup() as group:
                on_transition = partial(self._on_server_transition, lease)
                group.create_task(handle_each(server, on_transition), name="follow the server")
                group.create_task(self._consume(inputs), name="consume what triggers read")

    async def _load(self, holder: str) -> SchedulerStarted:
        """Read the log, and make the machine."""
        now = clock.now()
        self._schedule = await self._lives.load(
            SCHEDULE, ScheduleData(task=self._task, since=now, clock_since=now)
        )
        schedule = self._schedule
        record = ScheduleRecord(
            schedule.state, schedule.data, schedule.event or SCHEDULE.creation, schedule.reason
        )
        self._machine = SchedulerMachine(self._config, record if schedule.exists else None, holder=holder)
        wanted = [subjects.wildcard_for(self._bus.fed, kind, task=self._task) for kind in TRIGGER_MESSAGES]
        messages = await self._bus.last_per_subject(events_stream(self._bus.fed), wanted)
        server = await self._bus.current_states(SERVER.kind, self._task)
        runs = await self._bus.last_transitions(RUN.kind)
        return SchedulerStarted(_timed(messages), server[-1] if server else None, _timed(runs))

    # --- events -------------------------------------------------------------------------------------

    async def _on_server_transition(self, lease: Lease, transition: Transition) -> None:
        """Let the machine handle a transition of the server, if this scheduler still leads.

        A scheduler that was disconnected may get one before it notices that another one leads. It knows no run of that
        leader, so it must neither act on the transition nor acknowledge it.
        """
        await lease.check()
        await self._decide(transition)

    async def _consume(self, inputs: AsyncIterator[Delivery]) -> None:
        """Handle the messages that triggers read. They are many, so their traces do not continue here.

        The lease is not checked for each: a leader reads the last of each kind and sender when it starts.
        """
        async for delivery in inputs:
            with cause_scope(delivery.envelope.id):
                await self._decide(TriggerMessageReceived(delivery.message, delivery.envelope.time))
            await delivery.ack()

    async def _decide(self, event: Event) -> None:
        """Let the machine handle *event*, and perform the effects."""
        async with self._decisions:
            with ExitStack() as traces:
                events = [event]
                while events:
                    for effect in self._machine.handle(events.pop(0), clock.now()):
                        if isinstance(effect, JoinRunTrace):
                            traces.enter_context(tracing.link_and_use_trace(self._run.data.traceparent))
                        elif (result := await self._perform(effect)) is not None:
                            events.append(result)

    # --- effects ------------------------------------------------------------------------------------

    async def _perform(self, effect: Effect) -> Event | None:
        """Perform *effect*; the result of a query."""
        match effect:
            case CreateSchedule(data=data):
                self._schedule = await self._lives.load(SCHEDULE, data)
                await self._schedule.create()
            case MoveSchedule():
                await self._move_schedule(effect)
            case LoadRun(data=data):
                self._run = await self._lives.load(RUN, data)
            case CreateRun():
                await self._create_run(effect)
            case MoveRun(event=event, changes=changes, reason=reason):
                await self._run.transition(event, changes, reason=reason)
            case JoinRunTrace():
                pass  # `_decide` has joined it
            case CancelOpening():
                self._runner.cancel_job(RequestOpening)
            case Reply() | StartTimer() | RetryLater() | CancelTimer() | Log():
                await self._runner.perform(effect)
            case LoadCodeAtStartup() | RequestCancellation():
                return await self._query(effect)
            case _:
                self._start_job(effect)
        return None

    async def _move_schedule(self, effect: MoveSchedule) -> None:
        with self._scope(effect):
            changes: ScheduleChanges = effect.changes
            if effect.trace is Trace.NEW_TRACE:
                changes = {**changes, "traceparent": tracing.current_traceparent()}
                self._due_trace = ""
            await self._schedule.transition(
                effect.event, changes, reason=effect.reason, deadline=effect.deadline
            )

    async def _create_run(self, effect: CreateRun) -> None:
        with self._scope(effect):
            span = trace.get_current_span()
            span.set_attribute("fedbus.run", effect.data.run)
            ids = {
                "trace_id": f"{span.get_span_context().trace_id:032x}",
                "traceparent": tracing.current_traceparent(),
            }
            run = await self._lives.load(RUN, effect.data.model_copy(update=ids))
            if run.exists:  # another scheduler leads, and has created it
                raise StaleOwner(RUN.kind, effect.data.run)
            await run.create(reason=effect.reason)
            self._run = run

    async def _query(self, query: Query) -> Event:
        match query:
            case LoadCodeAtStartup(version=version):
                return await self._load_code(version)
            case RequestCancellation(id=id, request=request):
                return CancellationAnswered(id, request.run, await self._cancel(request))
            case _:
                assert_never(query)

    # --- traces and causes --------------------------------------------------------------------------

    @contextmanager
    def _scope(self, effect: TracedEffect) -> Iterator[None]:
        """Publish inside in the trace and by the cause of *effect*."""
        with self._trace_of(effect), self._cause_of(effect):
            yield

    def _trace_of(self, effect: TracedEffect) -> AbstractContextManager[object]:
        match effect.trace:
            case Trace.EVENT:
                return nullcontext()
            case Trace.NEW_SPAN:
                trigger = effect.data.trigger if isinstance(effect, CreateRun) else SCHEDULED
                return tracer.start_as_current_span(f"run by {trigger}")
            case Trace.NEW_TRACE:
                return _new_run_trace()
            case Trace.DUE_RUN:
                return self._use_due_trace()
            case Trace.RUN:
                return tracing.use_trace(self._run.data.traceparent)
            case Trace.NONE:
                return tracing.detached_trace()
            case _:
                assert_never(effect.trace)

    @contextmanager
    def _use_due_trace(self) -> Iterator[None]:
        if traceparent := self._schedule.data.traceparent or self._due_trace:
            with tracing.use_trace(traceparent):
                yield
            return
        with _new_run_trace():
            self._due_trace = tracing.current_traceparent()
            yield

    def _cause_of(self, effect: TracedEffect) -> AbstractContextManager[None]:
        match effect.cause:
            case Cause.EVENT:
                return nullcontext()
            case Cause.SCHEDULE:
                return cause_scope(self._schedule.last_message_id)
            case Cause.RUN:
                return cause_scope(self._run.last_message_id)
            case _:
                assert_never(effect.cause)

    # --- jobs ---------------------------------------------------------------------------------------

    def _start_job(self, job: Job) -> None:
        """Run *job* in its own task, with the trace and the cause that it names, else with neither."""
        if isinstance(job, TracedEffect):
            with self._scope(job):
                self._runner.start_job(job)
        else:
            Variables().run(self._runner.start_job, job)

    async def _result_of(self, job: Job) -> Event | None:
        match job:
            case RequestOpening(request=request):
                return OpeningAnswered(request.run, await self._open(request))
            case CancelServerRun(request=request):
                if refusal := await self._cancel(request):
                    log.warning("Run not cancelled", run=request.run, reason=refusal)
                return None
            case LoadDeployedCode(version=version):
                return await self._load_code(version)
            case FollowOtherTasks():
                await self._follow_other_tasks()
                return None
            case _:
                assert_never(job)

    async def _open(self, request: OpenRun) -> str:
        """Request the server manager to open the run. Return the reason of a refusal, else an empty string."""
        try:
            await request_until_answered(self._bus, request, timeout_s=SERVER_REPLY_S)
        except RequestRefused as error:
            return str(error)
        return ""

    async def _cancel(self, request: CancelRun) -> str:
        """Request the server manager to cancel the run. Return why it did not, else an empty string."""
        try:
            await self._bus.request(request, timeout_s=SERVER_REPLY_S)
        except (RequestRefused, NoResponse) as error:
            return str(error)
        return ""

    async def _load_code(self, version: str) -> CodeResult:
        try:
            return DeployedCodeLoaded(await self._code.load_task(version))
        except CodeRejected as error:
            return DeployedCodeRejected(version, str(error))
        except CodeUnavailable as error:
            return DeployedCodeUnavailable(version, str(error))

    async def _follow_other_tasks(self) -> None:
        """Handle the last transition of each run, and then all that follow."""
        wanted = [subjects.lifecycle(self._bus.fed, "run", "*")]
        async with self._bus.read_stream(lifecycle_stream(self._bus.fed), wanted) as transitions:
            for stored in await self._bus.last_transitions(RUN.kind):
                await self._handle_run(stored)
            async for stored in transitions:
                await self._handle_run(stored)

    async def _handle_run(self, stored: StoredMessage) -> None:
        with cause_scope(stored.envelope.id):
            await self._decide(OtherRunMoved(stored.message, stored.envelope.time))


def _new_run_trace() -> AbstractContextManager[object]:
    """Begin the trace of a run that the schedule starts: independent of the current one, which it has a link to."""
    return tracer.start_as_current_span(
        f"run by {SCHEDULED}", Context(), links=tracing.links_to(tracing.current_traceparent())
    )


def _timed(messages: list[StoredMessage]) -> tuple[TimedMessage, ...]:
    return tuple(TimedMessage(one.message, one.envelope.time) for one in messages)
