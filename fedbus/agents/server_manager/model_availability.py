"""Decides how the champion is kept available to clients, and what is published about its store.

A store may be unavailable, denied, damaged or empty. Each reason is published once, as ``store_unavailable``; the
store is checked again with backoff until ``store_recovered``. Meanwhile clients get the champion if its weights
are on this machine, and runs are refused with the reason. A first model is built only if the log names no model
and the store has answered that it is empty.

Pure: every method returns the effects that the agent performs.
"""

from dataclasses import dataclass
from typing import TypeAlias

from fedbus.agents.common.machine import CancelTimer, Log, Publish, RequestId, RetryLater
from fedbus.agents.server_manager.effects import BuildFirstModel, CheckStore, Effect, OfferModel
from fedbus.agents.server_manager.events import (
    ChampionDetails,
    FirstModelFailed,
    FirstModelReady,
    ModelOffered,
    OfferFailed,
    StoreChecked,
    TimerName,
)
from fedbus.agents.server_manager.records import ServerRecord
from fedbus.contracts.model import BlobRef
from fedbus.contracts.server import ModelPublished, ServerChanges, ServerEvent, StoreProblem


@dataclass(frozen=True)
class CloseRun:
    """Announce the champion, and the end of the run that it is the result of."""

    keep: int
    """How many versions the task keeps."""


@dataclass(frozen=True)
class AnswerPromotion:
    """Announce the champion, and answer the request for it."""

    id: RequestId
    previous: int
    reason: str


@dataclass(frozen=True)
class FinishLineageRollout:
    """Announce the champion, and finish the rollout of the code that makes it."""

    reason: str


@dataclass(frozen=True)
class RecordFirstModel:
    """Runs may start from now on."""


@dataclass(frozen=True)
class RecordStore:
    """Announce the champion, and publish whether its store is usable."""

    announce: bool
    reason: str
    trouble: StoreProblem | None


AfterOffer: TypeAlias = CloseRun | AnswerPromotion | FinishLineageRollout | RecordFirstModel | RecordStore
"""What follows when the champion is offered, or cannot be offered."""


class ModelAvailability:
    """The champion of one task, and its store."""

    def __init__(self, server: ServerRecord) -> None:
        self._server = server
        self._blob: BlobRef | None = None
        self._after_offer: AfterOffer | None = None
        self._attempt = 0
        self.trouble = ""
        """Why the store is unusable, or the first model could not be built; empty if neither is the case."""
        self.is_building = False
        self.is_checking = False

    @property
    def blob(self) -> BlobRef | None:
        """Where clients get the champion; None if it is not offered."""
        model, blob = self._server.data.model, self._blob
        return blob if blob is not None and model is not None and blob.sha256 == model.sha256 else None

    @property
    def is_settled(self) -> bool:
        """True if the store is usable and no request to it is pending."""
        is_asking = self.is_building or self.is_checking or self.is_offering
        return not self.trouble and not is_asking

    @property
    def is_offering(self) -> bool:
        return self._after_offer is not None

    # --- the first model ----------------------------------------------------------------------------

    def build(self, code_version: str) -> list[Effect]:
        self.is_building = True
        return [BuildFirstModel(code_version)]

    def on_first_model_ready(self, event: FirstModelReady) -> list[Effect]:
        self.is_building = False
        recovered = self._clear_trouble()
        changes = serve(event.served, ServerChanges(code_version=event.code_version, trouble=None))
        move = self._server.move(ServerEvent.MODEL_READY, changes)
        return [*recovered, move, *self.offer(RecordFirstModel())]

    def on_first_model_failed(self, event: FirstModelFailed) -> list[Effect]:
        self.is_building = False
        if event.trouble is not None:
            return self.report(event.reason, event.trouble)
        return self._report(ServerEvent.MODEL_NOT_BUILT, event.reason, None)

    # --- the offer ----------------------------------------------------------------------------------

    def offer(self, then: AfterOffer) -> list[Effect]:
        """Offer the champion to clients; *then* follows, also if the offer fails."""
        model = self._server.data.model
        if model is None:
            return []
        self._after_offer = then
        return [OfferModel(model, receivers=len(self._server.data.cohort))]

    def on_offer_result(self, event: ModelOffered | OfferFailed) -> tuple[AfterOffer | None, list[Effect]]:
        """Return what follows the offer, and the effects of the offer itself."""
        then, self._after_offer = self._after_offer, None
        if isinstance(event, ModelOffered):
            self._blob = event.blob
        match event, then:
            case ModelOffered(), RecordStore(announce=announce, reason=reason, trouble=trouble):
                return then, [*(self.announce() if announce else []), *self.record(reason, trouble)]
            case OfferFailed(), RecordStore(reason=reason, trouble=StoreProblem() as trouble):
                return then, self.report(reason, trouble)
            case OfferFailed(), _:
                return then, self.report(event.reason, event.trouble)
            case _:
                return then, []

    def announce(self, reason: str = "") -> list[Effect]:
        """Publish the champion to all clients, if it is offered."""
        data, blob = self._server.data, self.blob
        if data.model is None or blob is None:
            return []
        message = ModelPublished(
            task=data.task,
            model=data.model,
            blob=blob,
            run=data.run,
            term=data.term,
            seal=data.seal,
            reason=reason,
        )
        return [Publish(message)]

    # --- the store ----------------------------------------------------------------------------------

    def check(self) -> list[Effect]:
        """Compare the store with the log."""
        model = self._server.data.model
        if model is None:
            return []
        self.is_checking = True
        return [CheckStore(model, self._server.data.term)]

    def on_checked(self, event: StoreChecked, *, announce: bool) -> list[Effect]:
        """Follow the champion of the store if its term is higher, and offer it if its weights are on this machine.

        Args:
            event: The result of the check. It is repeated if the champion has changed since.
            announce: True if clients do not know yet that the champion is available.

        """
        self.is_checking = False
        if event.model != self._server.data.model:
            return self.check()
        effects: list[Effect] = []
        if event.served is not None and event.served.champion.term > self._server.data.term:
            effects.append(self._server.move(ServerEvent.MODEL_PROMOTED, serve(event.served)))
        if event.has_file and self.blob is None:
            return effects + self.offer(RecordStore(announce, event.reason, event.trouble))
        return effects + self.record(event.reason, event.trouble)

    def record(self, reason: str, trouble: StoreProblem | None) -> list[Effect]:
        """Publish whether the store is usable."""
        return self.report(reason, trouble) if trouble is not None else self._recover()

    def report(self, reason: str, trouble: StoreProblem) -> list[Effect]:
        """Publish that the store is unusable, and check it again later."""
        return self._report(ServerEvent.STORE_UNAVAILABLE, reason, trouble)

    def _report(self, event: ServerEvent, reason: str, trouble: StoreProblem | None) -> list[Effect]:
        """Publish *reason* once, and check the store again later."""
        effects: list[Effect] = []
        if reason != self.trouble:
            self.trouble = reason
            effects.append(Log("warning", "Champion model unavailable", {"cause": event, "reason": reason}))
            effects.append(self._server.move(event, ServerChanges(trouble=trouble), reason=reason))
        effects.append(RetryLater(TimerName.STORE, self._attempt))
        self._attempt += 1
        return effects

    def _recover(self) -> list[Effect]:
        effects = self._clear_trouble()
        if self._server.data.trouble is not None:
            effects.append(self._server.move(ServerEvent.STORE_RECOVERED, ServerChanges(trouble=None)))
        return effects

    def _clear_trouble(self) -> list[Effect]:
        self.trouble, self._attempt = "", 0
        return [CancelTimer(TimerName.STORE)]


def serve(served: ChampionDetails, more: ServerChanges | None = None) -> ServerChanges:
    """Return the changes that make *served* the champion of the log."""
    manifest = served.manifest
    changes = ServerChanges(model=manifest.ref, seal=manifest.seal, term=served.champion.term)
    return {**changes, **(more or {})}
