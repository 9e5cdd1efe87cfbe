"""The simulated server sessions of a fleet: rounds whose exchanges take the times of the profile."""

import asyncio
import hashlib
import json
import math
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from fedbus.agents.common.process_orders import ServerProcessConfig
from fedbus.bus.bus import Bus, Delivery, Identity
from fedbus.bus.errors import BusUnreachable
from fedbus.bus.memory.server import MemoryServer
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.causation import set_current_cause
from fedbus.contracts.client import ClientJoined, FailTrain
from fedbus.contracts.flower_server import BeginTraining, RoundFinished, RunFailed, RunFinished, ServerStarted
from fedbus.contracts.model import Artifact
from fedbus.contracts.run import MAX_REPORTED_CLIENTS, RoundResult, RunPlan, shorten_reasons
from fedbus.simulation.fleet.bus import connect_agent
from fedbus.simulation.fleet.settings import DEFAULT_ROUNDS, FEDERATION, FleetSettings
from fedbus.simulation.fleet.training import TrainingBoard
from fedbus.simulation.profiles.conditions import Conditions
from fedbus.stores.models.open import ModelStore

ARCHITECTURE: Final = hashlib.sha256(b"simulated").hexdigest()
START_LOSS: Final = 2.3
LOSS_DECAY: Final = 0.05
TICK_S: Final = 1e-6
"""The resolution of virtual time."""


async def store_generation(store: ModelStore, generation: int, origin: str) -> Artifact:
    """Store the model after *generation* rounds, which has no weights."""
    content = json.dumps({"generation": generation, "origin": origin}).encode()
    return Artifact(sha256=await store.put([content]), size_bytes=len(content), architecture=ARCHITECTURE)


async def read_generation(store: ModelStore, sha256: str) -> int:
    """Return how many rounds a model was trained for."""
    return int(json.loads((await store.local_path(sha256)).read_bytes())["generation"])


@dataclass
class SessionFaults:
    """What goes wrong in server sessions."""

    load_error: str = ""
    """The app cannot be loaded, for this reason: the run fails."""
    load_s: float | None = None
    """The time to load the app, instead of that of the settings."""


@dataclass
class _ScheduledReply:
    """The reply of one client, at a time of the loop's clock."""

    arrives_at: float
    train_s: float
    error: str = ""


class SimulatedSession:
    """The server session of one run."""

    def __init__(self, bus: Bus, fleet: "FleetLauncher", config: ServerProcessConfig) -> None:
        self._bus = bus
        self._fleet = fleet
        self._config = config
        self._plan: RunPlan = config.plan
        self._nodes: dict[str, None] = {}
        self._failed: set[str] = set()
        self._began: asyncio.Future[BeginTraining] = asyncio.get_running_loop().create_future()
        self._admitted = asyncio.Event()
        """Set when a client joins."""
        self._changed = asyncio.Event()
        """Set when a client fails that has not replied."""
        self._pending: dict[str, _ScheduledReply] = {}
        self._lost: dict[str, str] = {}
        """The failures of the current round, by client."""

    async def run(self) -> None:
        """Load the app, wait for the quorum, run the rounds, and report the end."""
        task, run, faults = self._config.task.id, self._config.run, self._fleet.faults
        self._fleet.board.sessions.append(self)
        try:
            async with self._bus.consume(AgentName.FLOWER_SERVER_GRID, task=task) as inbox:
                consuming = asyncio.ensure_future(self._consume(inbox))
                try:
                    load_s = self._fleet.settings.load_s if faults.load_s is None else faults.load_s
                    await asyncio.sleep(load_s)
                    if faults.load_error:
                        await self._bus.publish(RunFailed(task=task, run=run, reason=faults.load_error))
                        return
                    await self._bus.publish(ServerStarted(task=task, run=run))
                    begin = await self._began
                    self._admit(begin.cohort)
                    await self._train()
                finally:
                    consuming.cancel()
                    with suppress(asyncio.CancelledError):
                        await consuming
        finally:
            self._fleet.board.sessions.remove(self)

    async def _consume(self, inbox: AsyncIterator[Delivery]) -> None:
        async for delivery in inbox:
            match delivery.message:
                case BeginTraining() as begin if begin.run == self._config.run and not self._began.done():
                    self._began.set_result(begin)
                    set_current_cause(delivery.envelope.id)
                case ClientJoined(run=run, client=client) if run == self._config.run:
                    self._failed.discard(client)
                    self._admit((client,))
                case FailTrain(run=run, client=client, reason=reason) if run == self._config.run:
                    self._failed.add(client)
                    self._nodes.pop(client, None)
                    self._lose(client, reason)
                case _:
                    pass
            await delivery.ack()

    def _admit(self, clients: tuple[str, ...]) -> None:
        self._nodes |= dict.fromkeys(clients)
        self._admitted.set()

    def on_silent(self, client: str) -> None:
        self._lose(client, "no heartbeat for 10 s")

    def _lose(self, client: str, reason: str) -> None:
        if self._pending.pop(client, None) is not None:
            self._lost[client] = reason
            self._changed.set()

    # --- rounds ---------------------------------------------------------------------------------------

    async def _train(self) -> None:
        task, run, store = self._config.task.id, self._config.run, self._fleet.store
        total = self._plan.total_rounds or DEFAULT_ROUNDS
        generation = await read_generation(store, self._config.initial_sha256)
        artifact: Artifact | None = None
        for number in range(self._config.first_round, total + 1):
            nodes = await self._wait_for_nodes()
            if not nodes:
                reason = f"no client was connected for {self._plan.round_s:g} s"
                await self._bus.publish(RunFailed(task=task, run=run, reason=reason))
                return
            result = await self._run_round(number, self._choose(nodes, number), generation + 1)
            generation += 1 if result.participants else 0
            artifact = await store_generation(store, generation, f"{run} round {number}")
            finished = RoundFinished(task=task, run=run, round=number, result=result, checkpoint=artifact)
            await self._bus.publish(finished)
        if artifact is None:
            artifact = await store_generation(store, generation, f"{run} without rounds")
        await self._bus.publish(RunFinished(task=task, run=run, artifact=artifact, rounds=total))

    async def _wait_for_nodes(self) -> list[str]:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._plan.round_s):
                while not (nodes := self._present_nodes()):
                    self._admitted.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(1.0):  # a silent client may be back
                            await self._admitted.wait()
                return nodes
        return []

    def _present_nodes(self) -> list[str]:
        board = self._fleet.board
        return [one for one in self._nodes if not board.is_silent(one)]

    def _choose(self, nodes: list[str], number: int) -> list[str]:
        cohort = self._fleet.settings.cohort
        if cohort is None or cohort >= len(nodes):
            return nodes
        choice = random.Random(f"{self._fleet.settings.seed} {self._config.run} {number}")  # noqa: S311
        return sorted(choice.sample(nodes, cohort))

    async def _run_round(self, number: int, cohort: list[str], generation: int) -> RoundResult:
        loop, started = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        deadline = started + self._plan.round_s
        self._lost, self._pending = {}, {}
        exchanges = {client: self._send(client, number, started) for client in cohort}
        self._pending = dict(exchanges)
        while self._pending:
            until = min(deadline, max(one.arrives_at for one in self._pending.values()))
            if until <= loop.time() + TICK_S:
                break
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(until - loop.time()):
                    await self._changed.wait()
        for client, exchange in self._pending.items():
            if exchange.arrives_at > loop.time() + TICK_S:
                self._lost[client] = f"no reply within {self._plan.round_s:g} s"
            elif exchange.error:
                self._lost[client] = exchange.error
        done = [client for client in self._pending if client not in self._lost]
        self._pending = {}
        samples = self._fleet.settings.samples
        reported = done[:MAX_REPORTED_CLIENTS]
        return RoundResult(
            round=number,
            metrics={"loss": START_LOSS * math.exp(-LOSS_DECAY * generation)},
            seconds=loop.time() - started,
            participants=dict.fromkeys(done, samples),
            failures=shorten_reasons(self._lost),
            train_s={client: round(exchanges[client].train_s, 3) for client in reported},
        )

    def _send(self, client: str, number: int, now: float) -> _ScheduledReply:
        """Send a message to *client*, and return when its reply arrives."""
        settings = self._fleet.settings
        trainer = self._fleet.board.trainers.get(client)
        faults = trainer.faults if trainer is not None else None
        train_s = settings.train_s * (faults.slowdown if faults is not None else 1.0)
        index, free_at = self._fleet.next_message(client)
        arrival = self._fleet.conditions.exchange(
            client,
            index,
            sent_at=now,
            download_bytes=settings.model_bytes,
            upload_bytes=settings.model_bytes,
            train_s=train_s,
            samples=settings.samples,
            free_at=free_at,
        )
        self._fleet.record_free(client, arrival.free_at)
        if trainer is not None and trainer.takes_first_message(self._config.run) and not arrival.is_lost:
            self._fleet.begin_later(client, self._config.run, number, arrival.download_s)
        error = faults.training_error if faults is not None else ""
        return _ScheduledReply(arrival.at, arrival.train_s, error)


class FleetLauncher:
    """Runs the server sessions of a fleet; a `Launcher` of the flower server."""

    has_shared_files = True

    def __init__(
        self,
        server: MemoryServer,
        settings: FleetSettings,
        conditions: Conditions,
        board: TrainingBoard,
        store: ModelStore,
    ) -> None:
        self.settings = settings
        self.conditions = conditions
        self.board = board
        self.store = store
        self.faults = SessionFaults()
        self._server = server
        self._sent: dict[str, int] = {}
        self._free_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._crash: asyncio.Future[str] | None = None

    async def run(self, config: ServerProcessConfig, stop: asyncio.Event) -> str:
        """Run a session until it ends or *stop* is set. Returns how it was lost, or ""."""
        self._crash = asyncio.get_running_loop().create_future()
        try:
            return await self._run_connected(config, stop, self._crash)
        except BusUnreachable as error:
            return f"the Flower server cannot connect: {error}"

    async def _run_connected(
        self, config: ServerProcessConfig, stop: asyncio.Event, crash: "asyncio.Future[str]"
    ) -> str:
        async with connect_agent(self._server, Identity(FEDERATION, AgentName.FLOWER_SERVER)) as bus:
            session = asyncio.ensure_future(SimulatedSession(bus, self, config).run())
            stopping = asyncio.ensure_future(stop.wait())
            try:
                ends: list[asyncio.Future[Any]] = [session, stopping, crash]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if crash.done() and not stop.is_set():
                    return crash.result()
                if session.done():
                    session.result()
                return ""
            finally:
                session.cancel()
                stopping.cancel()
                await asyncio.gather(session, stopping, return_exceptions=True)

    async def remove_orphans(self) -> None:
        """Do nothing: a session ends with the flower server."""

    def crash(self, reason: str) -> None:
        """End the current session's process without a report."""
        if self._crash is not None and not self._crash.done():
            self._crash.set_result(f"the Flower server {reason}")

    # --- what sessions share --------------------------------------------------------------------------

    def next_message(self, client: str) -> tuple[int, float]:
        """Return the number of the next message to *client*, and when the client is free for it."""
        index = self._sent.get(client, 0)
        self._sent[client] = index + 1
        return index, self._free_at.get(client, 0.0)

    def record_free(self, client: str, free_at: float) -> None:
        if math.isfinite(free_at):
            self._free_at[client] = free_at

    def begin_later(self, client: str, run: str, number: int, delay_s: float) -> None:
        """Let the trainer of *client* receive its first message of *run* after *delay_s*."""
        asyncio.get_running_loop().call_later(delay_s, self._begin, client, run, number)

    def _begin(self, client: str, run: str, number: int) -> None:
        if (trainer := self.board.trainers.get(client)) is not None:
            task = asyncio.ensure_future(trainer.begin(run, number))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
