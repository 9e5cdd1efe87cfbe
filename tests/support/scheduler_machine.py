"""A `SchedulerMachine` with the log that its effects write, and the values of its events. No bus, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from fedbus.agents.common.machine import Reply, RequestId, TimerFired
from fedbus.agents.workflow_scheduler.effects import (
    CreateRun,
    CreateSchedule,
    Effect,
    MoveRun,
    MoveSchedule,
)
from fedbus.agents.workflow_scheduler.events import (
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
from fedbus.agents.workflow_scheduler.records import RunRecord, ScheduleRecord
from fedbus.contracts.code import CodePublished
from fedbus.contracts.message import Body, Message
from fedbus.contracts.run import RUN, RoundResult, RunData, RunEvent, RunOverrides, RunPlan, StartRun, StopRun
from fedbus.contracts.scheduling import SCHEDULE, ScheduleData, ScheduleOverrides, ScheduleState
from fedbus.contracts.server import SERVER, ServerData, ServerEvent, ServerState
from fedbus.contracts.serving import DataChecked, DataCounted, DriftDetected, LiveAccuracy
from fedbus.contracts.task.task import Task
from fedbus.contracts.transition import Transition
from support.lifecycle_coverage import OBSERVED
from support.server_machine import NAME, NOW, OLD, model, task_at

FIRST_RUN, SECOND_RUN = f"{NAME}-1", f"{NAME}-2"


def counted(client: str, labelled: int, *, ever: int | None = None, database: str = "") -> DataCounted:
    return DataCounted(
        task=NAME,
        client=client,
        labelled=labelled,
        unlabelled=0,
        labelled_ever=ever,
        database=database,
    )


def drift(client: str) -> DriftDetected:
    return DriftDetected(task=NAME, client=client, of="inputs", feature="mean", score=0.5)


def checked(client: str, *, drifting: bool) -> DataChecked:
    return DataChecked(task=NAME, client=client, rows=200, drifting=drifting)


def live_accuracy(client: str, right: int, *, version: int = 2, labelled: int = 100) -> DataChecked:
    """A check of a client that serves version 2, with the accuracy of *version*."""
    live = (LiveAccuracy(version=version, labelled=labelled, right=right),)
    return DataChecked(task=NAME, client=client, rows=200, serving=2, live=live)


def code_published(version: str) -> CodePublished:
    return CodePublished(task=NAME, code_version=version)


def run_data(run: str = FIRST_RUN, **data: Any) -> RunData:
    known = {"task": run.rpartition("-")[0], "run": run, "plan": RunPlan(), "requested_at": NOW}
    return RunData.model_validate(known | data)


def run_transition(data: RunData, *events: RunEvent) -> Transition:
    """The last transition of a run after *events*."""
    state, source, event = RUN.initial, "", RUN.creation
    for event in events:
        source, state = str(state), RUN.advance(state, event)
    return Transition(task=data.task, event=event, source=source, target=state, facts=data)


class ServerLog:
    """The lifecycle of the task's server."""

    def __init__(self) -> None:
        self.state = ServerState.MODEL_INIT
        self.data = ServerData(task=NAME)
        self.last: Transition | None = None

    def move(self, event: ServerEvent, *, reason: str = "", **changes: Any) -> Transition:
        source, self.state = self.state, SERVER.advance(self.state, event)
        self.data = SERVER.change(event, self.data, changes)  # type: ignore[arg-type]
        self.last = Transition(
            task=NAME, event=event, source=source, target=self.state, reason=reason, facts=self.data
        )
        return self.last


@dataclass
class SchedulerDriver:
    """Hands events to a machine, checks it after each, and keeps the log that its effects write.

    The machine is replaced at a restart, and reads the log.
    """

    task: Task
    overrides: RunOverrides = field(default_factory=RunOverrides)
    schedule_overrides: ScheduleOverrides = field(default_factory=ScheduleOverrides)
    now: datetime = NOW
    server: ServerLog = field(default_factory=ServerLog)
    schedule: ScheduleRecord | None = None
    runs: list[RunRecord] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    arrows: set[tuple[str, str, str]] = field(default_factory=set)
    """The transitions so far: kind, state and event."""
    _messages: dict[tuple[type[Message], str], TimedMessage] = field(default_factory=dict)
    _ends: dict[str, datetime] = field(default_factory=dict)
    _requests: int = 0
    machine: SchedulerMachine = field(init=False)

    # --- the start ----------------------------------------------------------------------------------

    def start(self, holder: str = "first", log: SchedulerStarted | None = None) -> list[Effect]:
        """Make a machine, and have it read *log* or its own; the effects until the agent answers requests."""
        record = self.schedule
        stored = record and ScheduleRecord(record.state, record.data, record.event, record.reason)
        config = SchedulerConfig(self.task, self.overrides, self.schedule_overrides)
        self.machine = SchedulerMachine(config, stored, holder=holder)
        return self.handle(log or self.log())

    def log(self) -> SchedulerStarted:
        runs = tuple(
            TimedMessage(
                Transition(task=NAME, event=run.event, source="", target=run.state, facts=run.data),
                self._ends.get(run.data.run, self.now),
            )
            for run in self.runs
        )
        return SchedulerStarted(tuple(self._messages.values()), self.server.last, runs)

    def restart(self, holder: str = "second") -> list[Effect]:
        """Have another scheduler take over; all its effects, and those when it answers requests."""
        return [*self.start(holder), *self.handle(ServiceStarted())]

    # --- events -------------------------------------------------------------------------------------

    def handle(self, *events: Event) -> list[Effect]:
        """The effects of the last of *events*."""
        effects: list[Effect] = []
        for event in events:
            effects = self.machine.handle(event, self.now)
            self.machine.validate()
            for effect in effects:
                self._write(effect)
            self.effects += effects
        return effects

    def handle_partly(self, event: Event, count: int) -> None:
        """The scheduler ends after the first *count* effects of *event*."""
        for effect in self.machine.handle(event, self.now)[:count]:
            self._write(effect)

    def receive(self, *messages: Message) -> list[Effect]:
        """Messages that triggers read, published now; the effects of all of them."""
        effects: list[Effect] = []
        for message in messages:
            self.store(message)
            effects += self.handle(TriggerMessageReceived(message, self.now))
        return effects

    def store(self, message: Message) -> None:
        """Write *message* to the log, for the next scheduler."""
        self._messages[type(message), getattr(message, "client", "")] = TimedMessage(message, self.now)

    def move_server(self, event: ServerEvent, *, reason: str = "", **changes: Any) -> list[Effect]:
        return self.handle(self.server.move(event, reason=reason, **changes))

    def request_run(self, **fields: Any) -> list[Effect]:
        return self.handle(RunStartRequested(self.next_id(), StartRun(task=NAME, **fields)))

    def request_stop(self, run: str = FIRST_RUN, reason: str = "enough") -> list[Effect]:
        return self.handle(RunStopRequested(self.next_id(), StopRun(task=NAME, run=run, reason=reason)))

    def next_id(self) -> RequestId:
        self._requests += 1
        return RequestId(self._requests)

    def fire(self, timer: SchedulerTimer) -> list[Effect]:
        return self.handle(TimerFired(timer))

    def finish_other_run(self, task: str = "other") -> list[Effect]:
        events = (RunEvent.RECRUITING_STARTED, RunEvent.QUORUM_REACHED, RunEvent.RUN_FINISHED)
        transition = run_transition(run_data(f"{task}-1"), *events)
        return self.handle(OtherRunMoved(transition, self.now))

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    # --- the server manager -------------------------------------------------------------------------

    def open_run(self, plan: RunPlan | None = None) -> list[Effect]:
        """The server manager opens the run that is requested, and answers."""
        run = self.run.run
        self.move_server(ServerEvent.RUN_REQUESTED, run=run, plan=plan or self.run.plan, code_version=OLD)
        return self.handle(OpeningAnswered(run))

    def train_run(self, *rounds: int, **metrics: float) -> None:
        self.open_run()
        self.move_server(ServerEvent.QUORUM_REACHED, cohort=("c1", "c2"))
        for number in rounds:
            self.finish_round(number, **metrics)

    def finish_round(self, number: int, **metrics: float) -> list[Effect]:
        last = RoundResult(round=number, metrics=metrics)
        return self.move_server(ServerEvent.ROUND_FINISHED, round=number, last=last)

    def finish_run(self, **metrics: float) -> list[Effect]:
        """The run that is requested goes well, and ends with *metrics* and version 2."""
        self.train_run(1, **metrics)
        self.move_server(ServerEvent.RUN_FINISHED)
        return self.move_server(ServerEvent.VERSION_PUBLISHED, model=model(2))

    def fail_run(self) -> list[Effect]:
        """The run that is requested fails; the effects of its end."""
        self.open_run()
        return self.move_server(ServerEvent.RECRUITING_EXPIRED, reason="0 of 2")

    # --- the log ------------------------------------------------------------------------------------

    def _write(self, effect: Effect) -> None:
        match effect:
            case CreateSchedule(data=data):
                assert self.schedule is None, "the schedule is created twice"
                self.schedule = ScheduleRecord(SCHEDULE.initial, data, SCHEDULE.creation)
            case MoveSchedule(event=event, changes=changes, reason=reason):
                assert self.schedule is not None, "the schedule is not created"
                source = self.schedule.state
                self.schedule.move(event, changes, reason=reason)
                self._record_arrow("schedule", source, event, self.schedule.state)
            case CreateRun(data=data):
                assert self.run_state in ("", *RUN.final), "a second run at the same time"
                self.runs.append(RunRecord(RUN.initial, data, RUN.creation))
            case MoveRun(event=event, changes=changes, reason=reason):
                source_state = self.runs[-1].state
                self.runs[-1].move(event, changes, reason=reason)
                self._record_arrow("run", source_state, event, self.runs[-1].state)
                self._ends[self.runs[-1].data.run] = self.now
            case _:
                pass

    def _record_arrow(self, kind: str, source: str, event: str, target: str) -> None:
        OBSERVED.add((kind, source, event, target))
        self.arrows.add((kind, source, event))

    @property
    def data(self) -> ScheduleData:
        assert self.schedule is not None
        return self.schedule.data

    @property
    def state(self) -> ScheduleState | None:
        return self.schedule.state if self.schedule is not None else None

    @property
    def run(self) -> RunData:
        """The last run."""
        return self.runs[-1].data

    @property
    def run_state(self) -> str:
        return self.runs[-1].state if self.runs else ""

    @property
    def causes(self) -> list[str]:
        """Why each run was created."""
        return [one.reason for one in self.effects if isinstance(one, CreateRun)]

    @property
    def run_events(self) -> list[str]:
        return [one.event for one in self.effects if isinstance(one, MoveRun)]


def moves_in(effects: Sequence[Effect]) -> list[MoveSchedule]:
    return [one for one in effects if isinstance(one, MoveSchedule)]


def replies_in(effects: Sequence[Effect]) -> list[Body]:
    return [one.body for one in effects if isinstance(one, Reply)]


def new_scheduler(
    when: str | None = None,
    *,
    overrides: RunOverrides | None = None,
    schedule_overrides: ScheduleOverrides | None = None,
    code: str = OLD,
    **schedule: Any,
) -> SchedulerDriver:
    """A scheduler before its start."""
    task = scheduled_task(when, code=code, **schedule)
    return SchedulerDriver(task, overrides or RunOverrides(), schedule_overrides or ScheduleOverrides())


def scheduled_task(
    when: str | None = None, *, code: str = OLD, task: Mapping[str, Any] | None = None, **schedule: Any
) -> Task:
    """A task whose runs start by *when* and *schedule*; *task* are other keys of its table."""
    table = {name.replace("_", "-"): value for name, value in schedule.items()}
    return task_at(code, schedule=table | ({} if when is None else {"when": when}), **(task or {}))


def leading_scheduler(when: str | None = None, **more: Any) -> SchedulerDriver:
    """A scheduler that leads, of a task that has a model."""
    scheduler = new_scheduler(when, **more)
    scheduler.server.move(ServerEvent.MODEL_READY, model=model(1))
    scheduler.start()
    scheduler.handle(ServiceStarted())
    scheduler.effects.clear()
    return scheduler
