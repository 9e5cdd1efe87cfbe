"""Requests to the flower-server agent: a first model, a check of code, the Flower server of a run.

The agent may be restarted, or blocked by a store that does not answer: retryable refusals are retried.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

import structlog

from fedbus.agents.common.asyncio_tools import request_until_answered
from fedbus.bus.bus import Bus
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.common.retry import RetryBackoff
from fedbus.contracts.code import CheckCode, CodeChecked
from fedbus.contracts.flower_server import FindServer, InitModel, StartServer, StopServer
from fedbus.contracts.message import RefusalKind, Refused
from fedbus.contracts.model import Artifact

START_TIMEOUT_S = 30.0
INIT_TIMEOUT_S = 300.0

log = structlog.get_logger("fedbus.flower_server_client")


@dataclass(frozen=True)
class ArchitectureComparison:
    """A stored model compared with the model that the code of a task builds."""

    difference: str = ""
    """The first tensor that differs; empty if none does, or the task names no builder."""
    is_fixed: bool = False
    """True if the task declares its architecture as fixed."""


class FlowerServerClient:
    """The flower-server agent of *task*."""

    def __init__(self, bus: Bus, task: str) -> None:
        self._bus = bus
        self._task = task
        self._check_lock = asyncio.Lock()
        self._comparisons: dict[tuple[str, str], ArchitectureComparison] = {}
        """By code version and architecture."""

    async def build_first_model(self, code_version: str) -> Artifact:
        """Build and store the first model of *code_version*; raises RequestRefused."""
        request = InitModel(task=self._task, code_version=code_version)
        made = await request_until_answered(self._bus, request, timeout_s=INIT_TIMEOUT_S)
        return made.artifact

    async def compare_architecture(self, model: Artifact, code_version: str) -> ArchitectureComparison:
        """Compare *model* with the model that the code builds. Raises RequestRefused."""
        async with self._check_lock:
            key = (code_version, model.architecture)
            if key not in self._comparisons:
                check = CheckCode(task=self._task, code_version=code_version, like=model.sha256)
                checked = await request_until_answered(self._bus, check, timeout_s=INIT_TIMEOUT_S)
                self._comparisons[key] = ArchitectureComparison(checked.differs, checked.fixed)
            return self._comparisons[key]

    def record_comparison(self, code_version: str, model: Artifact, checked: CodeChecked) -> None:
        """Remember the result of a check that compared the code's model with *model*."""
        comparison = ArchitectureComparison(checked.differs, checked.fixed)
        self._comparisons[code_version, model.architecture] = comparison

    async def start(self, request: StartServer) -> Refused | None:
        """Start the Flower server of a run. Return the refusal if it did not start in time, otherwise None."""
        refusal = Refused(
            reason=f"no flower-server agent answered within {START_TIMEOUT_S:g} s", kind=RefusalKind.RETRYABLE
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                backoff = RetryBackoff()
                while True:
                    try:
                        await request_until_answered(self._bus, request)
                    except RequestRefused as error:
                        refusal = Refused(reason=str(error), kind=error.kind)
                    else:
                        return None
                    if refusal.kind is not RefusalKind.RETRYABLE:
                        break
                    await backoff.pause()
        return refusal

    async def is_running(self, run: str, *, report_loss: bool = False) -> bool:
        """Return whether the Flower server of *run* runs.

        Args:
            run: The run.
            report_loss: Request a report of its loss as `ServerLost`, after all of its own messages.

        """
        request = FindServer(task=self._task, run=run, say_so=report_loss)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                found = await request_until_answered(self._bus, request)
        except (RequestRefused, TimeoutError):
            return False
        return found.up

    async def stop(self, run: str) -> None:
        """Stop the Flower server of *run*, if it still answers."""
        try:
            await self._bus.request(StopServer(task=self._task, run=run), timeout_s=START_TIMEOUT_S)
        except (RequestRefused, NoResponse) as error:
            log.warning("Cannot stop the Flower server", run=run, reason=str(error))
