"""The announced model, the served model and the target model of one client. Pure.

A client takes a model that no code of the task can serve: the model is its target, and it trains. Another model, or
none, is served meanwhile.
"""

from fedbus.agents.client_manager.events import ModelAnnouncement
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import ServerInfo


class ModelChoice:
    """The models of one client in one task. *target* is the one that the log names."""

    def __init__(self, target: ModelRef | None, not_served: str = "") -> None:
        self.target = target
        """The model that the client has taken: it is served, about to be, or not served. The next transition records
        it."""
        self.not_served = not_served
        """Why the last model that the client has taken is not served; empty if it is."""
        self._unserved = target if not_served else None
        self._may_be_served_now = False
        self.newest: ModelAnnouncement | None = None
        """The announcement to follow; None if its model was refused or rolled back."""
        self.served: ModelRef | None = None
        """The model of the last answer of the inference agent."""

    def note(self, announcement: ModelAnnouncement) -> None:
        """Remember *announcement*, unless a newer one is known: messages may overtake each other."""
        if self.newest is None or announcement.term >= self.newest.term:
            self.newest = announcement

    @property
    def next(self) -> ModelAnnouncement | None:
        """The announcement of another model than the target, or of a target that new code may serve.

        Its version may be lower.
        """
        if self.newest is None or (self.target and self.newest.model.version == self.target.version):
            return self.newest if self._may_be_served_now else None
        return self.newest

    def announcement_of(self, model: ModelRef) -> ModelAnnouncement | None:
        """Return the last announcement if it is of *model*, otherwise None."""
        return self.newest if self.newest is not None and self.newest.model == model else None

    def serve(self, model: ModelRef) -> None:
        """Record that the inference agent serves *model*."""
        self.served = model
        self._unserved, self.not_served, self._may_be_served_now = None, "", False

    def take_unserved(self, model: ModelRef, reason: str, served: ModelRef | None) -> None:
        """Record that no code serves *model*, and that *served* is served meanwhile."""
        self.served = served
        self.target = self._unserved = model
        self.not_served, self._may_be_served_now = reason, False

    def change_code(self) -> None:
        """Record that the device has other code, which may serve a target that is not served."""
        self._may_be_served_now = self.not_served != ""

    def keep_current(self, rejected: ModelRef) -> None:
        """Stay with the model that was taken last instead of *rejected*, until another one is announced.

        Another one may be announced already: it arrived while *rejected* was fetched or applied.
        """
        if self.announcement_of(rejected) is not None:
            self.newest = None
        self.target = self._unserved or self.served
        self._may_be_served_now = False

    def roll_back(self, model: ModelRef, returned_from: ModelRef) -> None:
        """Record that the inference agent serves *model* again and rejects *returned_from*."""
        self.served = model
        self._unserved, self.not_served = None, ""
        if self.announcement_of(returned_from) is not None:
            self.newest = None


def announcement_from(info: ServerInfo) -> ModelAnnouncement | None:
    """Return the champion, as the server's answer names it."""
    if info.model is None or info.blob is None:
        return None
    return ModelAnnouncement(info.model, info.blob, info.term, info.seal)
