"""New code on its way, played: everybody whom the server manager talks to, and the manager at work."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import CLIENT, ClientData
from fedbus.contracts.code import CheckCode, CodeData, CodeReady, CodeRefused, LookForCode
from fedbus.contracts.message import Body, RefusalKind, Refused
from fedbus.contracts.run import RoundResult, RunPlan, RunStarted, StartRun, StopRun
from fedbus.contracts.server import StartServer
from fedbus.stores.code.open import CodeRepository
from support.fake_flower_server import FakeFlowerServer
from support.federation import TASK, TINY_TASK, FederationHarness, RunningAgent
from support.git_repositories import CommitSigner, Repository

REVISED_FILES = {"tiny/__init__.py": "REVISION = 2\n"}
PLAN = RunPlan(rounds=1, quorum=2, recruit_s=30, round_s=30)


@dataclass
class FakePeers(FakeFlowerServer):
    """Everybody whom the server manager talks to, played: the Flower server, the scheduler, the clients."""

    check_gate: asyncio.Event | None = None
    """How long a check takes."""
    blocked_reason: str = ""
    """Why nothing can be checked or started now."""
    is_transient: bool = True
    """Whether that may pass by itself."""
    run_requests: list[StartRun] = field(default_factory=list)

    @asynccontextmanager
    async def serve_all(self) -> AsyncIterator[None]:
        scheduler = await self.fed.connect_as("workflow-scheduler")
        asked: dict[Any, Any] = {StartRun: self._start_run, StopRun: self._start_run}
        async with self.serve(), scheduler.serve(asked, task=TASK, version="1.0.0"):
            yield

    async def create_clients(self, *names: str, **labels: str) -> None:
        """Clients that the log knows."""
        for name in names:
            async with LifecycleStore.open(await self.fed.connect_as("client-manager", name)) as lives:
                life = await lives.of(CLIENT, ClientData(task=TASK, client=name, labels=labels))
                await life.create()

    async def send_code_ready(self, client: str, version: str) -> None:
        said = CodeReady(task=TASK, client=client, code_version=version)
        await self.fed.publish(said, sender="client-manager")

    async def send_code_refused(
        self, client: str, version: str, reason: str, attempt: int | None = None
    ) -> None:
        said = CodeRefused(task=TASK, client=client, code_version=version, reason=reason, attempt=attempt)
        await self.fed.publish(said, sender="client-manager")

    async def complete_run(
        self, number: int, version: str, *clients: str, loss: float = 0.5, failures: tuple[str, ...] = ()
    ) -> None:
        """A run of *version* with these clients, from its opening to its end."""
        async with self.training_run(number, version, *clients, loss=loss, failures=failures):
            pass

    @asynccontextmanager
    async def training_run(
        self, number: int, version: str, *clients: str, loss: float = 0.5, failures: tuple[str, ...] = ()
    ) -> AsyncIterator[None]:
        """The same, which trains while the block runs."""
        await self.begin_run(number, PLAN, *clients, version=version)
        yield
        participants = {one: 10 for one in clients if one not in failures}
        failed = dict.fromkeys(failures, "it raised ValueError")
        result = RoundResult(round=1, metrics={"loss": loss}, participants=participants, failures=failed)
        await self.finish_run(number, result)

    async def prepare_candidate(
        self, server: "RolloutServer", files: dict[str, str], repository: Repository, by: CommitSigner
    ) -> str:
        """A commit that two clients have taken up, and that is to be tried by a run."""
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
        """The same, which a run has tried, so that everybody is on it."""
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
    """The task's table, with a rollout in these stages."""
    shares = ", ".join(f'"{one}"' for one in stages)
    more = "\n".join(f"{name.replace('_', '-')} = {value}" for name, value in table.items())
    return (
        f"{(TINY_TASK / 'pyproject.toml').read_text()}\n[tool.fedbus.rollout]\nstages = [{shares}]\n{more}\n"
    )


def has_checkout(directory: Path, version: str) -> bool:
    """Whether the server has the files of *version*."""
    return any(directory.glob(f"home/code/*/{version}/pyproject.toml"))


class RolloutServer:
    """The server manager at work."""

    def __init__(self, fed: FederationHarness, code: CodeRepository, agent: RunningAgent) -> None:
        self.fed, self.code, self.agent = fed, code, agent

    async def look_for_code(self) -> str:
        return str((await self.fed.bus.request(LookForCode(task=TASK), timeout_s=30)).news)

    @property
    def facts(self) -> CodeData:
        facts = self.fed.last_transition("code").facts
        assert isinstance(facts, CodeData)
        return facts
