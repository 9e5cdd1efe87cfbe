"""Expected effects of a `ServerMachine`, for the tests of its decisions."""

from fedbus.agents.common.machine import (
    CancelTimer,
    Publish,
    Reply,
    RequestId,
)
from fedbus.agents.server_manager.effects import (
    StartFlowerServer,
)
from fedbus.agents.server_manager.events import (
    PromotionRequested,
    RunRequested,
    TimerName,
)
from fedbus.contracts.champion import PromoteModel
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CodePublished
from fedbus.contracts.flower_server import StartServer
from fedbus.contracts.message import Refused
from fedbus.contracts.server import OpenRun, ServerClosed
from support.server_machine import (
    NAME,
    OLD,
    PLAN,
    RUN,
    artifact,
)

ID = RequestId(7)
OPEN = RunRequested(ID, OpenRun(task=NAME, run=RUN, plan=PLAN), "00-trace")
PROMOTE = PromotionRequested(ID, PromoteModel(task=NAME, model_version=3, reason="it is right"))
CODE = CodePublished(task=NAME, code_version=OLD)
FLOWER = StartFlowerServer(
    StartServer(task=NAME, run=RUN, plan=PLAN, artifact=artifact(1), first_round=1, code_version=OLD)
)
STOPS_RECRUITING = CancelTimer(TimerName.RECRUITING)


def joined(client: str, code: str = OLD, run: str = RUN) -> ClientJoined:
    return ClientJoined(task=NAME, client=client, run=run, code_version=code)


def closed(outcome: str, reason: str = "", rounds: int = 0, *, new_model: bool = True) -> Publish:
    return Publish(
        ServerClosed.model_validate(
            {
                "task": NAME,
                "run": RUN,
                "outcome": outcome,
                "rounds": rounds,
                "reason": reason,
                "new_model": new_model,
            }
        )
    )


def refused(reason: str) -> Reply:
    return Reply(ID, Refused(reason=reason))
