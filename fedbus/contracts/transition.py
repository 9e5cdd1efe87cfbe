"""The transition of a lifecycle: the only message in the life stream.

The last transition of an entity is its state. It carries the new state and all data that the owner needs
to continue after a restart.
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
    """A state transition of an entity: *event* led from state *source* to state *target*."""

    name: ClassVar[str] = "transition"
    family: ClassVar[Family] = Family.LIFE

    event: str
    source: str
    target: str
    reason: str = ""
    """Why the event happened, as text."""
    waits_for: str = ""
    """What the new state waits for, as text; empty if it waits for nothing."""
    deadline: AwareDatetime | None = None
    """The time limit of the new state; None if it is not known."""
    facts: AnyFacts
    """The data of the entity after the transition."""

    @property
    def is_legal(self) -> bool:
        """True if the lifecycle's table has this arrow. Decoding does not check it, to accept newer tables."""
        lifecycle = LIFECYCLES[self.kind]
        return lifecycle.arrows.get((lifecycle.states(self.source), self.event)) == self.target

    @property
    def kind(self) -> str:
        return self.facts.kind

    @property
    def key(self) -> str:
        return self.facts.key
