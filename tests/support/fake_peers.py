"""Fakes of all peers of the server manager, and a running server manager, for tests of code rollouts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import CLIENT, ClientData
from fedbus.contracts.code import CheckCode, CodeData, CodeReady, CodeRefused, LookForCode
from fedbus.contracts.flower_server import StartServer
from fedbus.contracts.message import Body, RefusalKind, Refused
from fedbus.contracts.run import RoundResult, RunPlan, RunStarted, StartRun, StopRun
from fedbus.stores.code.open import CodeRepository
from support.fake_flower_server import FakeFlowerServer
from support.federation import TASK, TINY_TASK, FederationHarness, RunningAgent
from support.git_repositories import CommitSigner, Repository

REVISED_FILES = {"tiny/__init__.py": "REVISION = 2\n"}
PLAN = RunPlan(rounds=1, quorum=2, recruit_s=30, round_s=30)


@dataclass
class FakePeers(FakeFlowerServer):
    """The peers of the server manager: Flower server, workflow scheduler and clients."""

    check_gate: asyncio.Event | None = None
    """A check waits for this event."""
    blocked_reason: str = ""
    """If set, checks and starts are refused with this reason."""
    is_transient: bool = True
    """Whether that refusal can be retried."""
    run_requests: list[StartRun] = field(default_factory=list)

    @asynccontextmanager
    async def serve_all(self) -> AsyncIterator[None]:
        scheduler = await self.fed.connect_as("workflow-scheduler")
        answers: dict[Any, Any] = {StartRun: self._start_run, StopRun: self._start_run}
        async with self.serve(), scheduler.serve(answers, task=TASK, version="1.0.0"):
            yield

    async def create_clients(self, *names: str, **labels: str) -> None:
        """Create the lifecycles of clients."""
        for name in names:
            async with LifecycleStore.open(await self.fed.connect_as("client-manager", name)) as lifecycles:
                life = await lifecycles.load(CLIENT, ClientData(task=TASK, client=name, labels=labels))
                await life.create()

    async def send_code_ready(self, client: str, version: str) -> None:
        message = CodeReady(task=TASK, client=client, code_version=version)
        await self.fed.publish(message, sender="client-manager")

    async def send_code_refused(
        self, client: str, version: str, reason: str, attempt: int | None = None
    ) -> None:
        message = CodeRefused(task=TASK, client=client, code_version=version, reason=reason, attempt=attempt)
        await self.fed.publish(message, sender="client-manager")

    async def complete_run(
        self, number: int, version: str, *clients: str, loss: float = 0.5, failures: tuple[str, ...] = ()
    ) -> None:
        """Run *version* with these clients from start to end."""
        async with self.training_run(number, version, *clients, loss=loss, failures=failures):
            pass

    @asynccontextmanager
    async def training_run(
        self, number: int, version: str, *clients: str, loss: float = 0.5, failures: tuple[str, ...] = ()
    ) -> AsyncIterator[None]:
        """The same; the run is in training until the block ends."""
        await self.begin_run(number, PLAN, *clients, version=version)
        yield
        participants = {one: 10 for one in clients if one not in failures}
        failed = dict.fromkeys(failures, "ValueError: no such column")
        result = RoundResult(round=1, metrics={"loss": loss}, participants=participants, failures=failed)
        await self.finish_run(number, result)

    async def prepare_candidate(
        self, server: "RolloutServer", files: dict[str, str], repository: Repository, by: CommitSigner
    ) -> str:
        """Commit *files* and bring the rollout to its trial run: two clients have the code ready."""
        await self.create_clients("c1", "c2")
        new = repository.commit(files, by=by)
        await server.look_for_code()
        for client in ("c1", "c2"):
            await self.send_code_ready(client, new)
        await self.fed.wait_until(lambda: bool(self.run_requests), "a run of the candidate to be asked for")
        return new

    async def roll_out_candidate(
        self, server: "RolloutServer", files: dict[str, str], repository: Repository, by: CommitSigner
    ) -> str:
        """Commit *files* and finish the rollout: a run has tried the code, and all clients have it."""
        new = await self.prepare_candidate(server, files, repository, by)
        await self.complete_run(1, new, "c1", "c2")
        await self.fed.wait_for_event("code", "rollout_finished")
        return new

    async def check(self, request: CheckCode) -> Body:
        answer = await super().check(request)
        if self.check_gate is not None:
            await self.check_gate.wait()
        return (
            Refused(reason=self.blocked_reason, kind=RefusalKind.RETRYABLE) if self.blocked_reason else answer
        )

    async def start(self, request: StartServer) -> Body:
        if self.blocked_reason:
            kind = RefusalKind.RETRYABLE if self.is_transient else RefusalKind.NEEDS_OPERATOR
            return Refused(reason=self.blocked_reason, kind=kind)
        return await super().start(request)

    async def _start_run(self, request: StartRun) -> Body:
        self.run_requests.append(request)
        return RunStarted(run=f"{TASK}-1")


def rollout_table(*stages: str, **table: object) -> str:
    """The task's pyproject.toml with a rollout in these stages."""
    shares = ", ".join(f'"{one}"' for one in stages)
    more = "\n".join(f"{name.replace('_', '-')} = {value}" for name, value in table.items())
    return (
        f"{(TINY_TASK / 'pyproject.toml').read_text()}\n[tool.fedbus.rollout]\nstages = [{shares}]\n{more}\n"
    )


def has_checkout(directory: Path, version: str) -> bool:
    """Whether the server has a checkout of *version*."""
    return any(directory.glob(f"home/code/*/{version}/pyproject.toml"))


class RolloutServer:
    """A running server manager."""

    def __init__(self, fed: FederationHarness, code: CodeRepository, agent: RunningAgent) -> None:
        self.fed, self.code, self.agent = fed, code, agent

    async def look_for_code(self) -> str:
        return str((await self.fed.bus.request(LookForCode(task=TASK), timeout_s=30)).news)

    @property
    def facts(self) -> CodeData:
        facts = self.fed.last_transition("code").facts
        assert isinstance(facts, CodeData)
        return facts
