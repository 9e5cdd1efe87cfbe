"""The flower-server agent as the server manager asks it: for a first model, a check of code, a run's server.

It may be restarted, or held up by a store that does not answer: what passes is asked for again, the rest is a refusal.
"""

import asyncio
from contextlib import suppress
from itertools import count

import structlog

from fedbus.agents.common.asyncio_tools import ask_until_answered, backoff
from fedbus.bus.bus import Bus
from fedbus.bus.errors import NoAnswer, RequestRefused
from fedbus.contracts.code import CheckCode, CodeChecked
from fedbus.contracts.message import RefusalKind, Refused
from fedbus.contracts.model import Artifact
from fedbus.contracts.server import (
    FindServer,
    InitModel,
    ModelInitialised,
    ServerFound,
    StartServer,
    StopServer,
)

START_TIMEOUT_S = 30.0
INIT_TIMEOUT_S = 300.0

log = structlog.get_logger("fedbus.flower_asked")


class FlowerAsked:
    """The flower-server agent of *task*."""

    def __init__(self, bus: Bus, task: str) -> None:
        self._bus = bus
        self._task = task
        self._checking = asyncio.Lock()
        self._differs: dict[tuple[str, str], str] = {}
        """Of a code version and an architecture: where the first makes another model than the second."""

    async def first_model(self, code_version: str) -> Artifact:
        """The model that this code begins with, in the model repository; raises RequestRefused."""
        request = InitModel(task=self._task, code_version=code_version)
        made: ModelInitialised = await ask_until_answered(self._bus, request, timeout_s=INIT_TIMEOUT_S)
        return made.artifact

    async def differs(self, model: Artifact, code_version: str) -> str:
        """Where *model* is not what the code makes, in words; empty where it is. Raises RequestRefused."""
        async with self._checking:
            if (code_version, model.architecture) not in self._differs:
                check = CheckCode(task=self._task, code_version=code_version, like=model.sha256)
                checked: CodeChecked = await ask_until_answered(self._bus, check, timeout_s=INIT_TIMEOUT_S)
                self._differs[code_version, model.architecture] = checked.differs
            return self._differs[code_version, model.architecture]

    def note_fit(self, code_version: str, model: Artifact) -> None:
        """It is known already that the code makes such a model."""
        self._differs[code_version, model.architecture] = ""

    async def start(self, request: StartServer) -> Refused | None:
        """Have a run's server started, and ask again where what hinders it may pass; why not, where it was not."""
        nobody = f"no flower-server agent answered within {START_TIMEOUT_S:g} s"
        refusal = Refused(reason=nobody, kind=RefusalKind.RETRYABLE)
        with suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                for attempt in count():
                    try:
                        await ask_until_answered(self._bus, request)
                    except RequestRefused as error:
                        refusal = Refused(reason=str(error), kind=error.kind)
                    else:
                        return None
                    if refusal.kind is not RefusalKind.RETRYABLE:
                        break
                    await asyncio.sleep(backoff(attempt))
        return refusal

    async def is_up(self, run: str, *, say_so: bool = False) -> bool:
        """Whether the run's server is there, whatever was said of it; *say_so*: where it is not, its loss is told."""
        request = FindServer(task=self._task, run=run, say_so=say_so)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                found: ServerFound = await ask_until_answered(self._bus, request)
        except (RequestRefused, TimeoutError):
            return False
        return found.up

    async def stop(self, run: str) -> None:
        """Have the run's server stopped, if it still answers."""
        try:
            await self._bus.request(StopServer(task=self._task, run=run), timeout_s=START_TIMEOUT_S)
        except (RequestRefused, NoAnswer) as error:
            log.warning("the Flower server did not stop when asked", run=run, reason=str(error))
