"""Expected effects of a `ClientMachine`, for the tests of its decisions."""

from datetime import timedelta

from fedbus.agents.client_manager.effects import (
    FetchModel,
    HandOverModel,
    JoinTrace,
    MoveClient,
    PrepareCode,
    ReadServerInfo,
    ReleaseSlot,
    TakeSlot,
)
from fedbus.agents.client_manager.events import (
    ClientTimer,
)
from fedbus.agents.client_manager.machine import APPLY_S, FETCH_ATTEMPTS, SYNC_S
from fedbus.agents.common.machine import (
    CancelTimer,
    Log,
    Publish,
    StartTimer,
    TimerFired,
)
from fedbus.contracts.client import (
    ClientDeclined,
    ClientEvent,
    ClientStart,
    ClientState,
    FailTrain,
    FinTrain,
)
from fedbus.contracts.code import CodePublished, CodeReady, CodeRefused
from support.client_machine import (
    CLIENT_ID,
    LEARN_S,
    RUN_TRACE,
    model_announced,
)
from support.server_machine import NAME, NEW, NOW, OLD, PLAN, RUN, model

STARTS_SEARCH = [ReadServerInfo(until_answered=True)]
STARTS_BOOTSTRAP = StartTimer(ClientTimer.BOOTSTRAP, 10.0)
STOPS_APPLY = CancelTimer(ClientTimer.APPLY)
STARTS_APPLY = StartTimer(ClientTimer.APPLY, APPLY_S)
STARTS_TRAINING = ClientStart(task=NAME, client=CLIENT_ID, run=RUN, plan=PLAN, code_version=OLD)
ENDS_RUN = [CancelTimer(ClientTimer.LEARN), ReleaseSlot()]
NO_ANSWER = f"the inference agent did not answer in time (limit {APPLY_S:g} s)"
JOINS = [
    MoveClient(ClientEvent.CLIENT_START, {"run": RUN}, deadline=NOW + timedelta(seconds=LEARN_S)),
    StartTimer(ClientTimer.LEARN, LEARN_S),
    Publish(STARTS_TRAINING),
]


def starts_join(run: str = RUN) -> list[object]:
    """The effects of a client that may join: it takes a slot."""
    return [JoinTrace(RUN_TRACE), TakeSlot(run)]


def declines(reason: str, run: str = RUN, **more: object) -> Publish:
    content = {"task": NAME, "client": CLIENT_ID, "run": run, "reason": reason, **more}
    return Publish(ClientDeclined.model_validate(content))


def fin_train(run: str = RUN, *, new_model: bool = True) -> FinTrain:
    return FinTrain(task=NAME, client=CLIENT_ID, run=run, new_model=new_model)


def fail_train(run: str = RUN, *, lost: bool = False) -> FailTrain:
    return FailTrain(task=NAME, client=CLIENT_ID, run=run, reason="it broke", trainer_lost=lost)


def fetches(version: int, attempts: int = FETCH_ATTEMPTS, term: int | None = None) -> FetchModel:
    return FetchModel(model_announced(version, term).announcement, attempts)


def fetches_first(version: int) -> FetchModel:
    return FetchModel(model_announced(version, traceparent="").announcement, attempts=1)


def updates(version: int, term: int | None = None, code: str = OLD) -> HandOverModel:
    """The model is handed to an inference agent that serves another one."""
    number = version if term is None else term
    return HandOverModel(model(version), code, term=number, published_in="00-model")


def starts(version: int, code: str = OLD) -> HandOverModel:
    """The model is handed to an inference agent that serves none."""
    return HandOverModel(model(version), code, is_first=True, term=version)


def moves(event: ClientEvent, version: int, reason: str = "", **more: str) -> MoveClient:
    return MoveClient(event, {"model": model(version), **more}, reason)  # type: ignore[typeddict-item]


def ignored(name: str, state: ClientState) -> list[Log]:
    return [Log("debug", "Ignoring message", {"message": name, "state": str(state)})]


def code_published(stable: str = OLD, candidate: str = "", **more: object) -> CodePublished:
    content = {"task": NAME, "code_version": stable, "candidate": candidate, **more}
    return CodePublished.model_validate(content)


def code_ready(version: str, attempt: int | None = 0) -> Publish:
    return Publish(CodeReady(task=NAME, client=CLIENT_ID, code_version=version, attempt=attempt))


def code_refused(version: str, reason: str, attempt: int | None = 0) -> list[Log | Publish]:
    refused = CodeRefused(
        task=NAME, client=CLIENT_ID, code_version=version, reason=reason, stays_on=OLD, attempt=attempt
    )
    return [Log("warning", "New code refused", {"code": version, "reason": reason}), Publish(refused)]


def starts_sync(version: str = NEW) -> list[object]:
    deadline = NOW + timedelta(seconds=SYNC_S)
    move = MoveClient(ClientEvent.CODE_PUBLISHED, reason=f"code {version[:12]}", deadline=deadline)
    return [move, PrepareCode(version, SYNC_S)]


def fired(timer: ClientTimer) -> TimerFired[ClientTimer]:
    return TimerFired(timer)
