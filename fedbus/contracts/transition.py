"""A lifecycle has moved: the one kind of message that the life stream keeps.

The last transition of a thing is its state: it carries the state it led to and all that
the owner needs to go on from there.
"""

from typing import Annotated, ClassVar

from pydantic import AwareDatetime, Field

from fedbus.contracts.client import CLIENT, FL_CLIENT, INFERENCE, ClientData, FlClientData, InferenceData
from fedbus.contracts.code import CODE, CodeData
from fedbus.contracts.lifecycle import AnyLifecycle
from fedbus.contracts.message import Family, Message
from fedbus.contracts.run import RUN, RunData
from fedbus.contracts.scheduling import SCHEDULE, ScheduleData
from fedbus.contracts.server import SERVER, ServerData

LIFECYCLES: dict[str, AnyLifecycle] = {
    one.kind: one for one in (SERVER, CODE, SCHEDULE, RUN, CLIENT, FL_CLIENT, INFERENCE)
}

AnyFacts = Annotated[
    ServerData | CodeData | ScheduleData | RunData | ClientData | FlClientData | InferenceData,
    Field(discriminator="kind"),
]


class Transition(Message):
    """*event* led from *source* to *target*; *reason* says why, in words."""

    word: ClassVar[str] = "transition"
    family: ClassVar[Family] = Family.LIFE

    event: str
    source: str
    target: str
    reason: str = ""
    waits_for: str = ""
    """What the new state waits for."""
    deadline: AwareDatetime | None = None
    """Until when, where that is known."""
    facts: AnyFacts

    @property
    def is_legal(self) -> bool:
        """Whether the table has this arrow. Not checked on reading: old readers must bear newer tables."""
        lifecycle = LIFECYCLES[self.kind]
        return lifecycle.arrows.get((lifecycle.states(self.source), self.event)) == self.target

    @property
    def kind(self) -> str:
        return self.facts.kind

    @property
    def thing(self) -> str:
        return self.facts.thing
