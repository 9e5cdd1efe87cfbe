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

    checks_until: asyncio.Event | None = None
    """How long a check takes."""
    hindered: str = ""
    """Why nothing can be checked or started now."""
    passes: bool = True
    """Whether that may pass by itself."""
    asked_to_run: list[StartRun] = field(default_factory=list)

    @asynccontextmanager
    async def there(self) -> AsyncIterator[None]:
        scheduler = await self.fed.speaker("workflow-scheduler")
        asked: dict[Any, Any] = {StartRun: self._run, StopRun: self._run}
        async with self.serving(), scheduler.serve(asked, task=TASK, version="1.0.0"):
            yield

    async def clients(self, *names: str, **labels: str) -> None:
        """Clients that the log knows."""
        for name in names:
            async with LifecycleStore.open(await self.fed.speaker("client-manager", name)) as lives:
                life = await lives.of(CLIENT, ClientData(task=TASK, client=name, labels=labels))
                await life.create()

    async def ready(self, client: str, version: str) -> None:
        said = CodeReady(task=TASK, client=client, code_version=version)
        await self.fed.say(said, by="client-manager")

    async def refuses(self, client: str, version: str, reason: str, attempt: int | None = None) -> None:
        said = CodeRefused(task=TASK, client=client, code_version=version, reason=reason, attempt=attempt)
        await self.fed.say(said, by="client-manager")

    async def run(
        self, number: int, version: str, *clients: str, loss: float = 0.5, failures: tuple[str, ...] = ()
    ) -> None:
        """A run of *version* with these clients, from its opening to its end."""
        async with self.in_a_run(number, version, *clients, loss=loss, failures=failures):
            pass

    @asynccontextmanager
    async def in_a_run(
        self, number: int, version: str, *clients: str, loss: float = 0.5, failures: tuple[str, ...] = ()
    ) -> AsyncIterator[None]:
        """The same, which trains while the block runs."""
        await self.begin(number, PLAN, *clients, version=version)
        yield
        participants = {one: 10 for one in clients if one not in failures}
        failed = dict.fromkeys(failures, "it raised ValueError")
        result = RoundResult(round=1, metrics={"loss": loss}, participants=participants, failures=failed)
        await self.end(number, result)

    async def take(
        self, server: "RolloutServer", files: dict[str, str], repository: Repository, by: CommitSigner
    ) -> str:
        """A commit that two clients have taken up, and that is to be tried by a run."""
        await self.clients("c1", "c2")
        new = repository.commit(files, by=by)
        await server.look()
        for client in ("c1", "c2"):
            await self.ready(client, new)
        await self.fed.until(lambda: bool(self.asked_to_run), "a run of the candidate to be asked for")
        return new

    async def take_and_try(
        self, server: "RolloutServer", files: dict[str, str], repository: Repository, by: CommitSigner
    ) -> str:
        """The same, which a run has tried, so that everybody is on it."""
        new = await self.take(server, files, repository, by)
        await self.run(1, new, "c1", "c2")
        await self.fed.happens("code", "rollout_finished")
        return new

    async def check(self, request: CheckCode) -> Body:
        answer = await super().check(request)
        if self.checks_until is not None:
            await self.checks_until.wait()
        return Refused(reason=self.hindered, kind=RefusalKind.RETRYABLE) if self.hindered else answer

    async def start(self, request: StartServer) -> Body:
        if self.hindered:
            kind = RefusalKind.RETRYABLE if self.passes else RefusalKind.NEEDS_OPERATOR
            return Refused(reason=self.hindered, kind=kind)
        return await super().start(request)

    async def _run(self, request: StartRun) -> Body:
        self.asked_to_run.append(request)
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

    async def look(self) -> str:
        return str((await self.fed.bus.request(LookForCode(task=TASK), timeout_s=30)).news)

    @property
    def facts(self) -> CodeData:
        facts = self.fed.last("code").facts
        assert isinstance(facts, CodeData)
        return facts
