"""Which version is served, changed by hand: promoted, rolled back, or begun anew.

Part of the server manager, and decided in its turn. A version whose architecture is not that of the
model in service is first held against the code that would have to load it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from fedbus.agents.server_manager.model_versions import NothingBefore, Served, Versions
from fedbus.bus.errors import RequestRefused
from fedbus.contracts.champion import ModelPromoted, PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.model import Artifact, ModelRef
from fedbus.contracts.server import ServerEvent, StoreTrouble
from fedbus.stores.errors import StoreError

BUSY: Final = "a run is being published just now: try again in a moment"


class TheServer(Protocol):
    """What the server manager does for it."""

    @property
    def turn(self) -> asyncio.Lock:
        """Held while something is decided, so that nothing interrupts it."""

    @property
    def champion(self) -> ModelRef | None:
        """The model that is served."""

    @property
    def term(self) -> int:
        """Which champion that is."""

    @property
    def trouble(self) -> StoreTrouble | None:
        """What is wrong with the model repository, as the log has it."""

    def allows(self, event: ServerEvent) -> bool:
        """Whether the server can move by *event* now."""

    async def serve(self, event: ServerEvent, served: Served) -> None:
        """Move by *event*: *served* is the champion from here on."""

    async def serve_instead(self, event: ServerEvent, served: Served, reason: str) -> None:
        """The same, and every client hears of it."""

    async def check_fits(self, model: Artifact) -> str:
        """Where *model* is not what the code makes, in words."""

    async def begin_lineage_by_hand(self, reason: str) -> None:
        """Build a first model of the code that everybody has, and serve it."""


class DoesNotFit(StoreError):
    """A version of another architecture than the code's."""


class Promotions:
    """What people ask of the versions of one task."""

    def __init__(self, server: TheServer, versions: Versions) -> None:
        self._server = server
        self._versions = versions

    @property
    def answers(self) -> dict[Any, Callable[[Any], Awaitable[Body]]]:
        return {
            PromoteModel: self._promote,
            RollBackModel: self._roll_back,
            StartLineage: self._start_lineage,
        }

    async def _promote(self, request: PromoteModel) -> Body:
        return await self._serve(ServerEvent.MODEL_PROMOTED, request.model_version, request.reason, anew=True)

    async def _roll_back(self, request: RollBackModel) -> Body:
        try:
            version = request.to or await self._versions.before()
        except NothingBefore as error:
            return Refused(reason=str(error))
        return await self._serve(ServerEvent.MODEL_ROLLED_BACK, version, request.reason)

    async def _serve(self, event: ServerEvent, version: int, reason: str, *, anew: bool = False) -> Body:
        """Serve *version*; *anew*: also where it is served, so that devices which went back from it try it again."""
        async with self._server.turn:
            before = self._server.champion
            if before is None or not self._server.allows(event):
                return Refused(reason=BUSY if before else "there is no model yet: wait for the first one")
            if before.version == version and not anew:
                return Refused(reason=f"version {version} is served already")
            try:
                served = await self._fitting(version, before, reason)
            except (StoreError, RequestRefused) as error:
                return Refused(reason=str(error))
            await self._server.serve_instead(event, served, reason)
            return ModelPromoted(model=served.manifest.ref, instead_of=before.version)

    async def _fitting(self, version: int, before: ModelRef, reason: str) -> Served:
        """Crown *version*, if the code can load it; raises StoreError and RequestRefused."""
        manifest = await self._versions.manifest(version)
        if manifest.architecture != before.architecture:
            differs = await self._server.check_fits(manifest)
            if differs:
                raise DoesNotFit(f"version {version} does not fit the code that is in use: {differs}")
        return await self._versions.crown(version, reason, anew=True)

    async def _start_lineage(self, request: StartLineage) -> Body:
        async with self._server.turn:
            before = self._server.champion
            if before is None or not self._server.allows(ServerEvent.LINEAGE_STARTED):
                return Refused(
                    reason="a new lineage begins between two runs: wait for this one, or stop it"
                    if before
                    else "there is no model yet, and the first one is made by itself: see `fedbus events tail`"
                )
            try:
                await self._server.begin_lineage_by_hand(request.reason)
            except (StoreError, RequestRefused) as error:
                return Refused(reason=str(error))
            model = self._server.champion
            assert model is not None
            return ModelPromoted(model=model, instead_of=before.version)
