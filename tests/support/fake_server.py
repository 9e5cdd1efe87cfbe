"""Fakes of the server side and of the inference agent, for tests of a client manager on a real bus."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np

from fedbus.bus.blobs import BlobOffer
from fedbus.contracts.catalogue import CLIENT_CONSUMERS
from fedbus.contracts.client import InferReady, InferRefused, InferStart
from fedbus.contracts.code import CodePlan
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.model import BlobRef, Manifest, ModelRef, ModelSignature
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import (
    CancelRun,
    Enroll,
    Enrolled,
    GetServerInfo,
    HealthCheck,
    HealthStatus,
    ModelPublished,
    OpenRun,
    RunCancelled,
    RunOpened,
    ServerInfo,
    ServerState,
    UpdateReady,
)
from fedbus.contracts.serving import ModelComparison, ModelRolledBack
from fedbus.learning import weights
from fedbus.stores.models.signing import ModelSigner
from support.federation import TASK, FederationHarness, with_refusals

CLIENT_NAME: Final = "c1"
RUN: Final = f"{TASK}-1"


@dataclass
class FakeServer:
    """A fake server side: enrolls clients, offers its model, and reports the open run."""

    fed: FederationHarness
    model: ModelRef | None = None
    offer: BlobOffer | None = None
    open_run: UpdateReady | None = None
    refusal: str = ""
    code: CodePlan | None = None
    signer: ModelSigner | None = None
    term: int = 0
    info_request_count: int = 0
    offers: list[BlobOffer] = field(default_factory=list)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["FakeServer"]:
        answers: dict[Any, Any] = {
            Enroll: self._enroll,
            GetServerInfo: self._info,
            HealthCheck: self._health,
            OpenRun: self._open,
            CancelRun: self._cancel,
        }
        async with (await self.fed.connect_as("server-manager")).serve(
            with_refusals("server-manager", answers), task=TASK, version="1.0.0"
        ):
            yield self
        for offer in self.offers:
            offer.release()

    async def set_model(self, version: int) -> tuple[ModelRef, BlobRef]:
        """Make this version the server's model."""
        path = self.fed.config.home / f"v{version}.safetensors"
        artifact = weights.save({"w": np.full(8, version, np.float32)}, path)
        self.model = ModelRef(**artifact.model_dump(), version=version)
        self.offer = await (await self.fed.connect_as("server-manager")).blobs.offer(path)
        self.offers.append(self.offer)
        return self.model, self.offer.ref

    async def publish_model(self, version: int) -> ModelRef:
        model, blob = await self.set_model(version)
        message = ModelPublished(task=TASK, model=model, blob=blob, run=RUN, term=self.term, seal=self.seal)
        await self.fed.publish(message, sender="server-manager")
        return model

    @property
    def seal(self) -> ModelSignature | None:
        """The signature of the model."""
        if self.signer is None or self.model is None:
            return None
        manifest = Manifest(**self.model.model_dump(), task=TASK, created=datetime.now(UTC))
        return self.signer.sign(manifest).seal

    def make_invitation(self, run: str = RUN, **changes: Any) -> UpdateReady:
        known = {
            "task": TASK,
            "run": run,
            "plan": RunPlan(rounds=1, recruit_s=30, round_s=30),
            "recruit_until": datetime.now(UTC) + timedelta(seconds=30),
            "code_version": self.fed.config.task.code_version,
        }
        return UpdateReady.model_validate(known | changes)

    async def send_invitation(self, run: str = RUN, **changes: Any) -> None:
        await self.fed.publish(self.make_invitation(run, **changes), sender="server-manager")

    async def _enroll(self, request: Enroll) -> Body:
        if self.refusal:
            return Refused(reason=self.refusal)
        for agent in CLIENT_CONSUMERS:
            await self.fed.bus.create_client_consumer(agent, task=TASK, client=request.client)
        return Enrolled(consumers=())

    async def _info(self, _: GetServerInfo) -> Body:
        self.info_request_count += 1
        if self.model is None or self.offer is None:
            return Refused(reason="no model yet")
        return ServerInfo(
            code_version=self.code.code_version if self.code else "",
            model=self.model,
            blob=self.offer.ref,
            term=self.term,
            seal=self.seal,
            code=self.code,
        )

    async def _health(self, _: HealthCheck) -> Body:
        return HealthStatus(state=ServerState.WAITING, open_run=self.open_run)

    async def _open(self, _: OpenRun) -> Body:
        return RunOpened(recruit_until=datetime.now(UTC))

    async def _cancel(self, _: CancelRun) -> Body:
        return RunCancelled()


async def wait_for_infer_start(fed: FederationHarness, times: int = 1) -> ModelRef:
    return (await fed.wait_for_message(InferStart, times=times)).model


async def send_infer_ready(fed: FederationHarness, model: ModelRef, code_version: str = "") -> None:
    endpoint = "http://127.0.0.1:1"
    message = InferReady(
        task=TASK, client=CLIENT_NAME, model=model, endpoint=endpoint, code_version=code_version
    )
    await fed.publish(message, sender="inference")


async def send_infer_refused(
    fed: FederationHarness,
    model: ModelRef,
    *,
    serving: int | None,
    still: ModelRef | None = None,
    code_version: str = "",
) -> None:
    message = InferRefused(
        task=TASK,
        client=CLIENT_NAME,
        model=model,
        reason="NaN",
        serving=serving,
        still=still,
        code_version=code_version,
    )
    await fed.publish(message, sender="inference")


async def send_model_rolled_back(fed: FederationHarness, to: ModelRef, of: ModelRef) -> None:
    """The inference agent rolls back from the model *of* to the model *to*."""
    message = ModelRolledBack(
        task=TASK, client=CLIENT_NAME, model=to, returned_from=of, reason="it errs", beside=ModelComparison()
    )
    await fed.publish(message, sender="inference")
