"""Runs of the libraries `flower` and `functions` in an aggregation mode, on a scripted messenger."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from learning.mode_references import Array
from learning.scripted_messenger import ScriptedClient, ScriptedMessenger

from fedbus.contracts.run import RoundResult, RunPlan, Scalar
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning.flower import record_codec
from fedbus.learning.flower.array_records import from_record, to_record
from fedbus.learning.flower.grid import MessengerGrid
from fedbus.learning.flower.server_app_host import run_server_app
from fedbus.learning.functions import message_codec
from fedbus.learning.functions.server import FunctionsServer
from fedbus.learning.functions.task_module import TaskModule
from fedbus.learning.library import ClientResponse, ErrorCode, IncomingMessage, ReplyError, ServerJob
from fedbus.learning.payload import Payload
from fedbus.learning.weights import Arrays

START = np.array([1.0, -2.0, 0.5])
ROUNDS = 4
Durations = Mapping[str, Sequence[float | None]]


def train(client: str, number: int, w: Array) -> Array:
    """A step towards a target of the client: each client, training and model has another update."""
    target = float(int(client[1:]) + 1)
    return w + 0.3 * (target - w) + 0.01 * (number + 1)


def examples_of(client: str) -> int:
    return 10 * (int(client[1:]) + 1)


@dataclass
class ModeRun:
    """The result of a run: its messenger, and the result and model of each round."""

    messenger: ScriptedMessenger
    results: list[RoundResult] = field(default_factory=list)
    models: list[Array] = field(default_factory=list)
    final: Arrays | None = None

    @property
    def updates(self) -> list[dict[str, int]]:
        """The staleness by client of each round."""
        return [result.staleness for result in self.results]

    def on_round(self, result: RoundResult, arrays: Arrays) -> None:
        if result.round:
            self.results.append(result)
            self.models.append(np.array(arrays["w"]))


Change = Callable[[str, int, Arrays], Arrays]
Prepare = Callable[[ScriptedMessenger], None]


def run_flower(
    durations: Durations,
    aggregation: Mapping[str, Scalar],
    *,
    strategy: Callable[[], Strategy] = lambda: FedAvg(fraction_evaluate=0.0),
    rounds: int = ROUNDS,
    change: Change = lambda _client, _number, arrays: arrays,
    prepare: Prepare = lambda _: None,
    evaluate_s: float = 0.0,
    app: ServerApp | None = None,
    start: Array = START,
    plan: Mapping[str, Any] | None = None,
    first_round: int = 1,
    **table: Any,
) -> ModeRun:
    """Run an unmodified ServerApp with *strategy*. *change* may change the update of a client."""
    clients = {
        client: ScriptedClient(_FlowerClient(client, change), list(times), evaluate_s)
        for client, times in durations.items()
    }
    run = ModeRun(ScriptedMessenger(clients, _make_plan(rounds, plan)))
    prepare(run.messenger)
    if app is None:
        app = ServerApp()

        @app.main()
        def main(grid: Any, context: Any) -> None:
            del context
            strategy().start(grid=grid, initial_arrays=to_record({"w": start}), num_rounds=rounds)

    job = make_job(run, aggregation, start, first_round=first_round, **table)
    run.final = run_server_app(app, MessengerGrid(run.messenger), job, run.on_round)
    return run


def run_functions(
    durations: Durations,
    aggregation: Mapping[str, Scalar],
    *,
    rounds: int = ROUNDS,
    change: Change = lambda _client, _number, arrays: arrays,
    prepare: Prepare = lambda _: None,
    module: "TaskModule | None" = None,
    start: Array = START,
    first_round: int = 1,
) -> ModeRun:
    """Run the server side of the library `functions`, without evaluation."""
    clients = {
        client: ScriptedClient(_FunctionsClient(client, change), list(times))
        for client, times in durations.items()
    }
    run = ModeRun(ScriptedMessenger(clients, _make_plan(rounds, None)))
    prepare(run.messenger)
    job = make_job(run, {"fraction-evaluate": 0.0, **aggregation}, start, first_round=first_round)
    run.final = FunctionsServer(job, module or _NoFunctions()).run(run.messenger, run.on_round)  # type: ignore[arg-type]  # a stand-in for the module of a task
    return run


def make_job(
    run: ModeRun, aggregation: Mapping[str, Scalar], start: Array, *, first_round: int = 1, **table: Any
) -> ServerJob:
    """Make the job of a run whose plan overrides the aggregation of its task."""
    task = Task(table=TaskTable.model_validate({"task": "tiny", **table}), code_version="v1", path="/nowhere")
    plan = run.messenger.plan.model_copy(update={"aggregation": dict(aggregation)})
    return ServerJob(task=task, run="run-1", plan=plan, model={"w": start}, first_round=first_round)


def _make_plan(rounds: int, plan: Mapping[str, Any] | None) -> RunPlan:
    return RunPlan(**{"rounds": rounds, "round_s": 1e6, **(plan or {})})


class _NoFunctions:
    """A task module without functions for the server side."""

    def has(self, name: object) -> bool:
        del name
        return False


class _Client:
    def __init__(self, client: str, change: Change) -> None:
        self.client = client
        self._change = change
        self._trainings = 0

    def train(self, arrays: Arrays) -> Arrays:
        update = train(self.client, self._trainings, arrays["w"])
        self._trainings += 1
        return self._change(self.client, self._trainings - 1, {"w": update})


class _FlowerClient(_Client):
    def __call__(self, message: IncomingMessage) -> ClientResponse:
        content = record_codec.decode(message.data)
        record = next(iter(content.array_records.values()))
        metrics: dict[str, Any] = {"num-examples": examples_of(self.client)}
        if message.kind == "evaluate":
            metrics["loss"] = float(record["w"].numpy().sum())
            return _respond(RecordDict({"metrics": MetricRecord(metrics)}))
        assert message.kind == "train"
        try:
            arrays = self.train(from_record(record))
        except RuntimeError as error:
            return ClientResponse(error=ReplyError(ErrorCode.CODE_RAISED, f"{self.client}: {error}"))
        metrics["loss"] = 1.0
        return _respond(RecordDict({"arrays": to_record(arrays), "metrics": MetricRecord(metrics)}))


def _respond(content: RecordDict) -> ClientResponse:
    return ClientResponse(payload=Payload.pack(record_codec.encode(content).buffers))


class _FunctionsClient(_Client):
    def __call__(self, message: IncomingMessage) -> ClientResponse:
        request = message_codec.decode(message.data)
        values = {"num-examples": examples_of(self.client), "metrics": {}}
        try:
            arrays = self.train(request.weights)
        except RuntimeError as error:
            return ClientResponse(error=ReplyError(ErrorCode.CODE_RAISED, f"{self.client}: {error}"))
        return ClientResponse(
            payload=Payload.pack(message_codec.encode(message_codec.Content(values, arrays)))
        )
