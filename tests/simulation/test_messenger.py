"""The messenger of a simulation, with workers in the test's process: rounds, sums, deaths and moves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulation.in_process_engine import InProcessEngine
from simulation.tiny_tasks import mean_step, write_task

from fedbus.contracts.run import RoundResult
from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import OutgoingMessage, ServerJob
from fedbus.learning.payload import Payload
from fedbus.learning.weights import Arrays
from fedbus.simulation.engine import (
    DiscardClient,
    EndSum,
    MessageBatch,
    Order,
    TakeState,
    WorkerJob,
)
from fedbus.simulation.messenger import SimulationMessenger
from fedbus.simulation.observer import SilentObserver
from fedbus.simulation.settings import SimulationSettings
from fedbus.simulation.simulator import make_selection


class Warnings(SilentObserver):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_warning(self, text: str) -> None:
        self.texts.append(text)


class SimulatedRun:
    """One run of a task, in this process."""

    def __init__(self, task: Task, *, workers: int = 2, clients: int = 6, **changes: Any) -> None:
        self.settings = SimulationSettings(task=task, clients=clients, workers=workers, rounds=2, **changes)
        self.job = WorkerJob(
            task=task,
            run="run",
            plan=self.settings.plan,
            clients=clients,
            node_config=self.settings.shared_node_config,
            seed=self.settings.seed,
        )
        self.engine = InProcessEngine(self.job, workers=workers)
        self.observer = Warnings()
        self.messenger = SimulationMessenger(
            self.engine,
            run="run",
            plan=self.settings.plan,
            clients=self.settings.client_names,
            observer=self.observer,
            is_deterministic=self.settings.deterministic,
            adds_updates=True,
        )
        self.rounds: list[RoundResult] = []
        self.models: list[Arrays] = []

    def train(self, model: Arrays | None = None) -> Arrays:
        task = self.settings.task
        job = ServerJob(
            task=task,
            run="run",
            plan=self.settings.plan,
            model=model or {"w": np.zeros(3, np.float32)},
            selection=make_selection(self.settings),
        )
        final = open_library(task.table.library).open_server(job).run(self.messenger, self._on_round)
        assert final is not None
        return final

    def _on_round(self, result: RoundResult, model: Arrays) -> None:
        self.rounds.append(result)
        self.models.append(model)

    def message(self, client: int, payload: Payload | None = None) -> OutgoingMessage:
        return OutgoingMessage(
            client=self.settings.client_names[client], kind="train", payload=payload or Payload.pack([b"x"])
        )


@pytest.fixture(params=["flower", "functions"])
def task(tmp_path: Path, request: pytest.FixtureRequest) -> Task:
    return write_task(tmp_path / "task", request.param)


@pytest.fixture
def functions(tmp_path: Path) -> Task:
    return write_task(tmp_path / "task", "functions")


def test_a_sum_of_each_worker_gives_the_mean_of_all_updates(task: Task) -> None:
    run = SimulatedRun(task)
    np.testing.assert_allclose(run.train()["w"], 2 * mean_step(*range(6)), rtol=1e-6)
    trained = [order for _, order in run.engine.batches() if order.kind == "train"]
    assert all(order.sum is not None for order in trained)
    assert {worker for worker, order in run.engine.orders if isinstance(order, EndSum)} == {0, 1}
    assert run.engine.released == sorted(set(run.engine.released))  # each payload once
    assert not run.messenger.has_open_messages


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_deterministic_run_has_the_same_bits_for_any_workers(task: Task, workers: int) -> None:
    start = {"w": np.full(3, 1 / 3, np.float32)}
    one = SimulatedRun(task, workers=workers, clients=7, deterministic=True)
    reference = SimulatedRun(task, workers=4, clients=7, deterministic=True)
    assert one.train(start)["w"].tobytes() == reference.train(start)["w"].tobytes()
    assert all(order.sum is None for _, order in one.engine.batches())


def test_bad_updates_are_failures_of_their_clients(task: Task) -> None:
    run = SimulatedRun(task, config={"faults": "1=raise,2=nan,3=shape"})
    np.testing.assert_allclose(run.train()["w"], 2 * mean_step(0, 4, 5), rtol=1e-6)
    failures = run.rounds[-1].failures
    assert "no data" in failures["client-0001"]
    assert "NaN" in failures["client-0002"]
    assert "shape (5,)" in failures["client-0003"]


def test_a_client_keeps_its_state_on_its_worker(task: Task) -> None:
    run = SimulatedRun(task)
    run.train()
    homes: dict[int, set[int]] = {}
    for worker, batch in run.engine.batches():
        for item in batch.items:
            homes.setdefault(item.client, set()).add(worker)
    counts = {figures["train_count"] for figures in run.rounds[-1].figures.values()}
    assert counts == {2}
    assert not [order for _, order in run.engine.orders if isinstance(order, DiscardClient)]
    assert all(len(workers) == 1 for workers in homes.values()) or any(
        isinstance(order, TakeState) for _, order in run.engine.orders
    )


def test_a_cohort_is_random_and_the_same_for_a_seed(task: Task) -> None:
    def participants(seed: int) -> list[list[str]]:
        run = SimulatedRun(task, clients=30, cohort=4, seed=seed)
        run.train()
        rounds = [one for one in run.rounds if one.round]
        assert all(len(one.figures) <= 8 for one in rounds)  # those that train, and those that evaluate
        return [sorted(one.participants) for one in rounds]

    first = participants(1)
    assert [len(one) for one in first] == [4, 4]
    assert first[0] != first[1]
    assert participants(1) == first != participants(2)


def test_the_messages_of_a_dead_worker_are_sent_again_one_by_one(functions: Task) -> None:
    run = SimulatedRun(functions, workers=1)
    run.engine.before_handling = _die_at(lambda items: 3 in items)
    np.testing.assert_allclose(run.train()["w"][0] > 0, True)
    assert list(run.rounds[0].failures) == ["client-0003"]
    assert len(run.rounds[0].participants) == 5
    assert "sent again" in run.observer.texts[0]


def test_updates_in_the_sum_of_a_dead_worker_are_made_again(functions: Task) -> None:
    run = SimulatedRun(functions, workers=1)
    deaths = iter([False, True])

    def before(worker: int, order: Order) -> bool:
        return not (
            isinstance(order, EndSum) and next(deaths, False) is False and not run.messenger.lost_workers
        )

    run.engine.before_handling = before
    run.train()
    assert run.messenger.lost_workers == 1
    assert len(run.rounds[0].participants) == 6
    assert run.rounds[0].failures == {}
    np.testing.assert_allclose(run.models[0]["w"], mean_step(*range(6)), rtol=1e-6)


def test_posted_replies_are_taken_in_order_of_arrival_and_collected_once(functions: Task) -> None:
    run = SimulatedRun(functions)
    ids = run.messenger.post([run.message(client) for client in range(4)])
    first = run.messenger.take(timeout_s=60.0)
    assert first is not None
    assert first.error is not None  # the payload is no message of the library
    rest: list[str] = []
    while len(rest) < 3:
        rest += [reply.client for reply in run.messenger.collect(ids)]
    assert {first.client, *rest} == set(run.settings.client_names[:4])
    assert run.messenger.collect(ids) == []
    assert run.messenger.take(timeout_s=0.0) is None
    run.messenger.close("over")
    run.messenger.join()


def test_a_message_to_an_unknown_client_is_an_error(functions: Task) -> None:
    run = SimulatedRun(functions)
    message = OutgoingMessage(client="client-9999", kind="train", payload=Payload.pack([]))
    (reply,) = run.messenger.send([message])
    assert reply.error is not None
    assert "no such client" in reply.error.reason


def _die_at(condition: Callable[[set[int]], bool]) -> Callable[[int, Order], bool]:
    """Let a worker die whenever it gets a training batch with these clients."""

    def before(worker: int, order: Order) -> bool:
        if not isinstance(order, MessageBatch) or order.kind != "train":
            return True
        return not condition({item.client for item in order.items})

    return before
