"""Decides on requests that change the champion: promote, roll back, start a new lineage.

A version whose architecture is not the champion's is compared with the deployed code first, which would have
to load it. Pure: every method returns the effects that the agent performs.
"""

from dataclasses import dataclass

from fedbus.agents.common.machine import Reply, RequestId
from fedbus.agents.server_manager.code_rollout import CodeRollout
from fedbus.agents.server_manager.effects import BuildLineage, CheckPromotion, Effect, PromoteVersion
from fedbus.agents.server_manager.events import (
    LineageBuilt,
    LineageRequested,
    PromotionRequested,
    VersionPromoted,
)
from fedbus.agents.server_manager.model_availability import (
    AnswerPromotion,
    FinishLineageRollout,
    ModelAvailability,
    serve,
)
from fedbus.agents.server_manager.records import ServerRecord
from fedbus.contracts.champion import PromoteModel, RollBackModel
from fedbus.contracts.message import Refused
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import ServerChanges, ServerEvent
from fedbus.domain.run_participation import short_version


@dataclass(frozen=True)
class _Promotion:
    """A request whose version is checked, or promoted."""

    id: RequestId
    event: ServerEvent
    reason: str
    previous: ModelRef
    may_repeat: bool
    """True if the champion may be promoted again, so that devices that rolled it back try it again."""


@dataclass(frozen=True)
class _Lineage:
    """A new lineage whose first model is built."""

    id: RequestId | None
    """None if the rollout of a code version requires it."""
    reason: str
    previous: ModelRef


class ModelPromotion:
    """The requests for another champion, one at a time."""

    def __init__(self, server: ServerRecord, availability: ModelAvailability, rollout: CodeRollout) -> None:
        self._server = server
        self._availability = availability
        self._rollout = rollout
        self._promotion: _Promotion | None = None
        self._lineage: _Lineage | None = None

    @property
    def is_promoting(self) -> bool:
        return self._promotion is not None

    @property
    def is_building_lineage(self) -> bool:
        return self._lineage is not None

    # --- promote and roll back ----------------------------------------------------------------------

    def on_requested(self, event: PromotionRequested) -> list[Effect]:
        model = self._server.data.model
        if model is None:
            return _refuse(event.id, "there is no model yet: wait for the first one")
        version: int | None
        match event.request:
            case PromoteModel(model_version=version):
                moves, may_repeat = ServerEvent.MODEL_PROMOTED, True
            case RollBackModel(to=version):
                moves, may_repeat = ServerEvent.MODEL_ROLLED_BACK, False
        if version == model.version and not may_repeat:
            return _refuse(event.id, f"version {version} is the champion already")
        self._promotion = _Promotion(event.id, moves, event.request.reason, model, may_repeat)
        return [CheckPromotion(version, model, self._rollout.deployed_task.code_version)]

    def on_checked(self, version: int) -> list[Effect]:
        promotion = self._promotion
        if promotion is None:
            return []
        if version == promotion.previous.version and not promotion.may_repeat:
            return self.on_refused(f"version {version} is the champion already")
        return [PromoteVersion(version, promotion.reason)]

    def on_refused(self, reason: str) -> list[Effect]:
        promotion, self._promotion = self._promotion, None
        return _refuse(promotion.id, reason) if promotion is not None else []

    def on_promoted(self, event: VersionPromoted) -> list[Effect]:
        promotion, self._promotion = self._promotion, None
        if promotion is None:
            return []
        move = self._server.move(promotion.event, serve(event.served), reason=promotion.reason)
        then = AnswerPromotion(promotion.id, promotion.previous.version, promotion.reason)
        return [move, *self._availability.offer(then)]

    # --- a new lineage ------------------------------------------------------------------------------

    def on_lineage_requested(self, event: LineageRequested) -> list[Effect]:
        model = self._server.data.model
        if model is None:
            return _refuse(
                event.id,
                "there is no model yet, and the first one is built automatically: see `fedbus events tail`",
            )
        if not self._server.allows(ServerEvent.LINEAGE_STARTED):
            return _refuse(event.id, "a new lineage begins between two runs: wait for this one, or stop it")
        self._lineage = _Lineage(event.id, event.request.reason, model)
        return [BuildLineage(self._rollout.deployed_task.code_version)]

    def begin_lineage_of_rollout(self, build: BuildLineage) -> list[Effect]:
        """Build the first model of a new lineage with the candidate."""
        model = self._server.data.model
        if model is None:
            return []
        self._lineage = _Lineage(None, f"code {short_version(build.code_version)}", model)
        return [build]

    def on_lineage_built(self, event: LineageBuilt) -> list[Effect]:
        lineage, self._lineage = self._lineage, None
        if lineage is None:
            return []
        changes = serve(event.served, ServerChanges(code_version=event.code_version))
        move = self._server.move(ServerEvent.LINEAGE_STARTED, changes, reason=lineage.reason)
        if lineage.id is None:
            return [move, *self._availability.offer(FinishLineageRollout(lineage.reason))]
        then = AnswerPromotion(lineage.id, lineage.previous.version, lineage.reason)
        return [move, *self._availability.offer(then)]

    def on_lineage_failed(self, reason: str) -> list[Effect]:
        lineage, self._lineage = self._lineage, None
        if lineage is None:
            return []
        return _refuse(lineage.id, reason) if lineage.id is not None else self._rollout.revert(reason)


def _refuse(id: RequestId, reason: str) -> list[Effect]:
    return [Reply(id, Refused(reason=reason))]
