"""The server manager agent: performs what `ServerMachine` decides for one task.

Every message, request, timer and result is an event. One event at a time is handled: its effects are performed
before the next one is decided on. An event that the machine does not accept yet waits in its own task, and so in
its own trace; a message is acknowledged after it was handled. Jobs run in tasks of their own, and their results are
events.

The agent runs no code of the task, which the flower-server agent does, and holds no weights, which are in the model
store and in blobs.
"""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Final, assert_never

import structlog

from fedbus import __version__
from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import Timers, handle_each, request_until_answered, run_until
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.common.effect_runner import EffectRunner
from fedbus.agents.common.machine import (
    CancelTimer,
    FinishStartup,
    Log,
    Publish,
    Reply,
    RetryLater,
    StartTimer,
)
from fedbus.agents.server_manager import training_run
from fedbus.agents.server_manager.code_watcher import CodeWatcher, read_fleet
from fedbus.agents.server_manager.effects import (
    BuildFirstModel,
    BuildLineage,
    CancelCandidateRunRequest,
    CheckFit,
    CheckFitAtStartup,
    CheckPromotion,
    CheckStore,
    Effect,
    FindFlowerServer,
    Job,
    MoveCode,
    MoveServer,
    OfferModel,
    PromoteVersion,
    PruneCode,
    PublishVersion,
    Query,
    ReadFleet,
    ReadJoined,
    ReadRecruits,
    RecordRound,
    RecordRun,
    ReportFlowerServer,
    RequestCandidateRun,
    RetireVersions,
    StartFlowerServer,
    StopFlowerServer,
)
from fedbus.agents.server_manager.events import (
    CancelRequested,
    CandidateRunAnswered,
    ChampionDetails,
    CodeUnusable,
    Event,
    FirstModelFailed,
    FirstModelReady,
    FitChecked,
    FleetRead,
    FlowerServerFound,
    FlowerServerNotStarted,
    FlowerServerStarted,
    JoinedRead,
    LineageBuilt,
    LineageFailed,
    LineageRequested,
    ManagerStarted,
    ModelOffered,
    OfferFailed,
    PromotionChecked,
    PromotionRefused,
    PromotionRequested,
    PublishFailed,
    RunRequested,
    StartupFitChecked,
    StoreChecked,
    TimerName,
    VersionPromoted,
    VersionPublished,
    VersionsRetired,
)
from fedbus.agents.server_manager.flower_server_client import FlowerServerClient
from fedbus.agents.server_manager.machine import ServerMachine
from fedbus.agents.server_manager.model_versions import ModelVersions, trouble_of, wait_for_store
from fedbus.agents.server_manager.records import CodeRecord, ServerRecord
from fedbus.agents.server_manager.recruits import read_recruits
from fedbus.agents.server_manager.run_metrics import record_round, record_run
from fedbus.bus.bus import Bus, Delivery, Handler
from fedbus.bus.errors import RequestRefused
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore
from fedbus.common import clock
from fedbus.common.retry import retry
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.catalogue import CLIENT_CONSUMERS
from fedbus.contracts.champion import PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CODE, CodeChanges, CodeData, CodeEvent, CodeReady, CodeRefused, CodeState
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.message import Body, Refused, Request
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import StartRun
from fedbus.contracts.server import (
    SERVER,
    CancelRun,
    Enroll,
    Enrolled,
    GetServerInfo,
    HealthCheck,
    OpenRun,
    ServerChanges,
    ServerClosed,
    ServerData,
    ServerEvent,
    ServerState,
)
from fedbus.contracts.situations import ServerPublishing
from fedbus.contracts.subjects import RESERVED_OWNERS
from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRejected, CodeRepository, CodeUnavailable, DirectoryCodeRepository
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import ModelStore
from fedbus.stores.models.signing import ModelSigner

NEW_CODE: Final = "new code"
"""The trigger of a run that tries a candidate."""
CANDIDATE_RUN_TIMEOUT_S: Final = 60.0

log = structlog.get_logger("fedbus.server_manager")


@log_method_calls
class ServerManager:
    """The server of one task.

    Args:
        bus: The bus, as the server manager.
        task: The task, at the version that the server is started with.
        models: The store of its model versions.
        code: The repository of its code; None: the directory of *task*, which does not change.
        signer: Signs new model versions.

    """

    _server: LifecycleHandle[ServerState, ServerEvent, ServerData, ServerChanges]
    _code: LifecycleHandle[CodeState, CodeEvent, CodeData, CodeChanges]
    _runner: EffectRunner[Event, Job, TimerName]
    _machine: ServerMachine
    _watcher: CodeWatcher

    def __init__(
        self,
        bus: Bus,
        task: Task,
        models: ModelStore,
        *,
        code: CodeRepository | None = None,
        signer: ModelSigner | None = None,
    ) -> None:
        self._bus = bus
        self._task = task
        self._id = task.id
        self._repository = code or DirectoryCodeRepository(Path(task.path), open_library)
        self._flower = FlowerServerClient(bus, task.id)
        self._versions = ModelVersions(bus, task.id, models, signer)
        self._decisions = asyncio.Condition()
        """Held while one event is handled; notified when others may be accepted."""
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Manage the server until *stop* is set; the next manager continues from the log."""
        await self._bus.create_streams()
        async with (
            LifecycleStore.open(self._bus) as lifecycles,
            Timers.open() as timers,
            self._bus.consume(AgentName.SERVER_MANAGER, task=self._id) as inbox,
        ):
            self._runner = EffectRunner(
                self._bus, timers, log, decide=self._decide, result_of=self._result_of
            )
            started = await self._load(lifecycles)
            try:
                async with self._bus.serve(self._handlers, task=self._id, version=__version__):
                    await run_until(stop, self._live(started, inbox))
            finally:
                self._versions.withdraw()

    async def _live(self, started: ManagerStarted, inbox: AsyncIterator[Delivery]) -> None:
        with tracing.use_trace(await self._trace_of_the_log()):
            await self._decide(started)
        await self.ready.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watcher.run(), name="follow the code repository")
            await handle_each(inbox, self._decide)

    # --- the start ----------------------------------------------------------------------------------

    async def _load(self, lifecycles: LifecycleStore) -> ManagerStarted:
        """Read both lifecycles, and the code that they name."""
        own = self._task.code_version
        self._server = await lifecycles.load(SERVER, ServerData(task=self._id))
        facts = CodeData(task=self._id, code_version=own, source=self._repository.source)
        self._code = await lifecycles.load(CODE, facts)
        server, code = self._server, self._code
        if not server.exists:
            await server.create()
        if not code.exists:
            await code.create()
        self._machine = ServerMachine(
            self._task,
            ServerRecord(server.state, server.data, server.event or SERVER.creation, server.reason),
            CodeRecord(code.state, code.data, code.event or CODE.creation, code.reason),
        )
        self._watcher = CodeWatcher(
            self._bus,
            self._repository,
            self._flower,
            self._machine,
            compare=self._difference,
            decide=self._decide,
            ask=self._runner.ask,
        )
        version = code.data.code_version
        deployed = self._task if version == own else await self._load_task(version)
        if code.state is CodeState.STEADY or not isinstance(deployed, Task):
            return ManagerStarted(deployed)
        candidate = await self._load_task(code.data.candidate)
        answers = [
            *await self._bus.last_per_sender(CodeReady, task=self._id),
            *await self._bus.last_per_sender(CodeRefused, task=self._id),
        ]
        return ManagerStarted(
            deployed, candidate, tuple(one for one in answers if isinstance(one, CodeReady | CodeRefused))
        )

    async def _load_task(self, version: str) -> Task | CodeUnusable:
        """Load the task at *version*. Retries while the repository is unavailable."""

        def report(error: Exception, attempt: int) -> None:
            if attempt == 0:
                log.warning("Code repository unavailable; retrying", reason=str(error))

        load = partial(self._repository.load_task, version)
        try:
            return await retry(load, on=CodeUnavailable, on_failure=report)
        except CodeRejected as error:
            return CodeUnusable(str(error))

    async def _trace_of_the_log(self) -> str:
        """Return the trace of the current run, or of a run whose end is not published yet; empty if there is none."""
        facts = self._server.data
        closed = await self._bus.last_per_sender(ServerClosed, task=self._id)
        is_over = self._server.state is ServerState.WAITING
        if is_over and any(isinstance(one, ServerClosed) and one.run == facts.run for one in closed):
            return ""
        return facts.traceparent

    # --- events -------------------------------------------------------------------------------------

    async def _decide(self, event: Event) -> None:
        """Let the machine handle *event* as soon as it accepts it, and perform the effects."""
        async with self._decisions:
            await self._decisions.wait_for(lambda: self._machine.accepts(event))
            events = [event]
            while events:
                for effect in self._machine.handle(events.pop(0), clock.now()):
                    result = await self._perform(effect)
                    events += [result] if result is not None else []
            self._decisions.notify_all()

    @property
    def _handlers(self) -> dict[type[Request[Body]], Handler]:
        ask = self._runner.ask
        return {
            HealthCheck: self._health,
            GetServerInfo: self._info,
            Enroll: self._enroll,
            OpenRun: self._open_run,
            CancelRun: lambda request: ask(lambda request_id: CancelRequested(request_id, request)),
            PromoteModel: lambda request: ask(lambda request_id: PromotionRequested(request_id, request)),
            RollBackModel: lambda request: ask(lambda request_id: PromotionRequested(request_id, request)),
            StartLineage: lambda request: ask(lambda request_id: LineageRequested(request_id, request)),
            **self._watcher.handlers,
        }

    async def _health(self, _: HealthCheck) -> Body:
        return self._machine.health(clock.now())

    async def _info(self, _: GetServerInfo) -> Body:
        return self._machine.info()

    async def _open_run(self, request: OpenRun) -> Body:
        traceparent = tracing.current_traceparent()
        return await self._runner.ask(lambda request_id: RunRequested(request_id, request, traceparent))

    async def _enroll(self, request: Enroll) -> Body:
        if request.client in RESERVED_OWNERS:
            return Refused(
                reason=f"a client cannot be called {request.client!r}: that name is reserved in NATS subjects"
            )
        client = client_id(request.client)
        names = [
            await self._bus.create_client_consumer(agent, task=self._id, client=client)
            for agent in CLIENT_CONSUMERS
        ]
        return Enrolled(consumers=tuple(names))

    # --- effects ------------------------------------------------------------------------------------

    async def _perform(self, effect: Effect) -> Event | None:
        """Perform *effect*; the result of a query."""
        match effect:
            case MoveServer(event=event, changes=changes, reason=reason, deadline=deadline):
                await self._server.transition(event, changes, reason=reason, deadline=deadline)
            case MoveCode(event=event, changes=changes, reason=reason):
                await self._code.transition(event, changes, reason=reason)
            case Publish() | Reply() | StartTimer() | RetryLater() | CancelTimer() | Log():
                await self._runner.perform(effect)
            case CancelCandidateRunRequest():
                self._runner.cancel_job(RequestCandidateRun)
            case StopFlowerServer(run=run):
                await self._flower.stop(run)
            case RecordRound(result=result):
                record_round(self._id, result)
            case RecordRun(outcome=outcome):
                record_run(self._id, outcome)
            case FinishStartup():
                self.ready.set()
            case ReadJoined() | ReadRecruits() | ReadFleet() | OfferModel() | PromoteVersion():
                return await self._query(effect)
            case _:
                self._runner.start_job(effect)
        return None

    async def _query(self, query: Query) -> Event:
        match query:
            case ReadJoined():
                found = await self._bus.last_per_sender(ClientJoined, task=self._id)
                return JoinedRead(tuple(one for one in found if isinstance(one, ClientJoined)))
            case ReadRecruits(run=run):
                return await read_recruits(self._bus, self._id, run)
            case ReadFleet():
                return FleetRead(await read_fleet(self._bus, self._id))
            case OfferModel(model=model, receivers=receivers):
                return await self._offer(model, receivers)
            case PromoteVersion(version=version, reason=reason):
                try:
                    return VersionPromoted(await self._versions.promote(version, reason, new_term=True))
                except StoreError as error:
                    return PromotionRefused(str(error))
            case _:
                assert_never(query)

    async def _offer(self, model: ModelRef, receivers: int) -> Event:
        try:
            return ModelOffered(model, await self._versions.offer(model, receivers=receivers))
        except StoreError as error:
            return OfferFailed(str(error), trouble_of(error))

    # --- jobs ---------------------------------------------------------------------------------------

    async def _result_of(self, job: Job) -> Event | None:  # noqa: PLR0911, PLR0912 - one line a job
        match job:
            case BuildFirstModel(code_version=code_version):
                return await self._build_first_model(code_version)
            case CheckStore(model=model, term=term):
                return await self._check_store(model, term)
            case CheckFit(code_version=code_version, model=model):
                return await self._check_fit(code_version, model)
            case CheckFitAtStartup(code_version=code_version, model=model):
                fit = await self._check_fit(code_version, model)
                return StartupFitChecked(fit.difference, model) if fit.difference else None
            case StartFlowerServer(request=request):
                refusal = await self._flower.start(request)
                if refusal is not None:
                    return FlowerServerNotStarted(request.run, refusal)
                return FlowerServerStarted(request.run)
            case FindFlowerServer(run=run, reason=reason):
                return FlowerServerFound(run, await self._flower.is_running(run), reason)
            case ReportFlowerServer(run=run):
                await self._flower.is_running(run, report_loss=True)
                return None
            case PublishVersion(run=run, task=task):
                return await self._publish_version(run, task)
            case CheckPromotion():
                return await self._check_promotion(job)
            case BuildLineage(code_version=code_version):
                return await self._build_lineage(code_version)
            case RetireVersions(keep=keep, spare=spare):
                await self._versions.retire(spare, keep)
                return VersionsRetired()
            case RequestCandidateRun():
                return await self._request_candidate_run()
            case PruneCode():
                await self._watcher.prune()
                return None
            case _:
                assert_never(job)

    async def _build_first_model(self, code_version: str) -> Event:
        try:
            served = await self._versions.load_first() or await self._first_version(code_version)
        except StoreError as error:
            return FirstModelFailed(str(error), trouble_of(error))
        except RequestRefused as error:
            return FirstModelFailed(str(error), None)
        return FirstModelReady(served, code_version)

    async def _build_lineage(self, code_version: str) -> Event:
        try:
            served = await self._first_version(code_version, new_lineage=True)
        except (StoreError, RequestRefused) as error:
            return LineageFailed(str(error))
        return LineageBuilt(served, code_version)

    async def _first_version(self, code_version: str, *, new_lineage: bool = False) -> ChampionDetails:
        """Build a first model and promote it; raises StoreError and RequestRefused."""
        artifact = await self._flower.build_first_model(code_version)
        manifest = await self._versions.publish_first(
            artifact, code_version=code_version, new_lineage=new_lineage
        )
        return await self._versions.promote(
            manifest.version, f"the first model of lineage {manifest.lineage}"
        )

    async def _check_store(self, model: ModelRef, term: int) -> Event:
        """Look for the champion's weights after any other error too: a copy may be on this machine."""
        served: ChampionDetails | None = None
        has_file = False
        errors: list[StoreError] = []
        try:
            served = await self._versions.load_known(model, term)
        except StoreError as error:
            errors.append(error)
        champion = served.manifest if served is not None and served.champion.term > term else model
        try:
            await self._versions.local_path(champion)
            has_file = True
        except StoreError as error:
            errors.append(error)
        if not errors:
            return StoreChecked(model, served, has_file)
        return StoreChecked(model, served, has_file, str(errors[0]), trouble_of(errors[0]))

    async def _check_fit(self, code_version: str, model: ModelRef) -> FitChecked:
        """Only log a refused check: the run itself would fail for the same reason and report it."""
        try:
            if await self._versions.read_code_version(model) == code_version:
                return FitChecked()
            return FitChecked(await self._difference(model, code_version))
        except StoreError as error:
            return FitChecked(store_error=str(error))
        except RequestRefused as error:
            log.warning("Cannot check whether the code fits the champion", reason=str(error))
            return FitChecked()

    async def _difference(self, model: ModelRef, code_version: str) -> str:
        """Describe why *model* does not fit the code at *code_version*; empty if it does, or need not.

        Raises StoreError and RequestRefused.
        """
        comparison = await self._flower.compare_architecture(model, code_version)
        if comparison.difference and not comparison.is_fixed:
            return "" if await self._versions.has_free_architecture(model) else comparison.difference
        return comparison.difference

    async def _publish_version(self, run: ServerPublishing, task: Task | None) -> Event:
        loaded = task or await self._load_task(run.code_version)
        if isinstance(loaded, CodeUnusable):
            return PublishFailed(loaded.reason)
        publish = partial(self._publish, loaded, run)
        try:
            async with asyncio.timeout(training_run.PUBLISH_S):
                return await wait_for_store(publish)
        except (TimeoutError, StoreError) as error:
            limit = (
                f"the model repository did not take the version in time (limit {training_run.PUBLISH_S:g} s)"
            )
            return PublishFailed(str(error) or limit)

    async def _publish(self, task: Task, run: ServerPublishing) -> VersionPublished:
        """Publish, judge and promote the result of *run*; a repetition changes nothing."""
        manifest = await self._versions.publish(run)
        verdict = await self._versions.judge(task.table, manifest, run)
        served = await self._versions.promote(manifest.version, verdict.reason) if verdict.promote else None
        return VersionPublished(manifest, verdict, served, task.table.keep_models)

    async def _check_promotion(self, job: CheckPromotion) -> Event:
        try:
            version = job.version or await self._versions.previous_champion()
            manifest = await self._versions.read_manifest(version)
            is_other = manifest.architecture != job.champion.architecture
            difference = await self._difference(manifest, job.code_version) if is_other else ""
            if difference:
                return PromotionRefused(
                    f"version {version} does not fit the code that is in use: {difference}"
                )
            await self._versions.local_path(manifest)
        except (StoreError, RequestRefused) as error:
            return PromotionRefused(str(error))
        return PromotionChecked(version)

    async def _request_candidate_run(self) -> Event:
        """Ask the scheduler for a run; it asks for that run to be opened before it answers."""
        request = StartRun(task=self._id, trigger=NEW_CODE)
        try:
            await request_until_answered(self._bus, request, timeout_s=CANDIDATE_RUN_TIMEOUT_S)
        except RequestRefused as error:
            return CandidateRunAnswered(str(error))
        return CandidateRunAnswered()
