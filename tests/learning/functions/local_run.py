"""A run of the library `functions` in this process: a task on disk, its clients, and a messenger that calls them."""

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.task.task import Task
from fedbus.learning.functions.library import FunctionsLibrary
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import (
    ClientJob,
    ClientReply,
    ClientResponse,
    ClientSession,
    ErrorCode,
    IncomingMessage,
    NotEnoughClients,
    OutgoingMessage,
    ReplyError,
    RoundTally,
    ServerJob,
)
from fedbus.learning.round_tallies import RoundTallies
from fedbus.learning.weights import Arrays
from fedbus.stores.tasks.task_directory import read_task

PYPROJECT = """
[project]
name = "tiny"

[tool.fedbus]
task = "tiny"
library = "functions"
functions = "tiny_app.functions"
{extra}
"""

FUNCTIONS = """
import numpy as np

def load(partition_id):
    return float(partition_id)

def initial(config):
    return {"w": np.zeros(2, np.float32)}

def train(weights, data, config):
    weights["w"] += 1 + data
    return weights, {"train_loss": 1 / config["server-round"]}, 10 * (int(data) + 1)

def evaluate(weights, data, config):
    return {"eval_loss": float(weights["w"][0])}, 1
"""

LIBRARY = FunctionsLibrary()
Intercept = Callable[[OutgoingMessage, ClientResponse], ClientResponse]


def make_task(directory: Path, functions: str = FUNCTIONS, extra: str = "") -> Task:
    """Write a task to *directory*, and read it."""
    (directory / "tiny_app").mkdir(exist_ok=True)
    (directory / "tiny_app" / "__init__.py").touch()
    (directory / "tiny_app" / "functions.py").write_text(functions)
    (directory / "pyproject.toml").write_text(PYPROJECT.format(extra=extra))
    return read_task(directory, open_library)


class LocalMessenger:
    """Calls the sessions of the clients. *intercept* may change a response."""

    run = "run-1"
    has_open_messages = False

    def __init__(
        self, sessions: dict[str, ClientSession], plan: RunPlan, intercept: Intercept | None = None
    ) -> None:
        self.plan = plan
        self._sessions = sessions
        self._intercept = intercept or (lambda _, response: response)
        self._tallies = RoundTallies()
        self.sent: list[OutgoingMessage] = []

    def clients(self) -> list[str]:
        return list(self._sessions)

    def failed_clients(self) -> dict[str, str]:
        return {}

    def wait_for_clients(self, count: int = 1, *, timeout_s: float | None = None) -> list[str]:
        if len(self._sessions) < count:
            raise NotEnoughClients(f"{len(self._sessions)} of {count} clients joined")
        return self.clients()

    def wait_for_change(self, clients: Collection[str], *, timeout_s: float) -> list[str]:
        return self.clients()

    def send(
        self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None
    ) -> Iterator[ClientReply]:
        for message in messages:
            self.sent.append(message)
            yield self._exchange(message)

    def post(self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None) -> list[str]:
        raise NotImplementedError

    def collect(self, message_ids: Iterable[str]) -> list[ClientReply]:
        raise NotImplementedError

    @property
    def adds_updates(self) -> bool:
        return False

    def now(self) -> float:
        return 0.0

    def take(self, *, timeout_s: float, clients: Collection[str] | None = None) -> ClientReply | None:
        raise NotImplementedError

    def accept(self, reply: ClientReply, *, samples: int = 0) -> None:
        self._tallies.accept(reply, samples)

    def reject(self, reply: ClientReply, reason: str) -> None:
        self._tallies.reject(reply, reason)

    def tally(self, round_number: int) -> RoundTally:
        return self._tallies.copy(round_number)

    def _exchange(self, message: OutgoingMessage) -> ClientReply:
        assert message.round is not None
        incoming = IncomingMessage(
            message_id=message.message_id,
            kind=message.kind,
            data=message.payload.to_bytes(),
            round=message.round,
            node_config={"partition-id": sorted(self._sessions).index(message.client), "num-partitions": 2},
        )
        response = self._intercept(message, self._sessions[message.client].handle(incoming))
        reply = ClientReply(
            request=message,
            round=message.round,
            data=None if response.payload is None else response.payload.to_bytes(),
            error=response.error,
            metrics=response.metrics,
        )
        if response.error is not None:
            self.reject(reply, response.error.reason)
        return reply


class LocalRun:
    """The result of a run: the final weights, and the rounds with their weights."""

    def __init__(
        self,
        task: Task,
        *,
        clients: int = 2,
        rounds: int = 3,
        first_round: int = 1,
        model: Arrays | None = None,
        intercept: Intercept | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        plan = RunPlan(rounds=rounds, config=config or {})
        self.results: list[RoundResult] = []
        self.models: list[Arrays] = []
        if model is None:
            model = LIBRARY.initial_model(task) or {}
        sessions = {
            f"c{number}": LIBRARY.open_client(
                ClientJob(task=task, client=f"c{number}", run="run-1", plan=plan)
            )
            for number in range(clients)
        }
        self.messenger = LocalMessenger(sessions, plan, intercept)
        job = ServerJob(task=task, run="run-1", plan=plan, model=model, first_round=first_round)
        server = LIBRARY.open_server(job)
        self.final = server.run(self.messenger, self._on_round)
        server.close()

    def _on_round(self, result: RoundResult, arrays: Arrays) -> None:
        self.results.append(result)
        self.models.append({name: np.array(array) for name, array in arrays.items()})

    def metric(self, name: str) -> list[float]:
        return [result.metrics[name] for result in self.results if name in result.metrics]


def lose(client: str, kind: str = "train", rounds: Collection[int] = range(1, 100)) -> Intercept:
    """Return an interceptor that loses the messages of *client* in these *rounds*."""
    return lambda message, response: (
        ClientResponse(error=ReplyError(ErrorCode.CLIENT_LOST, "no heartbeat for 10 s"))
        if message.client == client and message.kind == kind and message.round in rounds
        else response
    )
