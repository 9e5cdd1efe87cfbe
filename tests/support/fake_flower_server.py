"""A fake Flower server, for tests of the server manager."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CheckCode, CodeChecked
from fedbus.contracts.flower_server import (
    BeginTraining,
    FindServer,
    InitModel,
    ModelInitialised,
    RoundFinished,
    RunFinished,
    ServerFound,
    ServerStarting,
    ServerStopped,
    StartServer,
    StopServer,
)
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.model import Artifact
from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.server import OpenRun, ServerClosed
from fedbus.learning import weights
from fedbus.stores.models.open import ModelStore, open_model_store
from support.federation import TASK, FederationHarness, with_refusals


@dataclass
class FakeFlowerServer:
    """Replies to all requests of the server manager, and records them."""

    fed: FederationHarness
    width: int = 3
    """Number of weights of a model."""
    model_count: int = 0
    check_errors: dict[str, str] = field(default_factory=dict)
    """Code version → reason why its check fails."""
    differences: dict[str, str] = field(default_factory=dict)
    """Code version → first difference of its model from the champion."""
    build_requests: list[InitModel] = field(default_factory=list)
    check_requests: list[CheckCode] = field(default_factory=list)
    start_requests: list[StartServer] = field(default_factory=list)
    stopped_runs: list[str] = field(default_factory=list)

    @property
    def store(self) -> ModelStore:
        return open_model_store(self.fed.config.store_url, TASK)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Self]:
        bus = await self.fed.connect_as("flower-server")
        answers: dict[Any, Any] = {
            InitModel: self.init,
            StartServer: self.start,
            StopServer: self.stop,
            FindServer: self.find,
            CheckCode: self.check,
        }
        async with bus.serve(with_refusals("flower-server", answers), task=TASK, version="1.0.0"):
            yield self

    async def make_artifact(self) -> Artifact:
        """Make a new model in the repository."""
        self.model_count += 1
        return await self.make_model(self.model_count)

    async def make_model(self, value: float) -> Artifact:
        """Make a model in the repository, all of whose weights are *value*."""
        path = self.fed.config.home / f"made-{value}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact = weights.save({"w": np.full(self.width, value, np.float32)}, path)
        await self.store.put(path, artifact.sha256)
        return artifact

    # --- a run ---------------------------------------------------------------------------------

    async def begin_run(self, number: int, plan: RunPlan, *clients: str, version: str = "") -> None:
        """Bring a run into training, with the code *version* or that of the task."""
        run = f"{TASK}-{number}"
        await self.fed.bus.request(OpenRun(task=TASK, run=run, plan=plan))
        for client in clients:
            code = version or self.fed.config.task.code_version
            await self.fed.publish(
                ClientJoined(task=TASK, client=client, run=run, code_version=code), sender="trainer"
            )
        await self.fed.wait_for_message(BeginTraining, times=number)

    async def finish_run(self, number: int, result: RoundResult) -> None:
        """Finish the run with a model, after its only round."""
        run = f"{TASK}-{number}"
        artifact = await self.make_artifact()
        for message in (
            RoundFinished(task=TASK, run=run, round=1, result=result, checkpoint=artifact),
            RunFinished(task=TASK, run=run, rounds=1, artifact=artifact),
        ):
            await self.fed.publish(message, sender="flower-server")
        await self.fed.wait_for_message(ServerClosed, times=number)

    # --- requests ----------------------------------------------------------------------------------

    async def init(self, request: InitModel) -> Body:
        self.build_requests.append(request)
        return ModelInitialised(artifact=await self.make_artifact())

    async def check(self, request: CheckCode) -> Body:
        self.check_requests.append(request)
        if (reason := self.check_errors.get(request.code_version)) is not None:
            return Refused(reason=reason)
        return CodeChecked(architecture="0" * 64, differs=self.differences.get(request.code_version, ""))

    async def start(self, request: StartServer) -> Body:
        self.start_requests.append(request)
        return ServerStarting()

    async def stop(self, request: StopServer) -> Body:
        self.stopped_runs.append(request.run)
        return ServerStopped()

    async def find(self, _: FindServer) -> Body:
        return ServerFound(up=True)
