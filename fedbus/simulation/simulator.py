"""Runs a simulation: the server side of the task in this thread, its clients in the workers of an engine."""

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from fedbus.contracts.run import RoundResult
from fedbus.learning.client_selection import ClientSelection
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import MessengerClosed, ServerJob, SummingLibrary
from fedbus.learning.seeding import seed_server
from fedbus.learning.task_model import first_arrays
from fedbus.learning.weights import Arrays
from fedbus.simulation.engine import SimulationEngine, WorkerJob
from fedbus.simulation.gpus import place_workers
from fedbus.simulation.local.engine import LocalEngine
from fedbus.simulation.memory import PeakMemory
from fedbus.simulation.messenger import SimulationMessenger
from fedbus.simulation.observer import SilentObserver, SimulationObserver, SimulationStart
from fedbus.simulation.profiles.conditions import Conditions
from fedbus.simulation.profiles.reader import load_profile
from fedbus.simulation.ray.engine import RayEngine
from fedbus.simulation.settings import BadSettings, SimulationResult, SimulationSettings
from fedbus.simulation.virtual_time import VirtualTime

SUPERLINK: Final = "flower-superlink"


def simulate(settings: SimulationSettings, observer: SimulationObserver | None = None) -> SimulationResult:
    """Simulate a run, in this thread. Call it in the main thread: the task's server side may need it.

    Raises:
        BadSettings: the settings are invalid.
        BadTask: the task's code cannot be imported.
        LibraryUnusable: the task's training library is not installed.
        TrainingFailed: the run cannot continue.
        BadWeights: the model does not fit the app.
        EngineFailed: the workers cannot be started, or there is no memory for the weights.

    """
    return _Simulation(settings, observer or SilentObserver()).run()


class _Simulation:
    def __init__(self, settings: SimulationSettings, observer: SimulationObserver) -> None:
        check_library(settings.task.table.library)
        self._settings = settings
        self._observer = observer
        self._plan = settings.plan
        self._start = time.monotonic()
        self._virtual_time = make_virtual_time(settings)
        self._rounds: list[RoundResult] = []
        self._model: Arrays = {}
        self._memory = PeakMemory(lambda: ())

    def run(self) -> SimulationResult:
        with ExitStack() as stack:
            state_dir = self._settings.state_dir or Path(
                stack.enter_context(TemporaryDirectory(prefix="fedbus-simulation-"))
            )
            engine = make_engine(self._settings, self._make_worker_job(state_dir))
            self._memory = PeakMemory(engine.processes)
            is_complete = False
            try:
                engine.start()
                result = self._train(engine)
                is_complete = True
            finally:
                engine.close(at_once=not is_complete)
        return result

    def _train(self, engine: SimulationEngine) -> SimulationResult:
        settings, plan = self._settings, self._plan
        messenger = SimulationMessenger(
            engine,
            run=settings.run,
            plan=plan,
            clients=settings.client_names,
            observer=self._observer,
            is_deterministic=settings.deterministic,
            adds_updates=isinstance(open_library(settings.task.table.library), SummingLibrary),
            virtual=self._virtual_time,
        )
        seed_server(plan.seed, first_round=settings.first_round)
        model = settings.model if settings.model is not None else first_arrays(settings.task) or {}
        job = ServerJob(
            task=settings.task,
            run=settings.run,
            plan=plan,
            model=model,
            first_round=settings.first_round,
            selection=make_selection(settings),
        )
        seed_server(plan.seed, first_round=settings.first_round)  # building a model has drawn numbers
        session = open_library(settings.task.table.library).open_server(job)
        started = messenger.now()
        try:
            self._observer.on_start(
                SimulationStart(
                    run=settings.run,
                    plan=plan,
                    clients=settings.clients,
                    workers=engine.workers,
                    first_round=settings.first_round,
                )
            )
            final = session.run(messenger, self._on_round)
            self._memory.measure(now=True)
        except MessengerClosed:
            if messenger.failure is not None:
                raise messenger.failure from None
            raise
        finally:
            messenger.close("the simulation is over")
            messenger.join()
            session.close()
        return SimulationResult(
            rounds=self._rounds,
            model=self._model if final is None else final,
            seconds=time.monotonic() - self._start,
            simulated_s=messenger.now() - started,
            peak_memory_bytes=self._memory.peak_bytes,
            lost_workers=messenger.lost_workers,
        )

    def _on_round(self, result: RoundResult, arrays: Arrays) -> None:
        self._memory.measure()
        self._rounds.append(result)
        self._model = arrays
        self._observer.on_round(result, arrays)

    def _make_worker_job(self, state_dir: Path) -> WorkerJob:
        settings = self._settings
        return WorkerJob(
            task=settings.task,
            run=settings.run,
            plan=self._plan,
            clients=settings.clients,
            node_config=settings.shared_node_config,
            seed=settings.seed,
            state_dir=state_dir,
            memory_share=settings.memory_share,
        )


def check_library(library: str) -> None:
    """Refuse a library whose clients are processes of their own. Raises BadSettings."""
    if library == SUPERLINK:
        raise BadSettings(
            f"a task of the library {SUPERLINK!r} cannot be simulated: SuperNodes run its clients, outside fedbus. "
            'Its app runs unmodified with library = "flower" in [tool.fedbus]'
        )


def make_selection(settings: SimulationSettings) -> ClientSelection:
    """Return the selection of the clients of a round: a random cohort, else as the task selects without history."""
    table = settings.task.table.selection
    if settings.cohort is None:
        weights = None if table.weigh_by == "samples" else dict[str, float]()
        return ClientSelection(max_clients=table.clients, explore=table.explore, weights=weights)
    selection = ClientSelection(max_clients=settings.cohort, is_random=True, seed=settings.seed)
    selection.begin_at(settings.first_round)
    return selection


def make_virtual_time(settings: SimulationSettings) -> VirtualTime | None:
    """Return the clock of a simulation with a profile; None without one. Raises ProfileError."""
    if settings.profile is None:
        return None
    clients = settings.client_names
    profile = load_profile(settings.profile) if isinstance(settings.profile, Path | str) else settings.profile
    return VirtualTime(Conditions(profile, clients, seed=settings.seed), clients)


def make_engine(settings: SimulationSettings, job: WorkerJob) -> SimulationEngine:
    """Make the engine that the settings name; it is not started. Raises BadSettings."""
    if settings.engine == "local":
        return LocalEngine(
            job,
            workers=settings.worker_count,
            environments=place_workers(settings.worker_count, settings.gpus),
            log_file=settings.log_file,
        )
    return RayEngine(
        job,
        address=settings.ray_address,
        workers=settings.workers,
        gpus=len(settings.gpus),
        is_quiet=settings.log_file is not None,
    )
