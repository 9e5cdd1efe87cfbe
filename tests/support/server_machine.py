"""A `ServerMachine` in any state, and values for its events, without bus, store and clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from fedbus.agents.common.machine import Publish, Reply
from fedbus.agents.server_manager.effects import Effect, MoveCode, MoveServer
from fedbus.agents.server_manager.events import (
    ChampionDetails,
    Event,
    ManagerStarted,
    ModelOffered,
    StoreChecked,
)
from fedbus.agents.server_manager.machine import ServerMachine
from fedbus.agents.server_manager.records import CodeRecord, ServerRecord
from fedbus.contracts.champion import Champion
from fedbus.contracts.code import CodeData, CodeEvent, CodeState
from fedbus.contracts.message import Body, Message
from fedbus.contracts.model import Artifact, BlobRef, Manifest, ModelRef
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import ServerData, ServerEvent, ServerState
from fedbus.contracts.task.task import Task, TaskTable

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
NAME = "tiny"
RUN = f"{NAME}-1"
OLD, NEW = "a" * 40, "b" * 40
PLAN = RunPlan(rounds=2, quorum=2, recruit_s=30, round_s=60)
RECRUIT_UNTIL = NOW + timedelta(seconds=30)


def artifact(number: int) -> Artifact:
    return Artifact(sha256=f"{number:064x}", size_bytes=64, architecture="a" * 64)


def model(version: int) -> ModelRef:
    return ModelRef(**artifact(version).model_dump(), version=version)


def blob(version: int) -> BlobRef:
    return BlobRef(sha256=f"{version:064x}", size_bytes=64, chunk_bytes=1024, holder="server.manager_1")


def manifest(version: int, **more: Any) -> Manifest:
    return Manifest(**model(version).model_dump(), task=NAME, created=NOW, **more)


def champion(version: int, term: int | None = None) -> ChampionDetails:
    """*version* as champion; *term* defaults to the same number."""
    return ChampionDetails(Champion(version=version, term=term or version, since=NOW), manifest(version))


def model_offered(version: int) -> ModelOffered:
    return ModelOffered(model(version), blob(version))


def task_at(version: str, **table: Any) -> Task:
    """The task at a code version; *table* is ``[tool.fedbus]``."""
    content = {"task": NAME, "model": "tiny:Net", **table}
    return Task(
        table=TaskTable.model_validate(content),
        app={"serverapp": "tiny:server", "clientapp": "tiny:client"},
        code_version=version,
        path=f"/code/{version}",
    )


RUN_DATA: dict[str, Any] = {
    "run": RUN,
    "plan": PLAN,
    "recruit_until": RECRUIT_UNTIL,
    "code_version": OLD,
    "base": model(1),
}
"""The data of a run in progress, which started from version 1."""
TRAINED: dict[str, Any] = {**RUN_DATA, "cohort": ("c1", "c2"), "round": 2, "trainings": 4}


def make_machine(
    state: ServerState,
    *,
    event: ServerEvent = ServerEvent.STARTED,
    reason: str = "",
    code: CodeData | None = None,
    code_event: CodeEvent = CodeEvent.STARTED,
    own: Task | None = None,
    **data: Any,
) -> ServerMachine:
    """A machine before its start. The champion is version 1, except in the initial state."""
    if state is not ServerState.MODEL_INIT:
        data = {"model": model(1), "term": 1, **data}
    server = ServerRecord(state, ServerData(task=NAME, **data), event, reason)
    facts = code or CodeData(task=NAME, code_version=OLD)
    code_state = CodeState.ROLLING if facts.candidate else CodeState.STEADY
    return ServerMachine(own or task_at(OLD), server, CodeRecord(code_state, facts, code_event))


def running_machine(state: ServerState, **data: Any) -> ServerMachine:
    """A machine after its start, in *state*. Its champion is version 1, which it offers."""
    made = make_machine(ServerState.WAITING)
    agent = ServerDriver(made)
    agent.handle(ManagerStarted(task_at(OLD)))
    agent.handle(store_is_usable(1))
    agent.handle(model_offered(1))
    record = made._server
    record.state = state
    record.data = ServerData(task=NAME, **{"model": model(1), "term": 1, **data})
    return made


def store_is_usable(version: int, served: ChampionDetails | None = None) -> StoreChecked:
    """The store is available and has the weights of *version*, the champion of the log."""
    return StoreChecked(model(version), served or champion(version), has_file=True)


@dataclass
class ServerDriver:
    """Passes events to a machine, and records the effects."""

    machine: ServerMachine
    now: datetime = NOW
    effects: list[Effect] = field(default_factory=list)

    def handle(self, *events: Event) -> list[Effect]:
        """Handle *events*, and return the effects of the last one."""
        effects: list[Effect] = []
        for event in events:
            assert self.machine.accepts(event), event
            effects = self.machine.handle(event, self.now)
            self.effects += effects
        return effects

    @property
    def server_events(self) -> list[str]:
        return [one.event for one in self.effects if isinstance(one, MoveServer)]

    @property
    def code_events(self) -> list[str]:
        return [one.event for one in self.effects if isinstance(one, MoveCode)]

    @property
    def replies(self) -> list[Body]:
        return replies_in(self.effects)

    @property
    def published(self) -> list[Message]:
        return [one.message for one in self.effects if isinstance(one, Publish)]


def replies_in(effects: Sequence[Effect]) -> list[Body]:
    return [one.body for one in effects if isinstance(one, Reply)]
