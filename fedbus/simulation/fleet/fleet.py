"""Runs a fleet under virtual time."""

import asyncio
import logging
import resource
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import IO, Final

import structlog

from fedbus.agents.common.process_orders import ProcessConfig
from fedbus.agents.server_manager.agent import ServerManager
from fedbus.agents.workflow_scheduler.agent import WorkflowScheduler
from fedbus.bus.bus import Identity
from fedbus.bus.memory.server import MemoryServer
from fedbus.bus.memory.stream import StoredRecord
from fedbus.common import clock
from fedbus.common.garbage_collection import rare_garbage_collections
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.run import RUN, RunData
from fedbus.contracts.transition import Transition
from fedbus.learning.installed_libraries import open_library
from fedbus.simulation.fleet.agents import SupervisedAgent
from fedbus.simulation.fleet.bus import FleetBus, connect_agent
from fedbus.simulation.fleet.device import SimulatedDevice
from fedbus.simulation.fleet.flower_server import SimulatedFlowerServer
from fedbus.simulation.fleet.model_store import fleet_model_store
from fedbus.simulation.fleet.server_session import FleetLauncher
from fedbus.simulation.fleet.settings import FEDERATION, FleetProgress, FleetResult, FleetRun, FleetSettings
from fedbus.simulation.fleet.training import TrainingBoard
from fedbus.simulation.fleet.transition_log import TransitionLog
from fedbus.simulation.profiles.conditions import Conditions
from fedbus.simulation.profiles.schema import Group, Profile
from fedbus.simulation.settings import BadSettings
from fedbus.stores.code.open import DirectoryCodeRepository

EVENT_HISTORY: Final = 1
"""The events of one kind that the stream keeps of each sender: agents read the last one only."""
PROGRESS_S: Final = 0.2
MESSAGES_BETWEEN_REPORTS: Final = 200
_NUMBERS: Final = count(1)

Observer = Callable[[FleetProgress], None]
Recorder = Callable[[StoredRecord], None]


def simulate_fleet(
    settings: FleetSettings, *, log: IO[str] | None = None, observer: Observer | None = None
) -> FleetResult:
    """Simulate a fleet. The transition log is written to *log*, and the progress reported to *observer*.

    Raises:
        BadSettings: Virtual time needs a package that is not installed.
        KeyboardInterrupt: A signal interrupted the simulation; its agents are stopped.

    """
    start = time.perf_counter()
    with open_runner(settings) as runner:
        try:
            return runner.run(_simulate(settings, log, observer, start))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def open_runner(settings: FleetSettings) -> asyncio.Runner:
    """Return a runner whose loop has virtual time.

    Raises:
        BadSettings: The package for it is not installed.

    """
    try:
        from fedbus.simulation.fleet.virtual_time import VirtualLoop  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        raise BadSettings(
            f"a fleet under virtual time needs {error.name}, which is not installed. "
            "Install it: pip install 'fedbus[simulation]'"
        ) from None
    return asyncio.Runner(loop_factory=lambda: VirtualLoop(settings.seed, starts_at=settings.starts_at))


async def _simulate(
    settings: FleetSettings, log: IO[str] | None, observer: Observer | None, start: float
) -> FleetResult:
    transitions = TransitionLog(log)
    async with SimulatedFleet.open(
        settings, [transitions.on_stored, *_reports(settings, transitions, observer)]
    ) as fleet:
        with _cancel_when_interrupted():
            fleet.start()
            await asyncio.sleep(settings.duration_s)
        runs, restarts = await fleet.read_runs(transitions), fleet.restarts
    return FleetResult(
        clients=settings.clients,
        runs=runs,
        transitions=transitions.transitions,
        messages=transitions.messages,
        restarts=restarts,
        simulated_s=settings.duration_s,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        log_sha256=transitions.sha256,
    )


@contextmanager
def _cancel_when_interrupted() -> Iterator[None]:
    """Cancel the current task if the handler of SIGINT or SIGTERM raises KeyboardInterrupt.

    Otherwise the error would end whichever agent is running, and leave the others without an end.
    """
    task = asyncio.current_task()
    if task is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        try:
            if callable(handler):
                handler(number, frame)
        except KeyboardInterrupt:
            task.cancel()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    chained = [number for number, handler in before.items() if callable(handler)]
    for number in chained:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in chained:
            signal.signal(number, before[number])


def _reports(
    settings: FleetSettings, transitions: TransitionLog, observer: Observer | None
) -> Iterator[Recorder]:
    """Yield a recorder that reports the progress to *observer* a few times a second."""
    if observer is None:
        return
    loop, reported = asyncio.get_running_loop(), 0.0

    def report(_: StoredRecord) -> None:
        nonlocal reported
        if transitions.messages % MESSAGES_BETWEEN_REPORTS or time.perf_counter() - reported < PROGRESS_S:
            return
        reported = time.perf_counter()
        observer(
            FleetProgress(loop.time(), settings.duration_s, transitions.messages, transitions.current_run)
        )

    yield report


class SimulatedFleet:
    """A fleet on an in-memory bus. Open it with `open`, on a virtual loop."""

    def __init__(self, settings: FleetSettings, server: MemoryServer, directory: Path) -> None:
        self.settings = settings
        self.server = server
        self.task = settings.task
        self.board = TrainingBoard()
        profile = settings.profile or Profile(groups={"all": Group()})
        self.conditions = Conditions(profile, settings.client_names, seed=settings.seed)
        self.store = fleet_model_store(directory)
        self.launcher = FleetLauncher(server, settings, self.conditions, self.board, self.store)
        code = DirectoryCodeRepository(Path(self.task.path), open_library)
        self._code = code
        self.devices = {
            client: SimulatedDevice(client, server, settings, self.conditions, self.board, code)
            for client in settings.client_names
        }
        self.server_manager = SupervisedAgent("server manager", self._run_server_manager)
        self.schedulers = [
            SupervisedAgent(f"workflow scheduler {number}", self._run_scheduler)
            for number in range(settings.schedulers)
        ]
        self.flower_server = SupervisedAgent("flower server", self._run_flower_server)
        self._timers: list[asyncio.TimerHandle] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: FleetSettings, recorders: list[Recorder]
    ) -> AsyncIterator["SimulatedFleet"]:
        """Open a fleet whose stored messages go to *recorders*; its agents are stopped at the end."""

        def record(stored: StoredRecord) -> None:
            for recorder in recorders:
                recorder(stored)

        with (
            tempfile.TemporaryDirectory(prefix="fedbus-fleet-") as directory,
            MemoryServer(f"fleet-{next(_NUMBERS)}", history=EVENT_HISTORY) as server,
            quiet_agents(),
            rare_garbage_collections(),
        ):
            server.on_stored = record
            fleet = cls(settings, server, Path(directory))
            try:
                yield fleet
            finally:
                await fleet.stop()

    # --- start and stop -------------------------------------------------------------------------------

    @property
    def agents(self) -> list[SupervisedAgent]:
        """All agents, those of the server side first."""
        own = [self.flower_server, self.server_manager, *self.schedulers]
        return own + [agent for device in self.devices.values() for agent in device.agents]

    @property
    def restarts(self) -> int:
        return sum(agent.restarts for agent in self.agents)

    def start(self) -> None:
        """Start the server side now, and the devices over the time of the settings."""
        for agent in (self.flower_server, self.server_manager, *self.schedulers):
            agent.start()
        loop = asyncio.get_running_loop()
        for device in self.devices.values():
            at = loop.time() + clock.uniform(0.0, self.settings.start_within_s)
            self._timers.append(loop.call_at(at, device.start))
            self._follow_connection(device)

    def _follow_connection(self, device: SimulatedDevice) -> None:
        """Connect and disconnect *device* at the times of the profile."""
        loop = asyncio.get_running_loop()
        is_linked = self.conditions.is_connected(device.client, loop.time())
        if is_linked != device.is_linked:
            device.set_linked(is_linked=is_linked)
        change = self.conditions.next_change(device.client, loop.time())
        if change < self.settings.duration_s:
            loop.call_at(max(change, loop.time() + 1e-3), self._follow_connection, device)

    async def stop(self) -> None:
        """End all agents at once; none of them reports its end."""
        for timer in self._timers:
            timer.cancel()
        self.server.on_stored = None
        for agent in self.agents:
            await agent.crash()

    async def read_runs(self, log: TransitionLog) -> list[FleetRun]:
        """Read the runs from the stream; *log* has counted their trainings."""
        async with connect_agent(self.server, Identity(FEDERATION, AgentName.USER, "people")) as bus:
            stored = await bus.last_transitions(RUN.kind)
        start_s = self.settings.starts_at.timestamp()
        found = []
        for one in stored:
            transition = one.message
            if not isinstance(transition, Transition) or not isinstance(transition.facts, RunData):
                continue
            facts = transition.facts
            is_over = transition.target in RUN.final
            trainings, failures = log.trainings.get(facts.run, (0, 0))
            found.append(
                FleetRun(
                    run=facts.run,
                    state=transition.target,
                    reason=transition.reason,
                    requested_at_s=facts.requested_at.timestamp() - start_s,
                    ended_at_s=one.envelope.time.timestamp() - start_s if is_over else None,
                    rounds=sum(result.round > 0 for result in facts.rounds),
                    joined=len(facts.cohort),
                    trainings=trainings,
                    failures=failures,
                )
            )
        return sorted(found, key=lambda run: run.requested_at_s)

    # --- the server side ------------------------------------------------------------------------------

    async def _run_server_manager(
        self, stop: asyncio.Event, on_connected: Callable[[FleetBus], None]
    ) -> None:
        async with connect_agent(self.server, Identity(FEDERATION, AgentName.SERVER_MANAGER)) as bus:
            on_connected(bus)
            await ServerManager(bus, self.task, self.store, code=self._code).run(stop)

    async def _run_scheduler(self, stop: asyncio.Event, on_connected: Callable[[FleetBus], None]) -> None:
        async with connect_agent(self.server, Identity(FEDERATION, AgentName.WORKFLOW_SCHEDULER)) as bus:
            on_connected(bus)
            await WorkflowScheduler(
                bus,
                self.task,
                overrides=self.settings.run_overrides,
                schedule=self.settings.schedule_overrides,
                code=self._code,
            ).run(stop)

    async def _run_flower_server(self, stop: asyncio.Event, on_connected: Callable[[FleetBus], None]) -> None:
        config = ProcessConfig(nats_url=self.server.url, federation=FEDERATION, task=self.task)
        async with connect_agent(self.server, Identity(FEDERATION, AgentName.FLOWER_SERVER)) as bus:
            on_connected(bus)
            await SimulatedFlowerServer(
                bus, config, self.store, logs=Path(), code=self._code, launcher=self.launcher
            ).run(stop)


@contextmanager
def quiet_agents() -> Iterator[None]:
    """Drop the log lines of the agents for the duration of the block: a fleet would write thousands a second."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False
    )
    try:
        yield
    finally:
        structlog.configure(**before)
