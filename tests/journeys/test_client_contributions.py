"""Contribution and reliability of clients, measured in training and used for client selection."""

from pathlib import Path
from typing import Any

from support import NatsServer
from support.all_agents import run_all_agents, start_run, training_count, wait_for_run_end
from support.federation import FederationHarness, open_federation, tiny_task

from fedbus.contracts.task.task import Task, TaskTable
from fedbus.domain.client_scores import collect_client_stats


def task_with(directory: Path, **tables: Any) -> Task:
    task = tiny_task(directory)
    table = TaskTable.model_validate(task.table.model_dump(by_alias=True) | tables)
    return task.model_copy(update={"table": table})


async def complete_run(fed: FederationHarness) -> list[Any]:
    async with run_all_agents(fed, clients=3):
        facts = await wait_for_run_end(fed, await start_run(fed, rounds=2, quorum=3))
        assert await training_count(fed) == 2, "measuring contributions does not change the model"
    return list(facts.rounds)


async def test_each_round_has_times_and_contributions_of_clients(nats: NatsServer, tmp_path: Path) -> None:
    task = task_with(tmp_path, contribution={"every": 1})
    async with open_federation(nats.url, tmp_path, task=task) as fed:
        rounds = await complete_run(fed)
    first, second = rounds[1], rounds[2]
    assert first.train_s.keys() == {"c1", "c2", "c3"}
    assert first.contributions == {"c1": 0.0, "c2": 0.0, "c3": 0.0}, (
        "all updates are equal: removing one changes nothing"
    )
    assert second.contributions.keys() == first.contributions.keys()
    assert collect_client_stats(rounds)["c1"].contribution == 0.0


async def test_a_selection_of_clients_trains_in_each_round(nats: NatsServer, tmp_path: Path) -> None:
    selection = {"clients": 2, "by": "data", "explore": 0.5, "weigh-by": "reliability"}
    task = task_with(tmp_path, selection=selection)
    async with open_federation(nats.url, tmp_path, task=task) as fed:
        rounds = await complete_run(fed)
    trained_in = [set(result.participants) for result in rounds[1:]]
    assert [len(clients) for clients in trained_in] == [2, 2]
    assert set.union(*trained_in) == {"c1", "c2", "c3"}
