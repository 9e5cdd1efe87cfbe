"""The composition of agents: the objects that each needs, and which agents run in one process.

Every agent has its own connection to the bus, even if agents share a process. No agent refers to another, so each
can move to its own process, container or machine.
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
from fedbus.agents.common.process_orders import (
    CheckProcessConfig,
    ProcessConfig,
    TrainerConditions,
    TrainerProcessConfig,
)
from fedbus.agents.device_monitor.agent import DeviceMonitor
from fedbus.agents.flower_client.agent import FlowerClient
from fedbus.agents.flower_client.trainer import ChildTrainer
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
from fedbus.learning import task_code
from fedbus.learning.device_data import DeviceData
from fedbus.learning.predictor import ModelUnavailable, TaskPredictor
from fedbus.stores.captured.store import CapturedData
from fedbus.stores.code.open import CodeRepository
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import open_model_store
from fedbus.stores.models.signing import ModelSigner, TrustedKeys
from fedbus.stores.outbox import SqliteOutbox
from fedbus.stores.trackers.interface import TrackerContext, open_trackers
from fedbus.stores.trackers.local import LocalTracker

log = structlog.get_logger("fedbus.composition")
Scalar = bool | int | float | str


@dataclass(frozen=True)
class AgentConfig:
    """The configuration that all agents of one task on a machine share."""

    nats_url: str
    federation: FederationId
    home: Path
    task: Task
    store: str = ""
    """The model repository; empty: a directory in *home*."""
    overrides: RunOverrides = field(default_factory=RunOverrides)
    """Overrides of the task's run plan."""
    schedule: ScheduleOverrides = field(default_factory=ScheduleOverrides)
    """Overrides of the task's schedule."""
    code: CodeRepository | None = None
    """The source of other code versions; None: there are none."""
    signer: ModelSigner | None = None
    """Signs new model versions."""
    trusted: TrustedKeys | None = None
    """The keys whose models may be served; None: any model may."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers in addition to the local one."""
    access: BusAccess = ANONYMOUS
    """Credentials and CA for NATS."""
    job_template: str = ""
    """The PodTemplate of the Kubernetes Jobs that run ServerApps; empty: ServerApps run in child processes."""

    @property
    def store_url(self) -> str:
        return self.store or str(self.home / "models")

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    def process_config(self, task: Task | None = None) -> ProcessConfig:
        return ProcessConfig(
            nats_url=self.nats_url,
            federation=self.federation,
            task=task or self.task,
            home=str(self.home),
            creds=str(self.access.creds or ""),
            ca=str(self.access.ca or ""),
            proxied_host=self.access.proxied_host,
        )

    async def task_at(self, version: str) -> Task:
        """Load the task at a code version.

        Raises:
            CodeRejected: The version is not accepted.
            CodeUnavailable: The code repository is unavailable.

        """
        if version in ("", self.task.code_version) or self.code is None:
            return self.task
        return await self.code.load_task(version)

    @asynccontextmanager
    async def connect_bus(self, agent: str, owner: str = SERVER_SIDE) -> AsyncIterator[Bus]:
        identity = Identity(self.federation, agent, owner)
        async with (
            Bus.connect(self.nats_url, identity, access=self.access) as bus,
            bus.advertise_service(task=self.task.id, version=__version__),
        ):
            yield bus


@dataclass(frozen=True)
class ClientConfig:
    """The configuration of one client."""

    agent_config: AgentConfig
    client: ClientId
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    """The device's own values for the app: ``partition-id``, ``num-partitions`` and other keys of the app."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Device labels, which select the stages of a rollout: ``{"site": "lab"}``."""
    host: str = "127.0.0.1"
    port: int = 0
    train_at_once: int = 1
    """Number of tasks that train at the same time on the device."""
    conditions: Callable[[str], TrainerConditions] | None = None
    """Returns the conditions of a run under the profile of the device; None without a profile."""

    @property
    def training_slots(self) -> TrainingSlots:
        return TrainingSlots(
            self.agent_config.home / "clients" / self.client / "training-slots", self.train_at_once
        )

    @property
    def directory(self) -> Path:
        return self.agent_config.home / "clients" / self.client / self.agent_config.task.id

    def open_outbox(self, agent: str) -> SqliteOutbox:
        self.directory.mkdir(parents=True, exist_ok=True)
        return SqliteOutbox(self.directory / f"outbox-{agent}.db")

    def captured_path(self) -> Path:
        return self.directory / "captured.db"

    async def trainer_config(self, start: ClientStart) -> TrainerProcessConfig:
        task = await self.agent_config.task_at(start.code_version)
        return TrainerProcessConfig(
            **dict(self.agent_config.process_config(task)),
            client=self.client,
            run=start.run,
            plan=start.plan,
            node_config=dict(self.node_config),
            captured=str(self.captured_path()),
            conditions=self.conditions(start.run) if self.conditions is not None else None,
        )

    async def check_code(self, task: Task) -> None:
        """Check new code of the task in a child process.

        Raises:
            CheckFailed: The code does not work.

        """
        config = CheckProcessConfig(**dict(self.agent_config.process_config(task)), server_side=False)
        await check(config, log_file=self.agent_config.logs / self.client / "check.log")


AgentFunction = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
"""Runs until the event is set."""
ClientAgentFunction = Callable[[ClientConfig, asyncio.Event], Coroutine[Any, Any, None]]


# --- the server side ---------------------------------------------------------------------------


async def server_manager(config: AgentConfig, stop: asyncio.Event) -> None:
    async with (
        config.connect_bus(AgentName.REGISTRAR) as registrar_bus,
        serve_registrar(registrar_bus, config.task.id),
        config.connect_bus(AgentName.SERVER_MANAGER) as bus,
    ):
        models = open_model_store(config.store_url, config.task.id)
        manager = ServerManager(bus, config.task, models, code=config.code, signer=config.signer)
        await wait_for_first(manager.run(stop), bus.wait_closed())


async def workflow_scheduler(config: AgentConfig, stop: asyncio.Event) -> None:
    async with config.connect_bus(AgentName.WORKFLOW_SCHEDULER) as bus:
        scheduler = WorkflowScheduler(
            bus, config.task, overrides=config.overrides, schedule=config.schedule, code=config.code
        )
        await wait_for_first(scheduler.run(stop), bus.wait_closed())


async def flower_server(config: AgentConfig, stop: asyncio.Event) -> None:
    async with config.connect_bus(AgentName.FLOWER_SERVER) as bus:
        models = open_model_store(config.store_url, config.task.id)
        server = FlowerServer(
            bus,
            config.process_config(),
            models,
            logs=config.logs / "server",
            code=config.code,
            launcher=_make_launcher(config),
        )
        await wait_for_first(server.run(stop), bus.wait_closed())


def _make_launcher(config: AgentConfig) -> Launcher:
    if not config.job_template:
        return ChildLauncher(config.logs / "server")
    return KubernetesLauncher(
        ClusterConfig.from_pod(),
        template=config.job_template,
        federation=config.federation,
        task=config.task.id,
    )


# --- a client ------------------------------------------------------------------------------------


async def client_manager(device: ClientConfig, stop: asyncio.Event) -> None:
    async with device.agent_config.connect_bus(AgentName.CLIENT_MANAGER, device.client) as bus:
        manager = ClientManager(
            bus,
            device.agent_config.task,
            device.client,
            directory=device.directory,
            outbox=device.open_outbox(AgentName.CLIENT_MANAGER),
            code=device.agent_config.code,
            check=device.check_code,
            labels=device.labels,
            trusted=device.agent_config.trusted,
            slots=device.training_slots,
        )
        await wait_for_first(manager.run(stop), bus.wait_closed())


async def flower_client(device: ClientConfig, stop: asyncio.Event) -> None:
    async with device.agent_config.connect_bus(AgentName.FLOWER_CLIENT, device.client) as bus:
        trainer = FlowerClient(
            bus,
            device.agent_config.task,
            device.client,
            launcher=ChildTrainer(device.trainer_config, logs=device.agent_config.logs / device.client),
            outbox=device.open_outbox(AgentName.FLOWER_CLIENT),
        )
        await wait_for_first(trainer.run(stop), bus.wait_closed())


async def inference(device: ClientConfig, stop: asyncio.Event) -> None:
    """Run the inference agent. On a device that has served before, predictions start before the bus connects."""
    task, events = device.agent_config.task, EventQueue()
    device_data = DeviceData(task, device.node_config)
    probe, holdout = await asyncio.to_thread(lambda: (device_data.probe(), device_data.holdout()))
    async with _open_capture(device, events) as captured:
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
            outbox=device.open_outbox(AgentName.INFERENCE),
            directory=device.directory,
            events=events,
            data_monitor=_data_monitor(device, captured, server, events, device_data),
            host=device.host,
            port=device.port,
        )
        await agent.run(stop, lambda: device.agent_config.connect_bus(AgentName.INFERENCE, device.client))


async def device_monitor(device: ClientConfig, stop: asyncio.Event) -> None:
    async with device.agent_config.connect_bus(AgentName.DEVICE_MONITOR, device.client) as bus:
        monitor = DeviceMonitor(
            bus, device.agent_config.task, device.client, directory=device.directory, errors=error_summary
        )
        await wait_for_first(monitor.run(stop), bus.wait_closed())


def _model_loader(
    device: ClientConfig, loop: asyncio.AbstractEventLoop
) -> Callable[[InferStart], TaskPredictor]:
    """Make a function that loads a model with its code version. It runs in a thread, and uses *loop* for downloads."""

    def load(start: InferStart) -> TaskPredictor:
        download = asyncio.run_coroutine_threadsafe(device.agent_config.task_at(start.code_version), loop)
        try:
            return TaskPredictor(download.result(), Path(start.path))
        except StoreError as error:
            raise ModelUnavailable(str(error)) from error

    return load


def _inference_server(device: ClientConfig, captured: CapturedData | None) -> InferenceServer:
    task = device.agent_config.task
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
    """Return the score function of the task, else accuracy or R²."""
    if task.table.serving.score is None:
        return score
    own: Score = task_code.load_function(Path(task.path), task.table.serving.score)
    return own


def _data_monitor(
    device: ClientConfig,
    captured: CapturedData | None,
    server: InferenceServer,
    events: EventQueue,
    device_data: DeviceData,
) -> DataMonitor | None:
    if captured is None:
        return None
    table = device.agent_config.task.table
    return DataMonitor(
        captured,
        server.engine,
        table.checks,
        table.capture,
        events.enqueue,
        task=device.agent_config.task.id,
        client=device.client,
        reference=device_data.reference,
    )


@asynccontextmanager
async def _open_capture(device: ClientConfig, events: EventQueue) -> AsyncIterator[CapturedData | None]:
    """Open the captured data of the device; None if the task does not capture."""
    table, loop = device.agent_config.task.table.capture, asyncio.get_running_loop()
    if not table.enabled:
        yield None
        return
    identifiers = {"task": device.agent_config.task.id, "client": device.client}

    def enqueue(message: Message) -> None:
        with suppress(RuntimeError):  # the loop is closed: the agent has stopped
            loop.call_soon_threadsafe(events.enqueue, message)

    def on_failure(reason: str) -> None:
        log.warning("Data capture paused", reason=reason)
        enqueue(CapturePaused.model_validate({**identifiers, "reason": reason, "dropped": captured.dropped}))

    def on_recovery() -> None:
        log.info("Data capture resumed")
        enqueue(CaptureResumed.model_validate({**identifiers, "dropped": captured.dropped}))

    captured = CapturedData(
        device.captured_path(),
        max_rows=table.max_rows,
        max_bytes=table.max_bytes,
        max_age_s=table.max_age_s,
        holdout_share=table.holdout_share,
        retry_s=table.retry_s,
        on_failure=on_failure,
        on_recovery=on_recovery,
    )
    try:
        yield captured
    finally:
        await captured.close()


async def training_monitor(config: AgentConfig, stop: asyncio.Event) -> None:
    context = TrackerContext(config.task.id, config.home / "training")
    trackers = await asyncio.to_thread(open_trackers, config.trackers, context)
    async with config.connect_bus(AgentName.TRAINING_MONITOR) as bus:
        monitor = TrainingMonitor(bus, config.task.id, LocalTracker(context), trackers)
        await wait_for_first(monitor.run(stop), bus.wait_closed())


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
    """Make the function of a client's agent. It holds a lock while it runs, by which the device monitor sees it."""

    async def run(stop: asyncio.Event) -> None:
        with hold_liveness_lock(device.directory, agent):
            await _retry_until_bus(CLIENT_AGENTS[agent], device, stop)

    return run


async def _retry_until_bus(agent: ClientAgentFunction, device: ClientConfig, stop: asyncio.Event) -> None:
    """Run *agent*. A device that has served before retries until the bus is reachable, and keeps on predicting.

    So does a device with a profile, which may interrupt the first connection.

    Raises:
        BusUnreachable: A new device cannot connect.

    """
    backoff = RetryBackoff()
    while not stop.is_set():
        try:
            await agent(device, stop)
        except BusUnreachable as error:
            has_served = (device.directory / SERVED_MODEL_FILE).exists()
            if not has_served and device.conditions is None:
                raise
            log.warning("NATS unreachable; retrying", reason=str(error))
            await backoff.pause(stop)
        else:
            return


async def run_together(agents: Mapping[str, AgentFunction], stop: asyncio.Event) -> None:
    """Run agents in this process until all have ended. If one fails, the others are cancelled."""
    async with asyncio.TaskGroup() as group:
        for name, agent in agents.items():
            group.create_task(agent(stop), name=name)
