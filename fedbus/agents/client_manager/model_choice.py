"""The announced model, the served model and the target model of one client. Pure."""

from fedbus.agents.client_manager.events import ModelAnnouncement
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import ServerInfo


class ModelChoice:
    """The models of one client in one task. *target* is the one that the log names."""

    def __init__(self, target: ModelRef | None) -> None:
        self.target = target
        """The model that is served, or about to be; the next transition records it."""
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
        """The announcement of another model than the target. Its version may be lower."""
        if self.newest is None or (self.target and self.newest.model.version == self.target.version):
            return None
        return self.newest

    def announcement_of(self, model: ModelRef) -> ModelAnnouncement | None:
        """Return the last announcement if it is of *model*, otherwise None."""
        return self.newest if self.newest is not None and self.newest.model == model else None

    def keep_current(self) -> None:
        """Stay with the served model, and wait for the next announcement."""
        self.newest = None
        self.target = self.served

    def roll_back(self, model: ModelRef, returned_from: ModelRef) -> None:
        """Record that the inference agent serves *model* again and rejects *returned_from*."""
        self.served = model
        if self.announcement_of(returned_from) is not None:
            self.newest = None


def announcement_from(info: ServerInfo) -> ModelAnnouncement | None:
    """Return the champion, as the server's answer names it."""
    if info.model is None or info.blob is None:
        return None
    return ModelAnnouncement(info.model, info.blob, info.term, info.seal)
