"""The process of one run's server side: ``python -m fedbus child server``.

    the app (main thread)  ⇄  its library  ⇄  BusMessenger  ⇄  the loop (another thread)  ⇄  the bus

It publishes `server_started`, waits for the quorum, runs the app, stores the global model after each round, and
ends with `run_finished` or `run_failed`. It exits with 0 after it has published one of them. After any other end,
the Flower server agent publishes `server_lost`.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.child_process import parent_cause, parent_trace
from fedbus.agents.common.main_thread import MainThread
from fedbus.agents.common.process_orders import ServerProcessConfig, read_process_config
from fedbus.bus.bus import Bus, Delivery
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.causation import current_cause, set_current_cause
from fedbus.contracts.client import ClientJoined, FailTrain, Heartbeat, RoundReply
from fedbus.contracts.envelope import uuid7
from fedbus.contracts.flower_server import BeginTraining, RoundFinished, RunFailed, RunFinished, ServerStarted
from fedbus.contracts.model import Artifact
from fedbus.contracts.run import RUN, RoundResult
from fedbus.contracts.task.app import LibraryUnusable
from fedbus.contracts.telemetry import get_tracer
from fedbus.domain.client_scores import collect_client_stats, compute_scores, task_rounds
from fedbus.learning import weights
from fedbus.learning.client_selection import ClientSelection
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import BadTask, MessengerClosed, ServerJob, ServerSession, TrainingFailed
from fedbus.learning.messenger import BusMessenger
from fedbus.learning.seeding import seed_server
from fedbus.learning.weights import Arrays, BadWeights, SafetensorsFile
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import ModelStore, open_model_store

EXPECTED_ERRORS = (BadTask, BadWeights, LibraryUnusable, TrainingFailed, MessengerClosed, StoreError)
"""Errors that end a run with `run_failed`. Any other error is a bug and ends the process."""

TERMINATED_EXIT_CODE: Final = 128 + signal.SIGTERM

log = structlog.get_logger("fedbus.server_app_process")
tracer = get_tracer("fedbus.server_app_process")


async def main(stop: asyncio.Event, main_thread: MainThread) -> int:
    """Run the app of this process's configuration, in the trace of the parent process."""
    config = read_process_config(ServerProcessConfig)
    otel_context.attach(parent_trace())
    set_current_cause(parent_cause())
    async with Bus.connect(
        config.nats_url, config.identity(AgentName.FLOWER_SERVER), access=config.bus_access
    ) as bus:
        await wait_for_first(ServerAppProcess(bus, config, main_thread).run(), stop.wait(), bus.wait_closed())
    # A signal from elsewhere, such as the drain of a Kubernetes node, ends the session without an end of the run.
    return TERMINATED_EXIT_CODE if stop.is_set() else 0


class ServerAppProcess:
    """Runs the server side of one run."""

    def __init__(self, bus: Bus, config: ServerProcessConfig, main_thread: MainThread) -> None:
        self._bus = bus
        self._config = config
        self._main_thread = main_thread
        self._task = config.task
        self._store = open_model_store(config.store, config.task.id)
        self._messenger = BusMessenger(bus, task=config.task.id, run=config.run, plan=config.plan)
        self._training_requested: asyncio.Future[tuple[BeginTraining, str]] = (
            asyncio.get_running_loop().create_future()
        )
        """The `BeginTraining` of this run, with the id of its message."""

    async def run(self) -> None:
        """Run the app, and publish its start, rounds and end."""
        async with (
            self._bus.consume(AgentName.FLOWER_SERVER_GRID, task=self._task.id) as inbox,
            self._bus.subscribe_ephemeral(Heartbeat, task=self._task.id) as beats,
        ):
            consumers = asyncio.gather(self._consume(inbox), self._relay_heartbeats(beats))
            try:
                await wait_for_first(self._train(), consumers)
            finally:
                self._messenger.close("the run is over")

    async def _consume(self, inbox: AsyncIterator[Delivery]) -> None:
        async for delivery in inbox:
            match delivery.message:
                case BeginTraining() as begin if (
                    begin.run == self._config.run and not self._training_requested.done()
                ):
                    self._training_requested.set_result((begin, delivery.envelope.id))
                case ClientJoined() as joined if joined.code_version != self._task.code_version:
                    log.warning("Ignoring client with another code version", client=joined.client)
                case RoundReply() as reply:
                    self._messenger.deliver(
                        reply, sender_span=delivery.sender_span, message_id=delivery.envelope.id
                    )
                case ClientJoined() | FailTrain() as event:
                    self._messenger.deliver(event)
                case _:
                    pass
            await delivery.ack()

    async def _relay_heartbeats(self, beats: AsyncIterator[Any]) -> None:
        async for beat in beats:
            self._messenger.deliver(beat)

    async def _train(self) -> None:
        try:
            job = await self._make_job()
            session = await self._main_thread.run(self._open_session, job)
            await self._bus.publish(ServerStarted(task=self._task.id, run=self._config.run))
            begin, message_id = await self._training_requested
            set_current_cause(message_id)
            self._messenger.admit(begin.cohort)
            await self._run_app(session, job)
        except EXPECTED_ERRORS as error:
            log.warning("Run failed", run=self._config.run, reason=str(error))
            await self._bus.publish(
                RunFailed(task=self._task.id, run=self._config.run, reason=" ".join(str(error).split())[:500])
            )

    async def _fetch_initial_model(self) -> Path:
        """Fetch the initial model and verify it in this process. Raises StoreError."""
        return await self._store.local_path(self._config.initial_sha256)

    async def _client_selection(self) -> ClientSelection:
        """Build the client selection from all recorded rounds of the task, those of this run included."""
        table = self._task.table.selection
        if table.clients is None and table.weigh_by == "samples":
            return ClientSelection()
        stats = collect_client_stats(task_rounds(self._task.id, await self._bus.current_states(RUN.kind)))
        return ClientSelection(
            max_clients=table.clients,
            explore=table.explore,
            scores=compute_scores(stats, table.by),
            weights=None if table.weigh_by == "samples" else compute_scores(stats, table.weigh_by),
        )

    async def _make_job(self) -> ServerJob:
        initial = await self._fetch_initial_model()
        return ServerJob(
            task=self._task,
            run=self._config.run,
            plan=self._config.plan,
            model=await asyncio.to_thread(weights.load, initial),
            first_round=self._config.first_round,
            selection=await self._client_selection(),
        )

    def _open_session(self, job: ServerJob) -> ServerSession:
        """Import the app, so that an invalid one fails before clients join."""
        seed_server(job.plan.seed, first_round=job.first_round)
        session = open_library(self._task.table.library).open_server(job)
        self._main_thread.at_end(session.close)
        return session

    async def _run_app(self, session: ServerSession, job: ServerJob) -> None:
        with CheckpointWriter(self._bus, self._config, self._store) as checkpoints:
            with _start_span("run the ServerApp", self._config.run):
                result = await self._main_thread.run(
                    session.run, self._messenger, checkpoints.on_round_finished
                )
            await asyncio.to_thread(checkpoints.flush)
            set_current_cause(checkpoints.last_published or current_cause())
        final = job.model if result is None else result
        rounds = self._config.plan.rounds if checkpoints.last_round is None else checkpoints.last_round
        artifact = await _store_model(weights.pack(final), self._store, self._config, rounds)
        await self._bus.publish(
            RunFinished(task=self._task.id, run=self._config.run, artifact=artifact, rounds=rounds)
        )


class CheckpointWriter:
    """Stores the global model after each round and publishes `round_finished`, during the next round.

    It stores one model at a time: if the store is slower than the rounds, the app waits.
    """

    def __init__(self, bus: Bus, config: ServerProcessConfig, store: ModelStore) -> None:
        self._bus = bus
        self._config = config
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._pending: Future[None] | None = None
        self.last_round = config.first_round - 1 or None
        """The last round that the app has reported; None if it has reported none."""
        self.last_published = ""
        """The message id of the last `round_finished`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending is not None:
            self._pending.cancel()

    def on_round_finished(self, result: RoundResult, arrays: Arrays) -> None:
        """Start to store the model of a round. The main thread calls this after each round."""
        self.flush()
        self.last_round = max(self.last_round or 0, result.round)
        coroutine = self._store_and_publish(result, weights.pack(arrays))
        self._pending = asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def flush(self) -> None:
        """Wait until the last round is stored and published. Raises its error."""
        if self._pending is not None:
            self._pending.result()

    async def _store_and_publish(self, result: RoundResult, model: SafetensorsFile) -> None:
        finished = RoundFinished(
            task=self._config.task.id,
            run=self._config.run,
            round=result.round,
            result=result,
            checkpoint=await _store_model(model, self._store, self._config, result.round),
        )
        message_id = uuid7()
        await self._bus.publish(finished, id=message_id)
        self.last_published = message_id


async def _store_model(
    model: SafetensorsFile, store: ModelStore, config: ServerProcessConfig, round_number: int
) -> Artifact:
    """Write *model* from memory to *store*, and return its artifact. Raises StoreError."""
    attributes: dict[str, str | int] = {
        "fedbus.run": config.run,
        "fedbus.round": round_number,
    }
    with tracer.start_as_current_span("store", attributes=attributes):
        return model.artifact(await store.put(model.buffers))


@contextmanager
def _start_span(name: str, run: str) -> Iterator[None]:
    """Open a parent span that is exported at once. A span as long as the run would be visible only at its end."""
    span = tracer.start_span(name, attributes={"fedbus.run": run})
    span.end()
    with trace.use_span(span):
        yield
