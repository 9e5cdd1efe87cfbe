"""The Flower server: runs the task's own code on the server side, in child processes or Kubernetes Jobs.

One process builds the initial model. Another runs the server session of a run, from `server_started` to `run_finished`
or `run_failed`, and releases all its memory when it ends; its code is in `server_app_process`. This agent starts,
supervises and stops these processes. It publishes `server_lost` for a process that ends without reporting its end.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from fedbus import __version__
from fedbus.agents.common import tracing
from fedbus.agents.common.child_process import ChildNotStarted, ChildProcess
from fedbus.agents.common.code_check import CheckFailed, check
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.common.process_orders import (
    CheckProcessConfig,
    InitProcessConfig,
    ProcessConfig,
    ServerProcessConfig,
    child_command,
)
from fedbus.agents.flower_server.launcher import ChildLauncher, Launcher
from fedbus.bus.bus import Bus, Handler
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.code import CheckCode
from fedbus.contracts.flower_server import (
    FindServer,
    InitModel,
    ModelInitialised,
    ServerFound,
    ServerLost,
    ServerStarting,
    ServerStopped,
    StartServer,
    StopServer,
)
from fedbus.contracts.message import Body, RefusalKind, Refused, Request
from fedbus.contracts.model import Artifact
from fedbus.contracts.server import SERVER, ServerData, ServerState
from fedbus.contracts.situations import ServerRecruiting, ServerTraining, server_situation
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRejected, CodeRepository, DirectoryCodeRepository
from fedbus.stores.errors import StoreCorrupt, StoreError
from fedbus.stores.models.open import ModelStore

MAX_STOPPED_RUNS: Final = 100

log = structlog.get_logger("fedbus.flower_server")


@dataclass(frozen=True)
class RunningServer:
    request: StartServer
    task: "asyncio.Task[None]"
    stop: asyncio.Event
    ended: asyncio.Event
    """Set when the session has ended, before its loss is reported: the question whether it runs may come before the
    acknowledgement of the report."""

    def runs(self, run: str) -> bool:
        return self.request.run == run and not self.ended.is_set()


@log_method_calls
class FlowerServer:
    """The agent that runs the server-side code of one task. The processes write their logs to *logs*.

    *launcher* runs the server sessions; the default is child processes.
    """

    def __init__(
        self,
        bus: Bus,
        config: ProcessConfig,
        models: ModelStore,
        *,
        logs: Path,
        code: CodeRepository | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._bus = bus
        self._config = config
        self._models = models
        self._code = code or DirectoryCodeRepository(Path(config.task.path), open_library)
        self._logs = logs
        self._launcher = launcher or ChildLauncher(logs)
        self._running: RunningServer | None = None
        self._stopped_runs: deque[str] = deque(maxlen=MAX_STOPPED_RUNS)
        """The runs that are over, also if a request to start them is still handled or on its way."""
        self._group: asyncio.TaskGroup
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve requests until *stop* is set. The next Flower server resumes a run that is active then."""
        handlers: dict[type[Request[Body]], Handler] = {
            InitModel: self._init_model,
            StartServer: self._start,
            StopServer: self._stop,
            FindServer: self._find,
            CheckCode: self._check_code,
        }
        await self._bus.create_streams()
        await self._launcher.remove_orphans()
        async with asyncio.TaskGroup() as self._group:
            async with self._bus.serve(handlers, task=self._config.task.id, version=__version__):
                await self._report_orphaned_run()
                self.ready.set()
                await stop.wait()
            await self._stop_running()

    async def _config_at(self, version: str) -> ProcessConfig:
        """Return the configuration with the task's code at *version*; "" is the version at start. Raises StoreError."""
        if version in ("", self._config.task.code_version):
            return self._config
        return self._config.model_copy(update={"task": await self._code.load_task(version)})

    async def _check_code(self, request: CheckCode) -> Body:
        """Import the code and build its model in a child process, without effect on a run."""
        try:
            config = await self._config_at(request.code_version)
            like = str(await self._models.local_path(request.like)) if request.like else ""
            check_config = CheckProcessConfig(**dict(config), like=like, server_side=True)
            return await check(check_config, log_file=self._logs / "check.log")
        except (CodeRejected, CheckFailed) as error:
            return Refused(reason=str(error))
        except StoreError as error:  # not a fault of the code
            return Refused(reason=str(error), kind=RefusalKind.RETRYABLE)

    async def _init_model(self, request: InitModel) -> Body:
        """Build the initial model in a child process, which imports torch and releases its memory at its end."""
        try:
            config = await self._config_at(request.code_version)
            builder = ChildProcess(
                "model builder",
                *child_command("init"),
                environment=InitProcessConfig(**dict(config), store=self._models.url).environment(),
                output=self._logs / "init.log",
            )
            async with builder:
                exit_code = await builder.wait()
        except (StoreError, ChildNotStarted) as error:
            return Refused(reason=str(error))
        if exit_code != 0 or not builder.answer:
            reason = builder.answer or f"the process {builder.describe_exit()}"
            return Refused(reason=f"cannot build the initial model: {reason}")
        return ModelInitialised(artifact=Artifact.model_validate_json(builder.answer))

    async def _start(self, request: StartServer) -> Body:
        running = self._running
        if running is not None and running.request == request and running.runs(request.run):
            return ServerStarting()  # a repeated request, whose first reply came too late
        await self._stop_running()  # a new run ends the previous one
        await self._bus.delete_consumer(
            AgentName.FLOWER_SERVER_GRID, task=self._config.task.id
        )  # drops messages to an earlier run's server
        try:
            await self._check_model_available(request.artifact)
            config = await self._config_at(request.code_version)
        except CodeRejected as error:
            return Refused(reason=str(error))
        except StoreError as error:
            is_corrupt = isinstance(error, StoreCorrupt)
            kind = RefusalKind.NEEDS_OPERATOR if is_corrupt else RefusalKind.RETRYABLE
            return Refused(reason=str(error), kind=kind)
        server_config = ServerProcessConfig(
            **dict(config),
            run=request.run,
            plan=request.plan,
            first_round=request.first_round,
            initial_sha256=request.artifact.sha256,
            store=self._models.url,
        )
        if request.run in self._stopped_runs:
            return Refused(reason=f"{request.run} was stopped")
        stop, ended = asyncio.Event(), asyncio.Event()
        task = self._group.create_task(
            self._supervise_run(server_config, stop, ended), name=f"Flower server of {request.run}"
        )
        self._running = RunningServer(request, task, stop, ended)
        return ServerStarting()

    async def _check_model_available(self, artifact: Artifact) -> None:
        """Raise StoreError if the model of a run is not available, before its process starts.

        A session without access to this machine's files checks the model itself.
        """
        if self._launcher.has_shared_files:
            await self._models.local_path(artifact.sha256)

    async def _stop(self, request: StopServer) -> Body:
        self._stopped_runs.append(request.run)
        if self._running is not None and self._running.request.run == request.run:
            await self._stop_running()
        return ServerStopped()

    async def _find(self, request: FindServer) -> Body:
        running = self._running
        up = running is not None and running.runs(request.run)
        if request.say_so and not up:
            await self._report_lost(request.run, "the Flower server does not run")
        return ServerFound(up=up)

    async def _report_orphaned_run(self) -> None:
        """Report the run of the previous agent process as lost: its child process has ended with it."""
        for server in await self._bus.current_states(SERVER.kind, self._config.task.id):
            assert isinstance(server.facts, ServerData)
            match server_situation(ServerState(server.target), server.facts):
                case ServerRecruiting() | ServerTraining() as situation:
                    with tracing.use_trace(situation.traceparent):
                        await self._report_lost(situation.run, "the flower-server agent was restarted")
                case _:
                    pass

    async def _stop_running(self) -> None:
        if (running := self._running) is not None:
            running.stop.set()
            await running.task
            if self._running is running:
                self._running = None

    async def _supervise_run(
        self, config: ServerProcessConfig, stop: asyncio.Event, ended: asyncio.Event
    ) -> None:
        """Run one server session, and report it if it is lost."""
        reason = await self._launcher.run(config, stop)
        ended.set()
        if reason:
            await self._report_lost(config.run, reason)

    async def _report_lost(self, run: str, reason: str) -> None:
        log.warning("Flower server lost", run=run, reason=reason)
        await self._bus.publish(ServerLost(task=self._config.task.id, run=run, reason=reason[:500]))
