"""The inference agent: serves predictions over HTTP always, and owns the inference lifecycle.

    empty –infer_start→ serving –infer_update→ updating –model_loaded / load_refused→ serving

A new model is loaded and tried beside the old one, which goes on answering; only then they
change places. A model that does not load or does not answer is refused and the old one stays.
What HTTP says stands in `inference_server`; here it meets the bus.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from pydantic import ValidationError

from fedbus.agents.inference_server import InferenceServer
from fedbus.agents.tasks import handle_each, until
from fedbus.bus.bus import Bus
from fedbus.bus.lives import Life, Lives, Outbox
from fedbus.contracts.client import (
    INFERENCE,
    InferenceFacts,
    InferenceState,
    InferReady,
    InferRefused,
    InferStart,
)
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.task import Task
from fedbus.learning.predictor import ModelRefused, Predictor

KEPT: Final = "serving.json"
"""The model that was served last, so that a restarted device answers before it has found its server."""

log = structlog.get_logger("fedbus.inference")
Load = Callable[[Path], Predictor]
"""Builds the model in a file; blocking. Raises ModelRefused with the reason."""


class Inference:
    """One client's predictions in one task. *load* makes a predictor of a file that must answer *probe*."""

    def __init__(
        self,
        bus: Bus,
        task: Task,
        client: ClientId,
        server: InferenceServer,
        *,
        load: Load,
        probe: np.ndarray[Any, Any] | None,
        outbox: Outbox,
        directory: Path,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._bus = bus
        self._task = task
        self._client = client
        self._server = server
        self._load = load
        self._probe = probe
        self._outbox = outbox
        self._kept = directory / KEPT
        self._host = host
        self._port = port
        self._life: Life[InferenceState, InferenceFacts]
        self.endpoint = ""
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until *stop* is set; what was accepted by then is answered."""
        self.endpoint = await self._server.start(self._host, self._port)
        try:
            async with (
                Lives.open(self._bus, self._outbox) as lives,
                self._bus.listen("inference", task=self._task.id) as inbox,
            ):
                await self._wake(lives)
                self.ready.set()
                await until(stop, handle_each(inbox, self._hear))
        finally:
            await self._server.stop()

    async def _wake(self, lives: Lives) -> None:
        self._life = await lives.of(INFERENCE, InferenceFacts(task=self._task.id, client=self._client))
        if not self._life.born:
            await self._life.bear("started")
        elif self._life.state is not InferenceState.EMPTY:
            await self._life.move("restarted", model=None, endpoint="")
        await self._serve_the_last()

    async def _serve_the_last(self) -> None:
        """Answer with what was served before the restart, until the client manager says better."""
        if not await asyncio.to_thread(self._kept.exists):
            return
        try:
            kept = InferStart.model_validate_json(await asyncio.to_thread(self._kept.read_text))
            await self._load_model(kept.model, Path(kept.path))
        except (ValidationError, ModelRefused) as error:
            log.warning("the model of before the restart is not served", reason=str(error))
        else:
            await self._life.move("infer_start", model=kept.model, endpoint=self.endpoint)

    async def _hear(self, message: Message) -> None:
        match message:
            case InferStart() if self._life.state is InferenceState.EMPTY:  # InferUpdate is one too
                await self._begin(message)
            case InferStart() if self._server.current == message.model:
                await self._say_ready(message.model)
            case InferStart():
                await self._update(message)
            case _:
                log.debug("nothing to do", word=message.word)

    async def _begin(self, message: InferStart) -> None:
        try:
            await self._load_model(message.model, Path(message.path))
        except ModelRefused as error:
            await self._say_refused(message.model, str(error))
        else:
            await self._life.move("infer_start", model=message.model, endpoint=self.endpoint)
            await self._keep(message)
            await self._say_ready(message.model)

    async def _update(self, message: InferStart) -> None:
        await self._life.move("infer_update")
        try:
            await self._load_model(message.model, Path(message.path))
        except ModelRefused as error:
            await self._life.move("load_refused", reason=str(error))
            await self._say_refused(message.model, str(error))
        else:
            await self._life.move("model_loaded", model=message.model)
            await self._keep(message)
            await self._say_ready(message.model)

    async def _load_model(self, model: ModelRef, path: Path) -> None:
        await self._server.load(model, lambda: self._load(path), self._probe)

    async def _keep(self, message: InferStart) -> None:
        await asyncio.to_thread(_replace, self._kept, message.model_dump_json())

    async def _say_ready(self, model: ModelRef) -> None:
        await self._bus.publish(
            InferReady(task=self._task.id, client=self._client, model=model, endpoint=self.endpoint)
        )

    async def _say_refused(self, model: ModelRef, reason: str) -> None:
        serving = self._server.current
        await self._bus.publish(
            InferRefused(
                task=self._task.id,
                client=self._client,
                model=model,
                reason=reason[:500],
                serving=serving.version if serving else None,
            )
        )


def _replace(path: Path, text: str) -> None:
    """Write *text* to *path*, which never holds a part of it."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
