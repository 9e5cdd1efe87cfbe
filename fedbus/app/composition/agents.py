"""Agents put together: which objects each needs, and which run in one process.

Every agent has a bus of its own, whether it shares its process or not: no agent knows another,
and moving one to a process, a container or a machine of its own changes nothing for it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from fedbus import __version__
from fedbus.agents.client_manager.agent import ClientManager
from fedbus.agents.client_manager.training_slots import TrainingSlots
from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.code_check import check
from fedbus.agents.common.liveness import hold_liveness_lock
from fedbus.agents.common.process_orders import CheckProcessConfig, ProcessConfig, TrainerProcessConfig
from fedbus.agents.device_monitor.agent import DeviceMonitor
from fedbus.agents.flower_client.agent import FlowerClient
from fedbus.agents.flower_server.agent import FlowerServer
from fedbus.agents.flower_server.kubernetes.api import ClusterConfig
from fedbus.agents.flower_server.kubernetes.launcher import KubernetesLauncher
from fedbus.agents.flower_server.launcher import ChildLauncher, Launcher
from fedbus.agents.inference.agent import SERVED_MODEL_FILE, InferenceAgent
from fedbus.agents.inference.data_monitor import DataMonitor
from fedbus.agents.inference.event_queue import EventQueue
from fedbus.agents.inference.http_server import InferenceServer
from fedbus.agents.inference.offline_evaluation import OfflineEvaluation, Score
from fedbus.agents.server_manager.agent import ServerManager
from fedbus.agents.server_manager.state_registrar import serve_registrar
from fedbus.agents.training_monitor.agent import TrainingMonitor
from fedbus.agents.workflow_scheduler.agent import WorkflowScheduler
from fedbus.app.telemetry.log_lines import error_summary
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.credentials import ANONYMOUS, BusAccess
from fedbus.bus.errors import BusUnreachable
from fedbus.common.retry import RetryBackoff
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import ClientStart, InferStart
from fedbus.contracts.identifiers import ClientId, FederationId
from fedbus.contracts.message import Message
from fedbus.contracts.run import RunOverrides
from fedbus.contracts.scheduling import ScheduleOverrides
from fedbus.contracts.serving import CapturePaused, CaptureResumed
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.contracts.task.task import Task
from fedbus.domain.serving_gates import score
from fedbus.learning.device_data import DeviceData
from fedbus.learning.flower import task_code
from fedbus.learning.predictor import ModelRefused, TorchPredictor
from fedbus.stores.captured.store import CapturedData
from fedbus.stores.code.open import CodeRepository
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import open_model_store
from fedbus.stores.models.signing import ModelSigner, TrustedKeys
from fedbus.stores.outbox import SqliteOutbox
from fedbus.stores.trackers.interface import TrackerContext, open_trackers
from fedbus.stores.trackers.local import LocalTracker

log = structlog.get_logger("fedbus.compose")
Scalar = bool | int | float | str


@dataclass(frozen=True)
class AgentConfig:
    """Where agents run: their bus, their files, their task."""

    nats_url: str
    federation: FederationId
    home: Path
    task: Task
    store: str = ""
    """The model repository; left out: a directory under *home*."""
    overrides: RunOverrides = field(default_factory=RunOverrides)
    """What runs are to be in the place of what the task says."""
    schedule: ScheduleOverrides = field(default_factory=ScheduleOverrides)
    """When they start, likewise."""
    code: CodeRepository | None = None
    """Where other versions of the task come from; left out: from nowhere."""
    signer: ModelSigner | None = None
    """Signs the model versions that are made here."""
    trusted: TrustedKeys | None = None
    """Whose models may be served here; left out: anybody's."""
    trackers: tuple[str, ...] = ()
    """Where the curves of training go, beside a file of our own."""
    access: BusAccess = ANONYMOUS
    """Who we are to the bus, and whom we believe."""
    job_template: str = ""
    """The PodTemplate of the Kubernetes Jobs that ServerApps are run in; left out: they are child processes."""

    @property
    def store_url(self) -> str:
        return self.store or str(self.home / "models")

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    def order(self, task: Task | None = None) -> ProcessConfig:
        return ProcessConfig(
            nats_url=self.nats_url,
            federation=self.federation,
            task=task or self.task,
            home=str(self.home),
            creds=str(self.access.creds or ""),
            ca=str(self.access.ca or ""),
        )

    async def task_at(self, version: str) -> Task:
        """The task's code at *version*; raises CodeRejected and CodeUnavailable."""
        if version in ("", self.task.code_version) or self.code is None:
            return self.task
        return await self.code.task_at(version)

    @asynccontextmanager
    async def bus(self, agent: str, owner: str = SERVER_SIDE) -> AsyncIterator[Bus]:
        identity = Identity(self.federation, agent, owner)
        async with (
            Bus.connect(self.nats_url, identity, access=self.access) as bus,
            bus.advertise_service(task=self.task.id, version=__version__),
        ):
            yield bus


@dataclass(frozen=True)
class ClientConfig:
    """One client of a site: what is its own."""

    site: AgentConfig
    client: ClientId
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    """As Flower's SuperNode has it: ``partition-id``, ``num-partitions`` and whatever the app reads."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What it is told apart by when code is rolled out: ``{"site": "lab"}``."""
    host: str = "127.0.0.1"
    port: int = 0
    train_at_once: int = 1
    """How many tasks may train at the same time on it."""

    @property
    def slots(self) -> TrainingSlots:
        return TrainingSlots(self.site.home / "clients" / self.client / "training-slots", self.train_at_once)

    @property
    def directory(self) -> Path:
        return self.site.home / "clients" / self.client / self.site.task.id

    def outbox(self, agent: str) -> SqliteOutbox:
        self.directory.mkdir(parents=True, exist_ok=True)
        return SqliteOutbox(self.directory / f"outbox-{agent}.db")

    def captured(self) -> Path:
        return self.directory / "captured.db"

    async def trainer_order(self, start: ClientStart) -> TrainerProcessConfig:
        task = await self.site.task_at(start.code_version)
        return TrainerProcessConfig(
            **dict(self.site.order(task)),
            client=self.client,
            run=start.run,
            plan=start.plan,
            node_config=dict(self.node_config),
            captured=str(self.captured()),
        )

    async def check(self, task: Task) -> None:
        """Run new code of the task once, in a process of its own; raises CheckFailed."""
        order = CheckProcessConfig(**dict(self.site.order(task)), server_side=False)
        await check(order, log_file=self.site.logs / self.client / "check.log")


AgentFunction = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
"""Runs until the event is set."""
ClientAgentFunction = Callable[[ClientConfig, asyncio.Event], Coroutine[Any, Any, None]]


# --- the server side ---------------------------------------------------------------------------


async def server_manager(site: AgentConfig, stop: asyncio.Event) -> None:
    async with (
        site.bus(AgentName.REGISTRAR) as registers,
        serve_registrar(registers, site.task.id),
        site.bus(AgentName.SERVER_MANAGER) as bus,
    ):
        models = open_model_store(site.store_url, site.task.id)
        manager = ServerManager(bus, site.task, models, code=site.code, signer=site.signer)
        await wait_for_first(manager.run(stop), bus.lost())


async def workflow_scheduler(site: AgentConfig, stop: asyncio.Event) -> None:
    async with site.bus(AgentName.WORKFLOW_SCHEDULER) as bus:
        scheduler = WorkflowScheduler(
            bus, site.task, overrides=site.overrides, schedule=site.schedule, code=site.code
        )
        await wait_for_first(scheduler.run(stop), bus.lost())


async def flower_server(site: AgentConfig, stop: asyncio.Event) -> None:
    async with site.bus(AgentName.FLOWER_SERVER) as bus:
        models = open_model_store(site.store_url, site.task.id)
        server = FlowerServer(
            bus,
            site.order(),
            models,
            logs=site.logs / "server",
            code=site.code,
            launcher=_make_launcher(site),
        )
        await wait_for_first(server.run(stop), bus.lost())


def _make_launcher(site: AgentConfig) -> Launcher:
    if not site.job_template:
        return ChildLauncher(site.logs / "server")
    return KubernetesLauncher(
        ClusterConfig.of_this_pod(), template=site.job_template, federation=site.federation, task=site.task.id
    )


# --- a client ------------------------------------------------------------------------------------


async def client_manager(device: ClientConfig, stop: asyncio.Event) -> None:
    async with device.site.bus(AgentName.CLIENT_MANAGER, device.client) as bus:
        manager = ClientManager(
            bus,
            device.site.task,
            device.client,
            directory=device.directory,
            outbox=device.outbox(AgentName.CLIENT_MANAGER),
            code=device.site.code,
            check=device.check,
            labels=device.labels,
            trusted=device.site.trusted,
            slots=device.slots,
        )
        await wait_for_first(manager.run(stop), bus.lost())


async def flower_client(device: ClientConfig, stop: asyncio.Event) -> None:
    async with device.site.bus(AgentName.FLOWER_CLIENT, device.client) as bus:
        trainer = FlowerClient(
            bus,
            device.site.task,
            device.client,
            build_config=device.trainer_order,
            outbox=device.outbox(AgentName.FLOWER_CLIENT),
            logs=device.site.logs / device.client,
        )
        await wait_for_first(trainer.run(stop), bus.lost())


async def inference(device: ClientConfig, stop: asyncio.Event) -> None:
    """Predictions: they begin before the bus is there, on a device that has served before."""
    task, sayings = device.site.task, EventQueue()
    given = DeviceData(task, device.node_config)
    probe, holdout = await asyncio.to_thread(lambda: (given.probe(), given.holdout()))
    async with _open_capture(device, sayings) as captured:
        server = _inference_server(device, captured)
        agent = InferenceAgent(
            task,
            device.client,
            server,
            load=_model_loader(device, asyncio.get_running_loop()),
            evaluation=OfflineEvaluation(
                task.table.serving,
                task.table.capture,
                database=captured.path if captured else None,
                probe=probe,
                holdout=holdout,
                score=_score_function(task),
            ),
            outbox=device.outbox(AgentName.INFERENCE),
            directory=device.directory,
            events=sayings,
            data_monitor=_data_monitor(device, captured, server, sayings, given),
            host=device.host,
            port=device.port,
        )
        await agent.run(stop, lambda: device.site.bus(AgentName.INFERENCE, device.client))


async def device_monitor(device: ClientConfig, stop: asyncio.Event) -> None:
    async with device.site.bus(AgentName.DEVICE_MONITOR, device.client) as bus:
        monitor = DeviceMonitor(
            bus, device.site.task, device.client, directory=device.directory, errors=error_summary
        )
        await wait_for_first(monitor.run(stop), bus.lost())


def _model_loader(
    device: ClientConfig, loop: asyncio.AbstractEventLoop
) -> Callable[[InferStart], TorchPredictor]:
    """Makes a model by the code that it is to be served with; for a thread beside *loop*."""

    def load(start: InferStart) -> TorchPredictor:
        getting = asyncio.run_coroutine_threadsafe(device.site.task_at(start.code_version), loop)
        try:
            return TorchPredictor(getting.result(), Path(start.path))
        except StoreError as error:
            raise ModelRefused(str(error)) from error

    return load


def _inference_server(device: ClientConfig, captured: CapturedData | None) -> InferenceServer:
    task = device.site.task
    table = task.table.serving
    return InferenceServer(
        captured,
        name=task.id,
        client=device.client,
        max_body_bytes=table.max_body_bytes,
        max_inputs=table.max_inputs,
        max_queued=table.max_queued,
        batch_s=table.batch_ms / 1000,
        classes=task.table.checks.classes,
    )


def _score_function(task: Task) -> Score:
    """How a model is judged: as the task says, else by accuracy or R²."""
    if task.table.serving.score is None:
        return score
    own: Score = task_code.load_function(Path(task.path), task.table.serving.score)
    return own


def _data_monitor(
    device: ClientConfig,
    captured: CapturedData | None,
    server: InferenceServer,
    sayings: EventQueue,
    given: DeviceData,
) -> DataMonitor | None:
    if captured is None:
        return None
    table = device.site.task.table
    return DataMonitor(
        captured,
        server.engine,
        table.checks,
        table.capture,
        sayings.say,
        task=device.site.task.id,
        client=device.client,
        reference=given.reference,
    )


@asynccontextmanager
async def _open_capture(device: ClientConfig, sayings: EventQueue) -> AsyncIterator[CapturedData | None]:
    """What the device keeps of its predictions, where the task has it keep any."""
    table, loop = device.site.task.table.capture, asyncio.get_running_loop()
    if not table.enabled:
        yield None
        return
    about = {"task": device.site.task.id, "client": device.client}

    def say(message: Message) -> None:
        with suppress(RuntimeError):  # the loop has gone: so has whoever would hear it
            loop.call_soon_threadsafe(sayings.say, message)

    def paused(reason: str) -> None:
        log.warning("capture rests", reason=reason)
        say(CapturePaused.model_validate({**about, "reason": reason, "dropped": captured.dropped}))

    def resumed() -> None:
        log.info("capture goes on")
        say(CaptureResumed.model_validate({**about, "dropped": captured.dropped}))

    captured = CapturedData(
        device.captured(),
        max_rows=table.max_rows,
        max_bytes=table.max_bytes,
        max_age_s=table.max_age_s,
        holdout_share=table.holdout_share,
        retry_s=table.retry_s,
        on_failure=paused,
        on_recovery=resumed,
    )
    try:
        yield captured
    finally:
        await captured.close()


async def training_monitor(site: AgentConfig, stop: asyncio.Event) -> None:
    place = TrackerContext(site.task.id, site.home / "training")
    trackers = await asyncio.to_thread(open_trackers, site.trackers, place)
    async with site.bus(AgentName.TRAINING_MONITOR) as bus:
        monitor = TrainingMonitor(bus, site.task.id, LocalTracker(place), trackers)
        await wait_for_first(monitor.run(stop), bus.lost())


SERVER_AGENTS: Final = {
    AgentName.SERVER_MANAGER: server_manager,
    AgentName.WORKFLOW_SCHEDULER: workflow_scheduler,
    AgentName.FLOWER_SERVER: flower_server,
    AgentName.TRAINING_MONITOR: training_monitor,
}


CLIENT_AGENTS: Final = {
    AgentName.CLIENT_MANAGER: client_manager,
    AgentName.FLOWER_CLIENT: flower_client,
    AgentName.INFERENCE: inference,
    AgentName.DEVICE_MONITOR: device_monitor,
}


def client_agent(agent: AgentName, device: ClientConfig) -> AgentFunction:
    """An agent of a client, seen to be there by its device monitor for as long as it runs."""

    async def run(stop: asyncio.Event) -> None:
        with hold_liveness_lock(device.directory, agent):
            await _retry_until_bus(CLIENT_AGENTS[agent], device, stop)

    return run


async def _retry_until_bus(agent: ClientAgentFunction, device: ClientConfig, stop: asyncio.Event) -> None:
    """Be *agent*. A device that has served before waits for the bus: its predictions go on meanwhile.

    To a new one a bus that is not there is an error, and told at once: BusUnreachable.
    """
    backoff = RetryBackoff()
    while not stop.is_set():
        try:
            await agent(device, stop)
        except BusUnreachable as error:
            if not (device.directory / SERVED_MODEL_FILE).exists():
                raise
            log.warning("the bus is not there yet", reason=str(error))
            await backoff.pause(stop)
        else:
            return


async def run_together(agents: Mapping[str, AgentFunction], stop: asyncio.Event) -> None:
    """Several agents in this process: the first that breaks ends them all, and the process with them."""
    async with asyncio.TaskGroup() as group:
        for name, agent in agents.items():
            group.create_task(agent(stop), name=name)
