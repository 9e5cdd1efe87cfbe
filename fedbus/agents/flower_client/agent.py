"""The Flower client: trains a run in a child process, and owns the FL client's lifecycle.

    waiting –client_start→ pending –round_started→ training –run_finished→ finished –reported→ waiting

The child process exists for one run, and releases all its memory when it ends. Its code is in
`client_app_process`. If it dies, this agent publishes `fail_train` at once, and the run continues without this
client.
"""

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Final

import structlog

from fedbus.agents.common.asyncio_tools import handle_each, run_until
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.flower_client.trainer import TrainerLauncher
from fedbus.bus.bus import Bus
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore, TransitionOutbox
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import (
    FL_CLIENT,
    ClientStart,
    FailTrain,
    FinTrain,
    FlClientChanges,
    FlClientData,
    FlClientEvent,
    FlClientState,
    Heartbeat,
    RoundStarted,
)
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import Message
from fedbus.contracts.server import ServerClosed
from fedbus.contracts.situations import (
    FlClientFinished,
    FlClientPending,
    FlClientSituation,
    FlClientTraining,
    FlClientWaiting,
    fl_client_situation,
)
from fedbus.contracts.task.task import Task

HEARTBEAT_S: Final = 2.0
STOP_REPORT_S: Final = 5.0
MAX_CLOSED_RUNS: Final = 100

log = structlog.get_logger("fedbus.flower_client")


@dataclass(frozen=True)
class _Training:
    task: "asyncio.Task[None]"
    stop: asyncio.Event


@log_method_calls
class FlowerClient:
    """The agent that trains for one client in one task; *launcher* runs the training processes."""

    def __init__(
        self,
        bus: Bus,
        task: Task,
        client: ClientId,
        *,
        launcher: TrainerLauncher,
        outbox: TransitionOutbox,
    ) -> None:
        self._bus = bus
        self._task = task
        self._client = client
        self._launcher = launcher
        self._outbox = outbox
        self._decision_lock = asyncio.Lock()
        self._training: _Training | None = None
        self._closed_runs: deque[str] = deque(maxlen=MAX_CLOSED_RUNS)
        self._lifecycle: LifecycleHandle[FlClientState, FlClientEvent, FlClientData, FlClientChanges]
        self._group: asyncio.TaskGroup
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Train on request until *stop* is set. Then leave an active run and publish `fail_train`."""
        async with (
            LifecycleStore.open(self._bus, self._outbox) as lifecycles,
            self._bus.consume(AgentName.FLOWER_CLIENT, task=self._task.id) as inbox,
            asyncio.TaskGroup() as self._group,
        ):
            await self._resume(lifecycles)
            self.ready.set()
            await run_until(stop, handle_each(inbox, self._on_message))
            with contextlib.suppress(
                TimeoutError
            ):  # NATS is unavailable: the server notices the missing heartbeats
                async with asyncio.timeout(STOP_REPORT_S), self._decision_lock:
                    await self._fail("the client was stopped")

    async def _resume(self, lifecycles: LifecycleStore) -> None:
        self._lifecycle = await lifecycles.load(
            FL_CLIENT, FlClientData(task=self._task.id, client=self._client)
        )
        match self._situation:
            case FlClientPending() | FlClientTraining():
                await self._fail("the FL client was restarted")
            case FlClientFinished(run=run):
                await self._report(run, rounds=0)
            case FlClientWaiting():
                if not self._lifecycle.exists:
                    await self._lifecycle.create()

    # --- messages ------------------------------------------------------------------------

    async def _on_message(self, message: Message) -> None:
        async with self._decision_lock:
            match message:
                case ClientStart():
                    await self._start(message)
                case RoundStarted() if self._state is FlClientState.PENDING and message.run == self._run:
                    await self._lifecycle.transition(FlClientEvent.ROUND_STARTED)
                case ServerClosed():
                    self._closed_runs.append(message.run)
                    if message.run == self._run:
                        await self._on_run_closed(message)
                case _:
                    log.debug("Ignoring message", message=message.name, state=str(self._state))

    async def _start(self, start: ClientStart) -> None:
        if start.run == self._run:
            return  # a repeated request, for example of a restarted client manager
        if self._state is not FlClientState.WAITING:
            await self._report_failure(start.run, f"this client is busy with {self._run}")
            return
        if start.run in self._closed_runs:  # the request was delayed until after the end of the run
            await self._report_failure(start.run, "the run is over")
            return
        await self._lifecycle.transition(FlClientEvent.CLIENT_START, {"run": start.run})
        stop = asyncio.Event()
        task = self._group.create_task(self._supervise_training(start, stop), name=f"trainer of {start.run}")
        self._training = _Training(task, stop)

    async def _on_run_closed(self, closed: ServerClosed) -> None:
        """Stop the process first, so that its memory is free before the event is published."""
        if self._state is FlClientState.TRAINING and closed.outcome == "finished":
            await self._lifecycle.transition(FlClientEvent.RUN_FINISHED)
            await self._stop_training()
            await self._report(closed.run, closed.rounds, new_model=closed.new_model)
        else:
            await self._fail(f"the run {closed.outcome}: {closed.reason or 'before it needed this client'}")

    async def _report(self, run: str, rounds: int, *, new_model: bool = True) -> None:
        await self._bus.publish(
            FinTrain(task=self._task.id, client=self._client, run=run, rounds=rounds, new_model=new_model)
        )
        await self._lifecycle.transition(FlClientEvent.REPORTED, {"run": None})

    async def _fail(self, reason: str, *, trainer_lost: bool = False, load_failed: bool = False) -> None:
        """Leave the run and publish `fail_train`. Without a run, do nothing.

        The transition is last: if the process ends before the message is stored, the next one publishes it.
        """
        match self._situation:
            case FlClientPending(run=run) | FlClientTraining(run=run):
                await self._stop_training()
                await self._report_failure(run, reason, trainer_lost=trainer_lost, load_failed=load_failed)
                await self._lifecycle.transition(FlClientEvent.FAILED, {"run": None}, reason=reason)
            case FlClientWaiting() | FlClientFinished():
                return

    async def _report_failure(
        self, run: str, reason: str, *, trainer_lost: bool = False, load_failed: bool = False
    ) -> None:
        await self._bus.publish(
            FailTrain(
                task=self._task.id,
                client=self._client,
                run=run,
                reason=reason[:500],
                trainer_lost=trainer_lost,
                load_failed=load_failed,
            )
        )

    # --- the process -----------------------------------------------------------------------

    async def _supervise_training(self, start: ClientStart, stop: asyncio.Event) -> None:
        """Run one training process. If it ends by itself, only this client fails."""
        end = await self._launcher.run(start, stop, lambda: self._send_heartbeats(start.run))
        if not stop.is_set():
            async with self._decision_lock:
                await self._fail(end.reason, trainer_lost=True, load_failed=end.load_failed)

    async def _send_heartbeats(self, run: str) -> None:
        """Publish heartbeats. The training process cannot: torch may block it for long."""
        while True:
            await self._bus.publish(Heartbeat(task=self._task.id, client=self._client, run=run))
            await asyncio.sleep(HEARTBEAT_S)

    async def _stop_training(self) -> None:
        training, self._training = self._training, None
        if training is not None and training.task is not asyncio.current_task():
            training.stop.set()
            await training.task

    @property
    def _state(self) -> FlClientState:
        return self._lifecycle.state

    @property
    def _situation(self) -> FlClientSituation:
        return fl_client_situation(self._lifecycle.state, self._lifecycle.data)

    @property
    def _run(self) -> str | None:
        return self._lifecycle.data.run
