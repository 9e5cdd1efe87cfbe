"""The inference agent: serves predictions without interruption and owns the inference lifecycle.

    empty –infer_start→ serving –infer_update→ updating –model_loaded / load_refused→ serving –model_returned→ serving
    empty –model_not_served→ empty, updating –model_not_served→ serving: no code of the task serves the new version

It serves over HTTP (`http_server`) and as a NATS micro service. After a restart it serves the previous
model before it connects to the bus, and it continues to serve while it is disconnected. `model_swap` replaces
models and `data_monitor` checks the captured data; this module connects both to the bus. The agent loads
one model at a time; of the models requested meanwhile, it keeps only the newest.
"""

import asyncio
import contextvars
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from opentelemetry import trace
from pydantic import TypeAdapter, ValidationError

from fedbus import __version__
from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import handle_each, run_until, wait_for_first
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.inference.data_monitor import DataMonitor
from fedbus.agents.inference.event_queue import EventQueue
from fedbus.agents.inference.http_server import InferenceServer
from fedbus.agents.inference.model_pair import ModelPair
from fedbus.agents.inference.model_swap import ModelSwap
from fedbus.agents.inference.offline_evaluation import OfflineEvaluation
from fedbus.agents.inference.plain_json import HttpError
from fedbus.bus.bus import Bus, Delivery
from fedbus.bus.errors import BusClosed, BusUnreachable, PublishRefused
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore, TransitionOutbox
from fedbus.bus.raw_service import RawHandler, RequestRejected
from fedbus.common.filesystem import atomic_write
from fedbus.common.retry import RetryBackoff
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
    not_served_text,
)
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import Message
from fedbus.contracts.task.task import Task
from fedbus.contracts.telemetry import get_tracer, mark_failed
from fedbus.learning.predictor import ModelNotServed, ModelRefused, ModelUnavailable, Predictor

SERVED_MODEL_FILE: Final = "serving.json"
"""File with the request for the served model, from which a restarted device continues without the bus."""
ROLLED_BACK_FILE: Final = "returned.json"
"""File with the models rolled back on this device, by digest, with their terms; each is refused until it is
promoted again, in a new term."""
MAX_ROLLED_BACK: Final = 50
MAX_REASON_CHARS: Final = 1000
LEAVE_BUS_S: Final = 5.0
"""On stop, the time limit for leaving the bus."""
SERVICE: Final = "fedbus-predict"
_TERMS: Final = TypeAdapter(dict[str, int])

log = structlog.get_logger("fedbus.inference")
tracer = get_tracer("fedbus.inference")
LoadPredictor = Callable[[InferStart], Predictor]
"""Builds the predictor of the requested model. Blocks. Raises ModelRefused, or one of its subclasses."""
ConnectBus = Callable[[], AbstractAsyncContextManager[Bus]]
"""Opens a connection to the bus. Raises BusUnreachable."""


@log_method_calls
class InferenceAgent:
    """The predictions of one client in one task.

    *load* builds the predictor of a model, *evaluation* evaluates it before it serves, *events* queues the
    messages to publish, and *data_monitor* checks the captured data.
    """

    def __init__(
        self,
        task: Task,
        client: ClientId,
        server: InferenceServer,
        *,
        load: LoadPredictor,
        evaluation: OfflineEvaluation,
        outbox: TransitionOutbox,
        directory: Path,
        events: EventQueue,
        data_monitor: DataMonitor | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._task = task
        self._client = client
        self._server = server
        self._load = load
        self._outbox = outbox
        self._events = events
        self._data_monitor = data_monitor
        self._served_model_file = directory / SERVED_MODEL_FILE
        self._rolled_back_file = directory / ROLLED_BACK_FILE
        self._host = host
        self._port = port
        self._swap = ModelSwap(
            server.engine, evaluation, task.table.serving, events.enqueue, task=task.id, client=client
        )
        self._served: InferStart | None = None
        """The request for the served model."""
        self._rollback: asyncio.Task[None] | None = None
        """Records that the device has rolled the model back. It ends before another model is served."""
        self._requested: asyncio.Queue[tuple[InferStart, contextvars.Context]] = asyncio.Queue()
        self._lifecycle: LifecycleHandle[InferenceState, InferenceEvent, InferenceData, InferenceChanges]
        self.endpoint = ""
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event, connect: ConnectBus) -> None:
        """Serve until *stop* is set, then answer the accepted requests."""
        try:
            self.endpoint = await self._server.start(self._host, self._port)
            await self._restore_served_model()
            await wait_for_first(self._run_on_bus(stop, connect), self._monitor_data())
        finally:
            await self._server.stop()

    async def _monitor_data(self) -> None:
        if self._data_monitor is not None:
            await self._data_monitor.run()
        await asyncio.Event().wait()

    async def _restore_served_model(self) -> None:
        """Serve the model from before the restart until the client manager requests another."""
        if not await asyncio.to_thread(self._served_model_file.exists):
            return
        try:
            text = await asyncio.to_thread(self._served_model_file.read_text)
            request = InferStart.model_validate_json(text)
            await self._swap.serve_first(request.model, lambda: self._load(request))
        except (ValidationError, ModelRefused) as error:
            log.warning("Cannot restore the model served before the restart", reason=str(error))
        else:
            self._served = request

    # --- on the bus ----------------------------------------------------------------------------------

    async def _run_on_bus(self, stop: asyncio.Event, connect: ConnectBus) -> None:
        """Connect to the bus and reconnect until *stop* is set; predictions continue meanwhile."""
        backoff = RetryBackoff()
        while not stop.is_set():
            try:
                async with connect() as bus:
                    backoff.reset()
                    await wait_for_first(
                        self._run_connected(bus, stop), bus.wait_closed(), _stop_within_limit(stop)
                    )
            except (BusUnreachable, BusClosed, PublishRefused) as error:
                log.warning("Bus unavailable; serving predictions without it", reason=str(error))
                await backoff.pause(stop)

    async def _run_connected(self, bus: Bus, stop: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            lifecycles = await stack.enter_async_context(LifecycleStore.open(bus, self._outbox))
            inbox = await stack.enter_async_context(bus.consume(AgentName.INFERENCE, task=self._task.id))
            await stack.enter_async_context(
                bus.serve_raw(SERVICE, self._endpoints(bus), task=self._task.id, version=__version__)
            )
            await self._resume(lifecycles)
            self.ready.set()
            await run_until(stop, self._process(bus, inbox))

    async def _process(self, bus: Bus, inbox: AsyncIterator[Delivery]) -> None:
        await wait_for_first(
            handle_each(inbox, self._on_message), self._swap_models(bus), self._events.drain_to(bus)
        )

    def _endpoints(self, bus: Bus) -> Mapping[str, tuple[str, RawHandler]]:
        async def predict(content: bytes) -> bytes:
            try:
                return await self._server.service.predict(content)
            except HttpError as error:
                raise RequestRejected(error.status, error.reason, error.body) from error

        return {"predict": (subjects.predictions(bus.fed, self._client, self._task.id), predict)}

    async def _resume(self, lifecycles: LifecycleStore) -> None:
        """Publish the current state: empty after a restart, then serving if a model is loaded."""
        self._lifecycle = await lifecycles.load(
            INFERENCE, InferenceData(task=self._task.id, client=self._client)
        )
        if not self._lifecycle.exists:
            await self._lifecycle.create()
        elif self._lifecycle.state is not InferenceState.EMPTY:
            await self._lifecycle.transition(InferenceEvent.RESTARTED, {"model": None, "endpoint": ""})
        not_served = self._server.engine.not_served = self._lifecycle.data.not_served
        if (model := self._server.current_model) is not None:
            changes: InferenceChanges = {"model": model, "endpoint": self.endpoint}
            await self._lifecycle.transition(InferenceEvent.INFER_START, changes)
        elif not_served and self._lifecycle.data.endpoint != self.endpoint:
            await self._lifecycle.transition(
                InferenceEvent.MODEL_NOT_SERVED, {"endpoint": self.endpoint}, reason=not_served
            )

    async def _on_message(self, message: Message) -> None:
        """Queue the newest requested model; `_swap_models` serves it in the trace of this request."""
        if isinstance(message, InferStart):  # or InferUpdate, its subclass
            while not self._requested.empty():
                self._requested.get_nowait()  # superseded by the newer request
            self._requested.put_nowait((message, contextvars.copy_context()))
        else:
            log.debug("Ignoring message", message=message.name)

    # --- swapping models, one at a time -------------------------------------------------------------

    async def _swap_models(self, bus: Bus) -> None:
        watch: _Watch | None = None
        try:
            while True:
                message, context = await self._requested.get()
                if self._differs_from_served(message):
                    await self._end_watch(watch)
                    watch = None
                pair = await asyncio.create_task(
                    self._serve(bus, message), name=f"serve v{message.model.version}", context=context
                )
                if pair is not None:
                    previous, self._served = self._served, message
                    task = asyncio.create_task(
                        self._watch_and_roll_back(pair, message, previous),
                        name="watch the new model",
                        context=context,
                    )
                    watch = _Watch(pair, task)
        finally:
            rollback, self._rollback = self._rollback, None
            await self._end_watch(watch)
            await _cancel(rollback)  # `_resume` publishes the served model when the bus is back

    async def _end_watch(self, watch: "_Watch | None") -> None:
        """End a watch without a verdict, also if its task has not begun."""
        if watch is not None:
            try:
                await _cancel(watch.task)
            finally:
                self._server.engine.end_comparison(watch.pair)

    def _differs_from_served(self, message: InferStart) -> bool:
        """Return whether *message* requests another model or another code version than the served one."""
        if self._server.current_model != message.model or self._served is None:
            return True
        return message.code_version not in ("", self._served.code_version)

    async def _serve(self, bus: Bus, message: InferStart) -> ModelPair | None:
        """Serve the model of *message* and publish the result; return the pair to watch, if there is one."""
        if not self._differs_from_served(message):
            await self._publish_ready(bus, message)
            return None
        rollback, self._rollback = self._rollback, None
        if rollback is not None:
            await rollback
        attributes: dict[str, str | int] = {
            "fedbus.client": self._client,
            "fedbus.model.version": message.model.version,
        }
        with tracer.start_as_current_span(
            "swap model", attributes=attributes, links=tracing.links_to(message.published_in)
        ):
            if self._lifecycle.state is InferenceState.EMPTY:
                await self._start_serving(bus, message)
                return None
            return await self._update(bus, message)

    async def _start_serving(self, bus: Bus, message: InferStart) -> None:
        """Serve the first model. A device that serves none takes a model that cannot be served, and trains."""
        try:
            await self._check_not_rolled_back(message)
        except ModelRefused as error:
            await self._publish_refused(bus, message, str(error))
            return
        try:
            await self._swap.serve_first(message.model, lambda: self._load(message))
        except ModelUnavailable as error:
            await self._publish_refused(bus, message, str(error))
        except ModelRefused as error:
            await self._publish_not_served(bus, message, str(error))
        else:
            self._served = message
            await self._lifecycle.transition(
                InferenceEvent.INFER_START,
                {"model": message.model, "not_served": "", "endpoint": self.endpoint},
            )
            await self._save_served_model(message)
            await self._publish_ready(bus, message)

    async def _update(self, bus: Bus, message: InferStart) -> ModelPair | None:
        await self._lifecycle.transition(InferenceEvent.INFER_UPDATE)
        pair: ModelPair | None = None
        try:
            if self._has_served_weights(message):
                self._swap.relabel(message.model)
                self._served = message
            else:
                await self._check_not_rolled_back(message)
                pair = await self._swap.replace(message.model, lambda: self._load(message))
        except ModelNotServed as error:
            await self._publish_not_served(bus, message, str(error))
            return None
        except ModelRefused as error:
            await self._lifecycle.transition(InferenceEvent.LOAD_REFUSED, reason=str(error))
            await self._publish_refused(bus, message, str(error))
            return None
        await self._lifecycle.transition(
            InferenceEvent.MODEL_LOADED, {"model": message.model, "not_served": ""}
        )
        await self._save_served_model(message)
        await self._publish_ready(bus, message)
        return pair

    def _has_served_weights(self, message: InferStart) -> bool:
        """Return whether *message* requests the served weights and code as another version."""
        served = self._served
        return (
            served is not None
            and served.model == self._server.current_model
            and served.model.sha256 == message.model.sha256
            and message.code_version in ("", served.code_version)
        )

    async def _publish_not_served(self, bus: Bus, message: InferStart, reason: str) -> None:
        """Record that the version of *message* is not served; an older one serves on."""
        text = not_served_text(message.model, reason)[:MAX_REASON_CHARS]
        self._server.engine.not_served = text
        await self._lifecycle.transition(
            InferenceEvent.MODEL_NOT_SERVED, {"not_served": text, "endpoint": self.endpoint}, reason=text
        )
        await self._publish_refused(bus, message, reason, not_served=True)

    async def _watch_and_roll_back(
        self, pair: ModelPair, current: InferStart, previous: InferStart | None
    ) -> None:
        """Watch the new model and roll back to the previous one if the new one fails the watch.

        A request for another model cancels the watch, but not the record of a roll-back that has happened.
        """
        if await self._swap.watch(pair) or previous is None:
            return
        self._served = previous
        self._rollback = asyncio.create_task(
            self._record_rollback(pair, current, previous), name="record the roll-back"
        )
        await asyncio.shield(self._rollback)

    async def _record_rollback(self, pair: ModelPair, current: InferStart, previous: InferStart) -> None:
        """Record the roll-back from *pair.new* in the files, which need no bus, and in the lifecycle."""
        await asyncio.to_thread(_add_rollback, self._rolled_back_file, current)
        await self._save_served_model(previous)
        await self._lifecycle.transition(
            InferenceEvent.MODEL_RETURNED,
            {"model": pair.old.ref, "not_served": ""},
            reason=f"rolled back from version {pair.new.ref.version}",
        )

    async def _check_not_rolled_back(self, message: InferStart) -> None:
        """Refuse a model that this device rolled back, unless a user promoted it again, which is a new term.

        Raises:
            ModelRefused: the device rolled the model back in this term or a later one.

        """
        rollbacks = await asyncio.to_thread(_read_rollbacks, self._rolled_back_file)
        if message.term <= rollbacks.get(message.model.sha256, -1):
            raise ModelRefused(
                "this device rolled the model back because of errors or drift. "
                f"To try it again, run: fedbus model promote {message.model.version}"
            )

    async def _save_served_model(self, message: InferStart) -> None:
        await asyncio.to_thread(atomic_write, self._served_model_file, message.model_dump_json())

    async def _publish_ready(self, bus: Bus, message: InferStart) -> None:
        await bus.publish(
            InferReady(
                task=self._task.id,
                client=self._client,
                model=message.model,
                endpoint=self.endpoint,
                code_version=message.code_version,
            )
        )

    async def _publish_refused(
        self, bus: Bus, message: InferStart, reason: str, *, not_served: bool = False
    ) -> None:
        if not not_served:
            mark_failed(trace.get_current_span(), ModelRefused.__name__, reason)
        serving = self._server.current_model
        await bus.publish(
            InferRefused(
                task=self._task.id,
                client=self._client,
                model=message.model,
                reason=reason[:500],
                serving=serving.version if serving else None,
                still=serving,
                code_version=message.code_version,
                not_served=not_served,
            )
        )


async def _stop_within_limit(stop: asyncio.Event) -> None:
    """Return LEAVE_BUS_S after *stop* is set, so that a disconnected bus cannot delay the stop."""
    await stop.wait()
    await asyncio.sleep(LEAVE_BUS_S)


@dataclass(frozen=True)
class _Watch:
    """A pair of models and the task that watches the new one."""

    pair: ModelPair
    task: asyncio.Task[None]


async def _cancel(task: asyncio.Task[None] | None) -> None:
    """Cancel *task* and raise its exception, if it failed."""
    if task is None:
        return
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _add_rollback(path: Path, request: InferStart) -> None:
    """Add the model of *request* to the rollbacks in *path*, as the newest one."""
    sha256 = request.model.sha256
    others = [(digest, term) for digest, term in _read_rollbacks(path).items() if digest != sha256]
    newest = [*others, (sha256, request.term)][-MAX_ROLLED_BACK:]
    atomic_write(path, json.dumps(dict(newest)))


def _read_rollbacks(path: Path) -> dict[str, int]:
    """Return the digests in *path* with the terms of their models; empty if the file cannot be read."""
    try:
        return _TERMS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}
