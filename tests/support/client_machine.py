"""A `ClientMachine` in any state, and values for its events, without bus, store and clock."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from fedbus.agents.client_manager.effects import Effect, MoveClient
from fedbus.agents.client_manager.events import (
    ClientManagerStarted,
    EnrollmentAnswered,
    Event,
    ModelAnnounced,
    ModelAnnouncement,
    ModelFetched,
    ServerInfoRead,
    SlotTaken,
)
from fedbus.agents.client_manager.machine import ClientMachine
from fedbus.agents.client_manager.records import ClientRecord
from fedbus.agents.common.machine import Publish
from fedbus.contracts.client import ClientData, ClientEvent, ClientState, InferReady, InferRefused
from fedbus.contracts.code import CodePlan
from fedbus.contracts.message import Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import ServerInfo, UpdateReady
from fedbus.contracts.serving import ModelComparison, ModelRolledBack
from support.server_machine import NAME, NOW, OLD, PLAN, RECRUIT_UNTIL, RUN, blob, model, task_at

CLIENT_ID = "c1"
LABELS = {"site": "lab"}
LEARN_S = PLAN.recruit_s + PLAN.rounds * 2 * PLAN.round_s + 60
RUN_TRACE = "00-run"


def model_announced(version: int, term: int | None = None, traceparent: str = "00-model") -> ModelAnnounced:
    """Announce *version* as champion; *term* defaults to the same number."""
    number = version if term is None else term
    return ModelAnnounced(ModelAnnouncement(model(version), blob(version), number, None, traceparent))


def server_info(version: int, term: int | None = None, code: CodePlan | None = None) -> ServerInfoRead:
    number = version if term is None else term
    return ServerInfoRead(
        ServerInfo(code_version=OLD, model=model(version), blob=blob(version), term=number, code=code)
    )


def make_invitation(run: str = RUN, **changes: Any) -> UpdateReady:
    known = {
        "task": NAME,
        "run": run,
        "plan": PLAN,
        "recruit_until": RECRUIT_UNTIL,
        "code_version": OLD,
        "traceparent": RUN_TRACE,
    }
    return UpdateReady.model_validate(known | changes)


def infer_ready(version: int, code_version: str = OLD) -> InferReady:
    return InferReady(
        task=NAME,
        client=CLIENT_ID,
        model=model(version),
        endpoint="http://127.0.0.1:1",
        code_version=code_version,
    )


def infer_refused(
    version: int,
    *,
    serving: int | None,
    still: ModelRef | None = None,
    code_version: str = OLD,
    not_served: bool = False,
) -> InferRefused:
    return InferRefused(
        task=NAME,
        client=CLIENT_ID,
        model=model(version),
        reason="NaN",
        serving=serving,
        still=still,
        code_version=code_version,
        not_served=not_served,
    )


def model_rolled_back(version: int, to: int) -> ModelRolledBack:
    return ModelRolledBack(
        task=NAME,
        client=CLIENT_ID,
        model=model(to),
        returned_from=model(version),
        reason="it errs",
        beside=ModelComparison(),
    )


@dataclass
class ClientDriver:
    """Passes events to a machine, validates it after each, and records the effects."""

    machine: ClientMachine
    now: datetime = NOW
    effects: list[Effect] = field(default_factory=list)

    def handle(self, *events: Event) -> list[Effect]:
        """Handle *events*, and return the effects of the last one."""
        effects: list[Effect] = []
        for event in events:
            effects = self.machine.handle(event, self.now)
            self.machine.validate()
            self.effects += effects
        return effects

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @property
    def data(self) -> ClientData:
        return self.machine._record.data

    @property
    def state(self) -> ClientState:
        return self.machine.state

    @property
    def events(self) -> list[str]:
        """The events of all transitions so far."""
        return [one.event for one in self.effects if isinstance(one, MoveClient)]

    @property
    def published(self) -> list[Message]:
        return [one.message for one in self.effects if isinstance(one, Publish)]


def new_client(
    state: ClientState = ClientState.S0, *, table: dict[str, Any] | None = None, **data: Any
) -> ClientDriver:
    """A client before its start."""
    known = {"task": NAME, "client": CLIENT_ID, "code_version": OLD, "labels": LABELS, **data}
    record = ClientRecord(state, ClientData.model_validate(known), ClientEvent.STARTED)
    task = task_at(OLD, **(table or {}))
    return ClientDriver(ClientMachine(task, record, LABELS, bootstrap_s=10.0))


def starting_client(**more: Any) -> ClientDriver:
    """A client that has sent its first model to the inference agent, and has no reply yet."""
    client = new_client(**more)
    client.handle(ClientManagerStarted(), EnrollmentAnswered(), server_info(1), ModelFetched(model(1)))
    return _without_past(client)


def serving_client(**more: Any) -> ClientDriver:
    """A client that serves version 1."""
    client = starting_client(**more)
    client.handle(infer_ready(1))
    return _without_past(client)


def learning_client(**more: Any) -> ClientDriver:
    """A client that takes part in a run and serves version 1."""
    client = serving_client(**more)
    client.handle(make_invitation(), SlotTaken())
    return _without_past(client)


def applying_client(version: int = 2, **more: Any) -> ClientDriver:
    """A client that serves version 1, and has sent another version to the inference agent."""
    client = serving_client(**more)
    client.handle(model_announced(version), ModelFetched(model(version)))
    return _without_past(client)


def _without_past(client: ClientDriver) -> ClientDriver:
    client.effects.clear()
    return client
