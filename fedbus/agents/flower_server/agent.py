"""The Flower server wrapper: runs the task's own code on the server side, in processes of its own.

One process builds the initial model; one runs the ServerApp of a run, from `server_started` to
`run_finished` or `run_failed`, and gives all its memory back by ending. What the process does
itself stands in `server_process`; here it is started, watched and stopped. A process that goes
without a word is told of as `server_lost`.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

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
from fedbus.contracts.message import Body, RefusalKind, Refused, Request
from fedbus.contracts.model import Artifact
from fedbus.contracts.server import (
    FindServer,
    InitModel,
    ModelInitialised,
    ServerData,
    ServerFound,
    ServerLost,
    ServerStarting,
    ServerState,
    ServerStopped,
    StartServer,
    StopServer,
)
from fedbus.contracts.situations import ServerRecruiting, ServerTraining, server_situation
from fedbus.stores.code.open import CodeRejected, CodeRepository, DirectoryCodeRepository
from fedbus.stores.errors import StoreCorrupt, StoreError
from fedbus.stores.models.open import ModelStore

GRID_AGENT = AgentName.FLOWER_SERVER_GRID

log = structlog.get_logger("fedbus.flower_server")


@dataclass(frozen=True)
class RunningServer:
    run: str
    watch: "asyncio.Task[None]"
    stop: asyncio.Event


@log_method_calls
class FlowerServer:
    """Starts and ends the processes that run the task's server-side code. Logs go to *logs*.

    *launcher*: where the ServerApps of runs are at work; left out: in child processes.
    """

    def __init__(
        self,
        bus: Bus,
        order: ProcessConfig,
        models: ModelStore,
        *,
        logs: Path,
        code: CodeRepository | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._bus = bus
        self._config = order
        self._models = models
        self._code = code or DirectoryCodeRepository(Path(order.task.path))
        self._logs = logs
        self._launcher = launcher or ChildLauncher(logs)
        self._running: RunningServer | None = None
        self._group: asyncio.TaskGroup
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until *stop* is set; a run under way then is taken up by the next Flower server."""
        answers: dict[type[Request], Handler] = {
            InitModel: self._init_model,
            StartServer: self._start,
            StopServer: self._stop,
            FindServer: self._find,
            CheckCode: self._check_code,
        }
        await self._bus.create_streams()
        await self._launcher.sweep()
        async with asyncio.TaskGroup() as self._group:
            async with self._bus.serve(answers, task=self._config.task.id, version=__version__):
                await self._report_orphaned_run()
                self.ready.set()
                await stop.wait()
            await self._stop_running()

    async def _config_at(self, version: str) -> ProcessConfig:
        """The order for the task's code at *version*; empty: as it was when we started. Raises StoreError."""
        if version in ("", self._config.task.code_version):
            return self._config
        return self._config.model_copy(update={"task": await self._code.task_at(version)})

    async def _check_code(self, request: CheckCode) -> Body:
        """Import the code and build its model in a process, beside whatever runs."""
        try:
            at = await self._config_at(request.code_version)
            like = str(await self._models.path_of(request.like)) if request.like else ""
            order = CheckProcessConfig(**dict(at), like=like, server_side=True)
            return await check(order, log_file=self._logs / "check.log")
        except (CodeRejected, CheckFailed) as error:
            return Refused(reason=str(error))
        except StoreError as error:  # which says nothing of the code
            return Refused(reason=str(error), kind=RefusalKind.RETRYABLE)

    async def _init_model(self, request: InitModel) -> Body:
        """Build the model in a process: torch is loaded there and gone with it."""
        try:
            at = await self._config_at(request.code_version)
            builder = ChildProcess(
                "model builder",
                *child_command("init"),
                environment=InitProcessConfig(**dict(at), store=self._models.url).environment(),
                output=self._logs / "init.log",
            )
            async with builder:
                code = await builder.ended()
        except (StoreError, ChildNotStarted) as error:
            return Refused(reason=str(error))
        if code != 0 or not builder.answer:
            why = builder.answer or f"the process that builds it {builder.describe_exit()}"
            return Refused(reason=f"the first model was not built: {why}")
        return ModelInitialised(artifact=Artifact.model_validate_json(builder.answer))

    async def _start(self, request: StartServer) -> Body:
        await self._stop_running()  # who opens a run is done with the one before
        await self._bus.forget(
            GRID_AGENT, task=self._config.task.id
        )  # what was said to an earlier run's server
        try:
            await self._check_model_available(request.artifact)
            at = await self._config_at(request.code_version)
        except CodeRejected as error:
            return Refused(reason=str(error))
        except StoreError as error:
            is_damaged = isinstance(error, StoreCorrupt)
            kind = RefusalKind.NEEDS_OPERATOR if is_damaged else RefusalKind.RETRYABLE
            return Refused(reason=str(error), kind=kind)
        order = ServerProcessConfig(
            **dict(at),
            run=request.run,
            plan=request.plan,
            first_round=request.first_round,
            initial_sha256=request.artifact.sha256,
            store=self._models.url,
        )
        stop = asyncio.Event()
        watch = self._group.create_task(
            self._supervise_run(order, stop), name=f"Flower server of {request.run}"
        )
        self._running = RunningServer(request.run, watch, stop)
        return ServerStarting()

    async def _check_model_available(self, artifact: Artifact) -> None:
        """Whether a run can begin with this model is seen before its process is; raises StoreError.

        A ServerApp elsewhere fetches it for itself.
        """
        if self._launcher.shares_files:
            await self._models.path_of(artifact.sha256)

    async def _stop(self, request: StopServer) -> Body:
        if self._running is not None and self._running.run == request.run:
            await self._stop_running()
        return ServerStopped()

    async def _find(self, request: FindServer) -> Body:
        running = self._running
        up = running is not None and running.run == request.run and not running.watch.done()
        if request.say_so and not up:
            await self._report_lost(request.run, "the Flower server is gone")
        return ServerFound(up=up)

    async def _report_orphaned_run(self) -> None:
        """A Flower server that ran when we ended has ended with us, and nobody has said so."""
        for server in await self._bus.states("server", self._config.task.id):
            assert isinstance(server.facts, ServerData)
            match server_situation(ServerState(server.target), server.facts):
                case ServerRecruiting() | ServerTraining() as under_way:
                    with tracing.use_trace(under_way.traceparent):
                        await self._report_lost(under_way.run, "the flower-server agent was restarted")
                case _:
                    pass

    async def _stop_running(self) -> None:
        if self._running is not None:
            self._running.stop.set()
            await self._running.watch
            self._running = None

    async def _supervise_run(self, order: ServerProcessConfig, stop: asyncio.Event) -> None:
        """The life of one run's server; its end without a word is told."""
        if lost := await self._launcher.run(order, stop):
            await self._report_lost(order.run, lost)

    async def _report_lost(self, run: str, reason: str) -> None:
        log.warning("the Flower server is lost", run=run, reason=reason)
        await self._bus.publish(ServerLost(task=self._config.task.id, run=run, reason=reason[:500]))
