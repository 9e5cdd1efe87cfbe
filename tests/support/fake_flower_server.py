"""The Flower server as a server manager knows it, played by a test; each test module plays what it needs besides."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CheckCode, CodeChecked
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.model import Artifact
from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.server import (
    BeginTraining,
    FindServer,
    InitModel,
    ModelInitialised,
    OpenRun,
    RoundFinished,
    RunFinished,
    ServerClosed,
    ServerFound,
    ServerStarting,
    ServerStopped,
    StartServer,
    StopServer,
)
from fedbus.learning import weights
from fedbus.stores.models.open import ModelStore, open_model_store
from support.federation import TASK, FederationHarness, with_refusals


@dataclass
class FakeFlowerServer:
    """It builds, checks and starts whatever it is told to, and keeps what it was asked."""

    fed: FederationHarness
    width: int = 3
    """How many numbers a model has."""
    made: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    """Why a code version does not pass its check."""
    differs: dict[str, str] = field(default_factory=dict)
    """Where a code version makes another model than the one it is compared with."""
    built: list[InitModel] = field(default_factory=list)
    checked: list[CheckCode] = field(default_factory=list)
    starts: list[StartServer] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    @property
    def store(self) -> ModelStore:
        return open_model_store(self.fed.site.store_url, TASK)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Self]:
        bus = await self.fed.speaker("flower-server")
        answers: dict[Any, Any] = {
            InitModel: self.init,
            StartServer: self.start,
            StopServer: self.stop,
            FindServer: self.find,
            CheckCode: self.check,
        }
        async with bus.serve(with_refusals("flower-server", answers), task=TASK, version="1.0.0"):
            yield self

    async def artifact(self) -> Artifact:
        """Another model, in the repository."""
        self.made += 1
        return await self.of_value(self.made)

    async def of_value(self, value: float) -> Artifact:
        """A model all of whose numbers are *value*, in the repository."""
        path = self.fed.site.home / f"made-{value}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact = weights.save({"w": np.full(self.width, value, np.float32)}, path)
        await self.store.put(path, artifact.sha256)
        return artifact

    # --- a run ---------------------------------------------------------------------------------

    async def begin(self, number: int, plan: RunPlan, *clients: str, version: str = "") -> None:
        """A run that is in training, of the code *version* or the task's own."""
        run = f"{TASK}-{number}"
        await self.fed.bus.request(OpenRun(task=TASK, run=run, plan=plan))
        for client in clients:
            code = version or self.fed.site.task.code_version
            await self.fed.say(
                ClientJoined(task=TASK, client=client, run=run, code_version=code), by="trainer"
            )
        await self.fed.hears(BeginTraining, times=number)

    async def end(self, number: int, result: RoundResult) -> None:
        """The run comes to a model by its only round."""
        run = f"{TASK}-{number}"
        artifact = await self.artifact()
        for word in (
            RoundFinished(task=TASK, run=run, round=1, result=result, checkpoint=artifact),
            RunFinished(task=TASK, run=run, rounds=1, artifact=artifact),
        ):
            await self.fed.say(word, by="flower-server")
        await self.fed.hears(ServerClosed, times=number)

    # --- what it is asked ------------------------------------------------------------------------

    async def init(self, request: InitModel) -> Body:
        self.built.append(request)
        return ModelInitialised(artifact=await self.artifact())

    async def check(self, request: CheckCode) -> Body:
        self.checked.append(request)
        if (why := self.broken.get(request.code_version)) is not None:
            return Refused(reason=why)
        return CodeChecked(architecture="0" * 64, differs=self.differs.get(request.code_version, ""))

    async def start(self, request: StartServer) -> Body:
        self.starts.append(request)
        return ServerStarting()

    async def stop(self, request: StopServer) -> Body:
        self.stopped.append(request.run)
        return ServerStopped()

    async def find(self, _: FindServer) -> Body:
        return ServerFound(up=True)
