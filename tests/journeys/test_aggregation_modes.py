"""The aggregation modes on a real federation: three clients, one of them slow."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support import NatsServer
from support.all_agents import run_all_agents, start_run, wait_for_run_end
from support.federation import FederationHarness, open_federation

from fedbus.contracts.run import RunData, RunState

SLOW_S = 2.0
"""The time of each training of c3, in seconds."""
FAST_S = 0.25
"""The time of each training of the others."""


@pytest.fixture
async def fed(nats: NatsServer, tmp_path: Path) -> AsyncIterator[FederationHarness]:
    async with open_federation(nats.url, tmp_path) as fed:
        fed.clear_schedule()
        yield fed


async def finish_run(fed: FederationHarness, rounds: int, **aggregation: Any) -> RunData:
    """Run with the quorum of three clients, and return the facts of the finished run."""
    config = {"slow": 2, "slow-s": SLOW_S, "pause-s": FAST_S}
    run = await start_run(fed, rounds=rounds, quorum=3, config=config, aggregation=aggregation)
    facts = await wait_for_run_end(fed, run)
    last = fed.last_transition("run", run)
    assert last.target == RunState.FINISHED, last.reason
    return facts


@pytest.mark.slow
async def test_fast_clients_do_not_wait_for_a_slow_one(fed: FederationHarness) -> None:
    async with run_all_agents(fed, clients=3):
        sync = await finish_run(fed, 2)
        deadline = await finish_run(fed, 10, mode="deadline", **{"deadline-s": 0.5})
        buffered = await finish_run(fed, 10, mode="buffered", **{"buffer-size": 2})

        assert min(one.seconds for one in sync.rounds if one.round) >= SLOW_S
        assert sync.plan.aggregation == {}
        assert {one.mode for one in sync.rounds} == {""}

        trained = [one for one in deadline.rounds if one.round]
        assert [one.round for one in trained] == list(range(1, 11))
        assert all({"c1", "c2"} <= set(one.participants) for one in trained)
        assert sum(one.seconds for one in trained) < 10 * SLOW_S / 2
        late = [one for one in trained if one.late_merged]
        assert late, "c3 was late for a round, and its update counts in another"
        assert all(one.staleness["c3"] > 0 and one.participants["c3"] for one in late)
        assert not any(one.failures for one in trained)

        trained = [one for one in buffered.rounds if one.round]
        assert len(trained) == 10
        assert {one.updates for one in trained} == {2}
        assert {one.mode for one in trained} == {"buffered"}
        assert sum(one.seconds for one in trained) < 10 * SLOW_S / 2
        losses = [one.loss for one in trained if one.loss is not None]
        assert losses[-1] < losses[0]
        assert [one.model.version for one in (sync, deadline, buffered) if one.model] == [2, 3, 4]
