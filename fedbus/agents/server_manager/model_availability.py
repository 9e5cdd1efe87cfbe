"""The model that is served, kept on offer; and the repository that it lies in, looked after.

Part of the server manager. The repository may be away, closed to us, damaged or empty: which of them is told
once, as ``store_unavailable`` with its `StoreTrouble`, and it is asked again, later each time, until
all is well (``store_recovered``). Meanwhile the server stays up, clients get whatever can still be had, and
runs are refused with the reason. A model is begun only where the log knows of none and the repository
has answered that it is empty: one that is empty *now* is not the one that the log knows.

An answer may take as long as the repository is patient. So it is waited for outside the turn, and only what
is decided on it is decided in the turn.
"""

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import structlog

from fedbus.agents.common.asyncio_tools import Timers, backoff
from fedbus.agents.server_manager.model_promotion import TheServer
from fedbus.agents.server_manager.model_versions import Served, StoreEmpty, Versions
from fedbus.bus.errors import RequestRefused
from fedbus.contracts.model import BlobRef
from fedbus.contracts.server import ServerEvent, StoreTrouble
from fedbus.stores.errors import StoreDenied, StoreError, StoreUnavailable

ASK_AGAIN: Final = "ask the model repository again"

log = structlog.get_logger("fedbus.keeping")


class TheKeeper(TheServer, Protocol):
    """What the server manager does for it, beside what it does for promotions."""

    @property
    def receivers(self) -> int:
        """How many clients may ask for the model at once."""

    async def record_trouble(
        self, event: ServerEvent, reason: str = "", *, trouble: StoreTrouble | None
    ) -> None:
        """Publish *event* about the model repository, with what is wrong with it from here on."""

    async def tell_the_version(self, reason: str = "") -> None:
        """Have every client hear which model is served."""

    async def first_version(self) -> Served:
        """Have the first model of all built and crowned; raises StoreError, RequestRefused."""

    async def begin_with(self, served: Served) -> None:
        """There is a model now: from here on runs may come."""

    async def settle(self) -> None:
        """All is well again: do what has waited for that."""


class Keeping:
    """The served version of one server, and its repository."""

    def __init__(self, server: TheKeeper, versions: Versions, timers: Timers) -> None:
        self._server = server
        self._versions = versions
        self._timers = timers
        self._attempt = 0
        self.trouble = ""
        """What is wrong with the repository, or with the first model, in words; empty where all is well."""

    @property
    def on_offer(self) -> BlobRef | None:
        """Where clients get the served version; None where it could not be had yet."""
        champion = self._server.champion
        return self._versions.on_offer(champion) if champion else None

    # --- the turn is ours ------------------------------------------------------------------------

    async def begin(self) -> None:
        """Take up the champion, or have a first model made where there never was one."""
        try:
            served = await self._versions.first() or await self._server.first_version()
            self._all_is_well()  # before it is told: whoever hears of it may ask for a run at once
            await self._server.begin_with(served)
            await self._offer()
        except StoreError as error:
            await self._tell_trouble(error)
        except RequestRefused as error:
            await self._tell_once(ServerEvent.MODEL_NOT_BUILT, str(error), trouble=None)

    async def take_up(self) -> None:
        """Go on with the champion that the log knows, or that was crowned in the moment in which a manager ended."""
        try:
            await self._follow(await self._look())
            await self._offer()
        except StoreError as error:
            await self._tell_trouble(error)
        else:
            await self._recover()

    async def give_out(self, reason: str = "") -> None:
        """There is another champion: every client is to have it, as soon as it can be had."""
        try:
            await self._offer()
        except StoreError as error:
            await self._tell_trouble(error)
        else:
            await self._server.tell_the_version(reason)

    async def _offer(self) -> None:
        champion = self._server.champion
        assert champion is not None
        if self.on_offer is None:
            await self._versions.offer(champion, receivers=self._server.receivers)

    async def _follow(self, served: Served) -> None:
        """The pointer in the repository may be ahead of the log, where a manager ended in between: it is right."""
        if served.champion.term > self._server.term:
            await self._server.serve(ServerEvent.MODEL_PROMOTED, served)

    async def _recover(self) -> None:
        self._all_is_well()
        if self._server.trouble is not None:
            await self._server.record_trouble(ServerEvent.STORE_RECOVERED, trouble=None)

    def _all_is_well(self) -> None:
        self._timers.cancel(ASK_AGAIN)
        self.trouble, self._attempt = "", 0

    async def _tell_trouble(self, error: StoreError) -> None:
        await self._tell_once(ServerEvent.STORE_UNAVAILABLE, str(error), trouble=trouble_of(error))

    async def _tell_once(self, event: ServerEvent, reason: str, trouble: StoreTrouble | None) -> None:
        """Once for each reason: the log is no heartbeat. Then it is asked again."""
        if reason != self.trouble:
            self.trouble = reason
            log.warning("the model is not to be had", because=str(event), reason=reason)
            await self._server.record_trouble(event, reason, trouble=trouble)
        self._timers.after(ASK_AGAIN, backoff(self._attempt), self._ask_again)
        self._attempt += 1

    # --- the turn is not ours ------------------------------------------------------------------------

    async def _ask_again(self) -> None:
        if self._server.champion is None:
            async with self._server.turn:
                await self.begin()
        else:
            found = [await self._tried(one) for one in (self._look_after, self._fetch)]
            error = next(filter(None, found), None)
            async with self._server.turn:
                await (self._tell_trouble(error) if error else self._recover())
        if not self.trouble:
            async with self._server.turn:
                await self._server.settle()

    async def _tried(self, what: Callable[[], Awaitable[None]]) -> StoreError | None:
        try:
            await what()
        except StoreError as error:
            return error
        return None

    async def _look_after(self) -> None:
        served = await self._look()
        async with self._server.turn:
            await self._follow(served)

    async def _fetch(self) -> None:
        """Give out what can be had, whatever else is wrong: a copy may lie on this machine."""
        champion = self._server.champion
        assert champion is not None
        await self._versions.file_of(champion)
        async with self._server.turn:
            if self.on_offer is None:
                await self._offer()
                await self._server.tell_the_version()

    async def _look(self) -> Served:
        champion = self._server.champion
        assert champion is not None
        return await self._versions.known(champion, self._server.term)


def trouble_of(error: StoreError) -> StoreTrouble:
    """Which of the four it is. What should be there and is not is damage."""
    match error:
        case StoreEmpty():
            return StoreTrouble.EMPTY
        case StoreDenied():
            return StoreTrouble.DENIED
        case StoreUnavailable():
            return StoreTrouble.UNAVAILABLE
        case _:
            return StoreTrouble.DAMAGED
