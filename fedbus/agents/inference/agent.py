"""The inference agent: serves predictions always, and owns the inference lifecycle.

    empty –infer_start→ serving –infer_update→ updating –model_loaded / load_refused→ serving –model_returned→ serving

It answers before it has found the bus, with the model that it served last, and it goes on when the bus
is away: by HTTP (`inference_server`), and on the bus as a micro service. How a new model takes
the old one's place stands in `inference_phases`, how the device's data are looked at in `inference_watch`; here both
meet the bus. Models are taken up one at a time; of those that come meanwhile only the newest waits.
"""

import asyncio
import contextvars
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Final

import structlog
from opentelemetry import trace
from pydantic import TypeAdapter, ValidationError

from fedbus import __version__
from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import backoff_s, handle_each, run_until, wait_for_first
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.inference.data_monitor import DataMonitor
from fedbus.agents.inference.engine import ModelPair
from fedbus.agents.inference.event_queue import EventQueue
from fedbus.agents.inference.http_server import InferenceServer
from fedbus.agents.inference.model_swap import ModelSwap
from fedbus.agents.inference.offline_evaluation import OfflineEvaluation
from fedbus.agents.inference.plain_json import HttpError
from fedbus.bus.bus import Bus
from fedbus.bus.errors import BusClosed, BusUnreachable, PublishRefused
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore, TransitionOutbox
from fedbus.bus.raw_service import RawHandler, RequestRejected
from fedbus.contracts import subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import (
    INFERENCE,
    InferenceChanges,
    InferenceData,
    InferenceEvent,
    InferenceState,
    InferReady,
    InferRefused,
    InferStart,
)
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import Message
from fedbus.contracts.task.task import Task
from fedbus.contracts.telemetry import get_tracer, mark_failed
from fedbus.learning.predictor import ModelRefused, Predictor

SERVED_MODEL_FILE: Final = "serving.json"
"""The model that was served last, so that a restarted device answers before it has found its server."""
ROLLED_BACK_FILE: Final = "returned.json"
"""The models that were returned from, each with its term: none is taken up again until it is named anew."""
MAX_ROLLED_BACK: Final = 50
LEAVE_BUS_S: Final = 5.0
"""When asked to stop: how long the bus may take, where it is away."""
SERVICE: Final = "fedbus-predict"
_TERMS: Final = TypeAdapter(dict[str, int])

log = structlog.get_logger("fedbus.inference")
tracer = get_tracer("fedbus.inference")
LoadPredictor = Callable[[InferStart], Predictor]
"""Builds the model that is asked for; blocking. Raises ModelRefused with the reason."""
ConnectBus = Callable[[], AbstractAsyncContextManager[Bus]]
"""The way to the bus; raises BusUnreachable."""


@log_method_calls
class InferenceAgent:
    """One client's predictions in one task. *load* makes a predictor of a file, *trials* try and judge it.

    What is to be told goes into *sayings*; *watch* looks at the data.
    """

    def __init__(
        self,
        task: Task,
        client: ClientId,
        server: InferenceServer,
        *,
        load: LoadPredictor,
        trials: OfflineEvaluation,
        outbox: TransitionOutbox,
        directory: Path,
        sayings: EventQueue,
        watch: DataMonitor | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._task = task
        self._client = client
        self._server = server
        self._load = load
        self._outbox = outbox
        self._sayings = sayings
        self._watch = watch
        self._kept = directory / SERVED_MODEL_FILE
        self._returned = directory / ROLLED_BACK_FILE
        self._host = host
        self._port = port
        self._phases = ModelSwap(
            server.engine, trials, task.table.serving, sayings.say, task=task.id, client=client
        )
        self._served: InferStart | None = None
        """What serves, as it was asked for."""
        self._next: asyncio.Queue[tuple[InferStart, contextvars.Context]] = asyncio.Queue()
        self._life: LifecycleHandle[InferenceState, InferenceEvent, InferenceData, InferenceChanges]
        self.endpoint = ""
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event, join: ConnectBus) -> None:
        """Serve until *stop* is set; what was accepted by then is answered."""
        try:
            self.endpoint = await self._server.start(self._host, self._port)
            await self._serve_the_last()
            await wait_for_first(self._on_the_bus(stop, join), self._look_at_data())
        finally:
            await self._server.stop()

    async def _look_at_data(self) -> None:
        if self._watch is not None:
            await self._watch.run()
        await asyncio.Event().wait()

    async def _serve_the_last(self) -> None:
        """Answer with what was served before the restart, until the client manager says better."""
        if not await asyncio.to_thread(self._kept.exists):
            return
        try:
            kept = InferStart.model_validate_json(await asyncio.to_thread(self._kept.read_text))
            await self._phases.first(kept.model, lambda: self._load(kept))
        except (ValidationError, ModelRefused) as error:
            log.warning("the model of before the restart is not served", reason=str(error))
        else:
            self._served = kept

    # --- on the bus ----------------------------------------------------------------------------------

    async def _on_the_bus(self, stop: asyncio.Event, join: ConnectBus) -> None:
        """Be there whenever the bus is; predictions go on without."""
        attempt = 0
        while not stop.is_set():
            try:
                async with join() as bus:
                    attempt = 0
                    await wait_for_first(self._work(bus, stop), bus.lost(), _stop_within_limit(stop))
            except (BusUnreachable, BusClosed, PublishRefused) as error:
                log.warning("predictions are served without the bus", reason=str(error))
                await wait_for_first(stop.wait(), asyncio.sleep(backoff_s(attempt)))
                attempt += 1

    async def _work(self, bus: Bus, stop: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            lives = await stack.enter_async_context(LifecycleStore.open(bus, self._outbox))
            inbox = await stack.enter_async_context(bus.listen(AgentName.INFERENCE, task=self._task.id))
            await stack.enter_async_context(
                bus.offer(SERVICE, self._endpoints(bus), task=self._task.id, version=__version__)
            )
            await self._wake(lives)
            self.ready.set()
            await run_until(stop, self._be_there(bus, inbox))

    async def _be_there(self, bus: Bus, inbox: AsyncIterator[Any]) -> None:
        await wait_for_first(handle_each(inbox, self._hear), self._take_up(bus), self._sayings.tell(bus))

    def _endpoints(self, bus: Bus) -> Mapping[str, tuple[str, RawHandler]]:
        async def predict(question: bytes) -> bytes:
            try:
                return await self._server.service.predict(question)
            except HttpError as refusal:
                raise RequestRejected(refusal.status, refusal.reason, refusal.body) from refusal

        return {"predict": (subjects.predictions(bus.fed, self._client, self._task.id), predict)}

    async def _wake(self, lives: LifecycleStore) -> None:
        """Tell how it stands: what serves already goes on."""
        self._life = await lives.of(INFERENCE, InferenceData(task=self._task.id, client=self._client))
        if not self._life.born:
            await self._life.create()
        elif self._life.state is not InferenceState.EMPTY:
            await self._life.transition(InferenceEvent.RESTARTED, {"model": None, "endpoint": ""})
        if (model := self._server.current) is not None:
            await self._life.transition(
                InferenceEvent.INFER_START, {"model": model, "endpoint": self.endpoint}
            )

    async def _hear(self, message: Message) -> None:
        """Remember the newest model that is to be served; it is taken up beside, in the trace of whoever asked."""
        if isinstance(message, InferStart):  # InferUpdate is one too
            while not self._next.empty():
                self._next.get_nowait()  # an earlier request is superseded
            self._next.put_nowait((message, contextvars.copy_context()))
        else:
            log.debug("nothing to do", word=message.word)

    # --- taking up models, one at a time ------------------------------------------------------------

    async def _take_up(self, bus: Bus) -> None:
        watching: asyncio.Task[None] | None = None
        try:
            while True:
                message, context = await self._next.get()
                if self._is_news(message):
                    await _wait_for_end(watching)
                    watching = None
                pair = await asyncio.create_task(
                    self._serve(bus, message), name=f"serve v{message.model.version}", context=context
                )
                if pair is not None:
                    before, self._served = self._served, message
                    watching = asyncio.create_task(
                        self._stand_behind(pair, message, before), name="watch the new model", context=context
                    )
        finally:
            await _wait_for_end(watching)

    def _is_news(self, message: InferStart) -> bool:
        """Whether it is another model than serves now, or the same one by other code."""
        if self._server.current != message.model or self._served is None:
            return True
        return message.code_version not in ("", self._served.code_version)

    async def _serve(self, bus: Bus, message: InferStart) -> ModelPair | None:
        """Have the model of *message* served, and say what came of it; the pair to watch, where there is one."""
        if not self._is_news(message):
            await self._say_ready(bus, message)
            return None
        about: dict[str, str | int] = {
            "fedbus.client": self._client,
            "fedbus.model.version": message.model.version,
        }
        with tracer.start_as_current_span(
            "swap model", attributes=about, links=tracing.links_to(message.published_in)
        ):
            if self._life.state is InferenceState.EMPTY:
                await self._begin(bus, message)
                return None
            return await self._update(bus, message)

    async def _begin(self, bus: Bus, message: InferStart) -> None:
        try:
            await self._check_not_returned(message)
            await self._phases.first(message.model, lambda: self._load(message))
        except ModelRefused as error:
            await self._say_refused(bus, message, str(error))
        else:
            self._served = message
            await self._life.transition(
                InferenceEvent.INFER_START, {"model": message.model, "endpoint": self.endpoint}
            )
            await self._keep(message)
            await self._say_ready(bus, message)

    async def _update(self, bus: Bus, message: InferStart) -> ModelPair | None:
        await self._life.transition(InferenceEvent.INFER_UPDATE)
        try:
            await self._check_not_returned(message)
            pair = await self._phases.update(message.model, lambda: self._load(message))
        except ModelRefused as error:
            await self._life.transition(InferenceEvent.LOAD_REFUSED, reason=str(error))
            await self._say_refused(bus, message, str(error))
            return None
        await self._life.transition(InferenceEvent.MODEL_LOADED, {"model": message.model})
        await self._keep(message)
        await self._say_ready(bus, message)
        return pair

    async def _stand_behind(self, pair: ModelPair, taken: InferStart, before: InferStart | None) -> None:
        """Go back to the old model where the new one, which was *taken* up, does not do."""
        if await self._phases.watched(pair) or before is None:
            return
        self._served = before
        await asyncio.to_thread(_record_rollback, self._returned, taken)
        await self._life.transition(
            InferenceEvent.MODEL_RETURNED,
            {"model": pair.old.ref},
            reason=f"returned from version {pair.new.ref.version}",
        )
        await self._keep(before)

    async def _check_not_returned(self, message: InferStart) -> None:
        """A person who promotes it once more, which is a new term, wants it to be tried again."""
        returned = await asyncio.to_thread(_read_rollbacks, self._returned)
        if message.term <= returned.get(message.model.sha256, -1):
            raise ModelRefused(
                "this model was returned from on this device: it erred, or drifted. "
                f"To have it tried again: fedbus model promote {message.model.version}"
            )

    async def _keep(self, message: InferStart) -> None:
        await asyncio.to_thread(_write_atomically, self._kept, message.model_dump_json())

    async def _say_ready(self, bus: Bus, message: InferStart) -> None:
        await bus.publish(
            InferReady(
                task=self._task.id,
                client=self._client,
                model=message.model,
                endpoint=self.endpoint,
                code_version=message.code_version,
            )
        )

    async def _say_refused(self, bus: Bus, message: InferStart, reason: str) -> None:
        mark_failed(trace.get_current_span(), ModelRefused.__name__, reason)
        serving = self._server.current
        await bus.publish(
            InferRefused(
                task=self._task.id,
                client=self._client,
                model=message.model,
                reason=reason[:500],
                serving=serving.version if serving else None,
                still=serving,
                code_version=message.code_version,
            )
        )


async def _stop_within_limit(stop: asyncio.Event) -> None:
    """Asked to stop, one leaves the bus properly; unless it is away."""
    await stop.wait()
    await asyncio.sleep(LEAVE_BUS_S)


async def _wait_for_end(task: asyncio.Task[None] | None) -> None:
    """*task* is over, and whatever it broke of is raised here."""
    if task is None:
        return
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _record_rollback(path: Path, left: InferStart) -> None:
    """Note that the model of *left* was returned from, as the newest of those in *path*."""
    known = [(sha256, term) for sha256, term in _read_rollbacks(path).items() if sha256 != left.model.sha256]
    newest = [*known, (left.model.sha256, left.term)][-MAX_ROLLED_BACK:]
    _write_atomically(path, json.dumps(dict(newest)))


def _read_rollbacks(path: Path) -> dict[str, int]:
    """The digests in *path*, and the terms of their models; nothing where it cannot be read."""
    try:
        return _TERMS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


def _write_atomically(path: Path, text: str) -> None:
    """Write *text* to *path*, which never holds a part of it."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
