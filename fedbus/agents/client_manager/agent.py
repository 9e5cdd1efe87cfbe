"""The client manager agent: performs what `ClientMachine` decides for one client in one task.

Every message, timer and result is an event. One event at a time is handled: its effects are performed before the
next one is decided on; a message is acknowledged after it was handled. Jobs run in tasks of their own, so that
messages are handled while a model is fetched or code is checked.

The lifecycle of a client has one possible owner, so its state also changes while the device is disconnected. The
agent runs no code of the task and holds no weights: models are files, the inference agent serves them, the Flower
client trains. It alone decides when the device changes to other code.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, assert_never

import structlog

from fedbus.agents.client_manager.code import VERSION_FILE, Check, CodeNotReady, DeviceCode
from fedbus.agents.client_manager.effects import (
    Effect,
    EnrollClient,
    Fail,
    FetchModel,
    HandOverModel,
    Job,
    JoinTrace,
    MoveClient,
    OpenInbox,
    PrepareCode,
    Query,
    ReadDeviceFacts,
    ReadOpenRun,
    ReadServerInfo,
    ReleaseSlot,
    SwitchCode,
    TakeSlot,
)
from fedbus.agents.client_manager.eligibility import ReadFacts, read_device_facts
from fedbus.agents.client_manager.events import (
    ClientManagerStarted,
    ClientTimer,
    CodeNotPrepared,
    CodePrepared,
    DeviceFactsRead,
    EnrollmentAnswered,
    Event,
    ModelAnnounced,
    ModelAnnouncement,
    ModelFetched,
    ModelNotFetched,
    OpenRunRead,
    ServerInfoRead,
    SlotsBusy,
    SlotTaken,
)
from fedbus.agents.client_manager.machine import BOOTSTRAP_S, ClientMachine
from fedbus.agents.client_manager.models import DeviceModels, ModelFiles
from fedbus.agents.client_manager.records import ClientRecord
from fedbus.agents.client_manager.training_slots import TrainingSlot, TrainingSlots
from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import (
    Timers,
    handle_each,
    request_until_answered,
    run_until,
)
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.common.effect_runner import EffectRunner
from fedbus.agents.common.machine import (
    CancelTimer,
    FinishStartup,
    Log,
    Publish,
    RetryLater,
    StartTimer,
)
from fedbus.bus.blobs import BlobCorrupt, BlobUnavailable
from fedbus.bus.bus import Bus, Delivery
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore, TransitionOutbox
from fedbus.common import clock
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import (
    CLIENT,
    ClientChanges,
    ClientData,
    ClientEvent,
    ClientState,
    InferStart,
    InferUpdate,
)
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.server import Enroll, GetServerInfo, HealthCheck, ModelPublished
from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRepository, DirectoryCodeRepository
from fedbus.stores.errors import StoreError
from fedbus.stores.models.signing import TrustedKeys

log = structlog.get_logger("fedbus.client_manager")


class BootstrapFailed(Exception):
    """The client could not start: no server, no model, or a refusal. The supervisor restarts it."""


@log_method_calls
class ClientManager:
    """One client in one task.

    Args:
        bus: The bus, as the client manager of *client*.
        task: The task, at the version that the device starts with.
        client: The id of the client.
        directory: The directory of this task on the device.
        outbox: Keeps the transitions that NATS has not stored yet.
        code: The repository of the task's code; None: the directory of *task*, which does not change.
        check: Runs new code once; raises CheckFailed.
        labels: The labels of the device, by which a rollout chooses it.
        trusted: The keys of which one must have signed a model; None: models need no signature.
        slots: How many tasks may train at the same time on this device; None: no limit.
        models: The model files of the device; None: those in *directory*.
        read_facts: Reads the values of an eligibility rule's variables.
        bootstrap_s: The limit of the enrollment, and again of the search for the first model.

    """

    _lifecycle: LifecycleHandle[ClientState, ClientEvent, ClientData, ClientChanges]
    _runner: EffectRunner[Event, Job, ClientTimer]
    _machine: ClientMachine

    def __init__(
        self,
        bus: Bus,
        task: Task,
        client: ClientId,
        *,
        directory: Path,
        outbox: TransitionOutbox,
        code: CodeRepository | None = None,
        check: Check | None = None,
        labels: Mapping[str, str] | None = None,
        trusted: TrustedKeys | None = None,
        slots: TrainingSlots | None = None,
        models: ModelFiles | None = None,
        read_facts: ReadFacts = read_device_facts,
        bootstrap_s: float = BOOTSTRAP_S,
    ) -> None:
        self._bus = bus
        self._task = task
        self._client = client
        self._directory = directory
        self._outbox = outbox
        self._code = DeviceCode(
            code or DirectoryCodeRepository(Path(task.path), open_library),
            task,
            check=check,
            version_file=directory / VERSION_FILE,
        )
        self._labels = dict(labels or {})
        self._models = models or DeviceModels(bus, task.id, directory, trusted)
        self._read_facts = read_facts
        self._slots = slots
        self._slot: TrainingSlot | None = None
        self._bootstrap_s = bootstrap_s
        self._decisions = asyncio.Lock()
        """Held while one event is handled."""
        self._inbox_open = asyncio.Event()
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Manage the client until *stop* is set.

        Raises:
            BootstrapFailed: The client could not start.

        """
        async with (
            LifecycleStore.open(self._bus, self._outbox) as lifecycles,
            Timers.open() as timers,
        ):
            self._runner = EffectRunner(
                self._bus, timers, log, decide=self._decide, result_of=self._result_of
            )
            try:
                await run_until(stop, self._live(lifecycles))
            finally:
                self._release_slot()

    async def _live(self, lifecycles: LifecycleStore) -> None:
        data = ClientData(
            task=self._task.id,
            client=self._client,
            code_version=self._task.code_version,
            labels=self._labels,
        )
        self._lifecycle = await lifecycles.load(CLIENT, data)
        if not self._lifecycle.exists:
            await self._lifecycle.create()
        record = ClientRecord(
            self._lifecycle.state, self._lifecycle.data, self._lifecycle.event or CLIENT.creation
        )
        self._machine = ClientMachine(self._task, record, self._labels, bootstrap_s=self._bootstrap_s)
        await self._decide(ClientManagerStarted())
        await self._inbox_open.wait()
        async with self._bus.consume(AgentName.CLIENT_MANAGER, task=self._task.id) as inbox:
            await self._consume(inbox)

    async def _consume(self, inbox: AsyncIterator[Delivery]) -> None:
        await self.ready.wait()
        await handle_each(inbox, self._on_message)

    # --- events -------------------------------------------------------------------------------------

    async def _on_message(self, message: Any) -> None:
        await self._decide(_announcement_event(message) if isinstance(message, ModelPublished) else message)

    async def _decide(self, event: Event) -> None:
        """Let the machine handle *event*, and perform the effects."""
        async with self._decisions:
            with ExitStack() as traces:
                events = [event]
                while events:
                    for effect in self._machine.handle(events.pop(0), clock.now()):
                        if isinstance(effect, JoinTrace):
                            traces.enter_context(tracing.use_trace(effect.traceparent))
                        elif (result := await self._perform(effect)) is not None:
                            events.append(result)

    # --- effects ------------------------------------------------------------------------------------

    async def _perform(self, effect: Effect) -> Event | None:
        """Perform *effect*; the result of a query."""
        match effect:
            case MoveClient(event=event, changes=changes, reason=reason, deadline=deadline):
                await self._lifecycle.transition(event, changes, reason=reason, deadline=deadline)
            case Publish() | StartTimer() | RetryLater() | CancelTimer() | Log():
                await self._runner.perform(effect)
            case HandOverModel():
                await self._bus.publish(self._infer_message(effect))
            case SwitchCode(task=task):
                await self._code.switch_to(task)
            case ReleaseSlot():
                self._release_slot()
            case OpenInbox():
                self._inbox_open.set()
            case FinishStartup():
                self.ready.set()
            case Fail(reason=reason):
                raise BootstrapFailed(reason)
            case JoinTrace():
                pass  # `_decide` has joined it
            case ReadDeviceFacts() | TakeSlot():
                return await self._query(effect)
            case _:
                self._runner.start_job(effect)
        return None

    def _infer_message(self, effect: HandOverModel) -> InferStart:
        kind = InferStart if effect.is_first else InferUpdate
        return kind(
            task=self._task.id,
            client=self._client,
            model=effect.model,
            path=str(self._models.path_of(effect.model)),
            code_version=effect.code_version,
            published_in=effect.published_in,
            term=effect.term,
        )

    async def _query(self, query: Query) -> Event:
        match query:
            case ReadDeviceFacts(names=names, model=model, holdout_share=holdout_share):
                model_file = None if model is None else self._models.path_of(model)
                facts = await asyncio.to_thread(
                    self._read_facts, names, self._directory, model_file, holdout_share=holdout_share
                )
                return DeviceFactsRead(facts)
            case TakeSlot(run=run):
                return self._take_slot(run)
            case _:
                assert_never(query)

    def _take_slot(self, run: str) -> Event:
        """Take a slot, which the client holds until the run has ended."""
        if self._slots is None or self._slot is not None:
            return SlotTaken()
        # Not in a thread: a cancellation would lose the slot that the thread takes, and this does not wait.
        self._slot = self._slots.acquire(run)
        if self._slot is not None:
            return SlotTaken()
        return SlotsBusy(tuple(self._slots.list_holders()), self._slots.count)

    def _release_slot(self) -> None:
        if self._slot is not None:
            self._slot.release()
            self._slot = None

    # --- jobs ---------------------------------------------------------------------------------------

    async def _result_of(self, job: Job) -> Event:
        match job:
            case EnrollClient():
                return await self._enroll()
            case ReadServerInfo(until_answered=until_answered):
                return await self._read_server_info(until_answered=until_answered)
            case ReadOpenRun():
                return await self._read_open_run()
            case FetchModel(announcement=announcement, attempts=attempts):
                return await self._fetch(announcement, attempts)
            case PrepareCode(version=version, limit_s=limit_s):
                return await self._prepare(version, limit_s)
            case _:
                assert_never(job)

    async def _enroll(self) -> Event:
        request = Enroll(task=self._task.id, client=self._client, labels=self._labels)
        try:
            await request_until_answered(self._bus, request)
        except RequestRefused as error:
            return EnrollmentAnswered(str(error))
        return EnrollmentAnswered()

    async def _read_server_info(self, *, until_answered: bool) -> Event:
        request = GetServerInfo(task=self._task.id)
        try:
            if until_answered:
                return ServerInfoRead(await request_until_answered(self._bus, request))
            return ServerInfoRead(await self._bus.request(request))
        except (NoResponse, RequestRefused) as error:
            return ServerInfoRead(None, str(error))

    async def _read_open_run(self) -> Event:
        try:
            status = await self._bus.request(HealthCheck(task=self._task.id))
        except (NoResponse, RequestRefused):
            return OpenRunRead(None)
        return OpenRunRead(status.open_run)

    async def _fetch(self, announcement: ModelAnnouncement, attempts: int) -> Event:
        model = announcement.model
        try:
            self._models.check_signature(announcement)
            await self._models.fetch(model, announcement.blob, attempts=attempts)
        except (BlobUnavailable, BlobCorrupt, RequestRefused, NoResponse, StoreError) as error:
            return ModelNotFetched(model, str(error))
        return ModelFetched(model)

    async def _prepare(self, version: str, limit_s: float) -> Event:
        try:
            async with asyncio.timeout(limit_s):
                return CodePrepared(await self._code.prepare(version))
        except (CodeNotReady, TimeoutError) as error:
            limit = f"the code was not ready in time (limit {limit_s:g} s)"
            return CodeNotPrepared(version, str(error) or limit)


def _announcement_event(message: ModelPublished) -> ModelAnnounced:
    traceparent = tracing.current_traceparent()
    return ModelAnnounced(
        ModelAnnouncement(message.model, message.blob, message.term, message.seal, traceparent)
    )
