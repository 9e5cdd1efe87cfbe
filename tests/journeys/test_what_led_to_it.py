"""From the last word of a run each message leads back, over agents and processes, to what began the run."""

from datetime import timedelta
from itertools import pairwise

from support.all_agents import run_all_agents, start_run, wait_for_run_end
from support.federation import FED, FederationHarness

from fedbus.agents.gateway.history import StreamHistory
from fedbus.bus.bus import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.client import FinTrain
from fedbus.contracts.transition import Transition


async def read_all_messages(fed: FederationHarness) -> dict[str, StoredMessage]:
    """All that was said, by its id."""
    found: dict[str, StoredMessage] = {}
    streams = {
        events_stream(FED): stream_subjects(FED),
        lifecycle_stream(FED): [subjects.wildcard_for(FED, Transition)],
    }
    for stream, wanted in streams.items():
        _, last = await fed.bus.sequence_range(stream)
        async with fed.bus.watch(stream, wanted, whole=True) as seen:
            async for one in seen:
                found[one.envelope.id] = one
                if one.sequence >= last:
                    break
    return found


def describe_step(one: StoredMessage) -> str:
    message = one.message
    return f"{message.kind} {message.event}" if isinstance(message, Transition) else message.word


async def test_the_end_of_a_clients_training_leads_back_to_the_request_of_its_run(
    fed: FederationHarness,
) -> None:
    async with run_all_agents(fed):
        await wait_for_run_end(fed, await start_run(fed, rounds=2, quorum=2))
        said = await read_all_messages(fed)
        last = next(one for one in said.values() if isinstance(one.message, FinTrain))
        chain = [last]
        while cause := chain[-1].envelope.cause:
            chain.append(said[cause])
        found = await StreamHistory(fed.bus).causes("e", last.sequence)
    chain.reverse()
    steps = [describe_step(one) for one in chain]

    assert steps[0] == "run requested"
    assert steps[-2:] == ["server_closed", "fin_train"]
    # each round: what was asked of a client, its answer, and what that led to
    assert steps.count("round_message") == steps.count("round_reply") == 4
    assert len(steps) < 25, steps
    assert all(before.envelope.time <= after.envelope.time for before, after in pairwise(chain))
    assert found is not None
    assert [one.id for one in found[0]] == [one.envelope.id for one in chain]
    assert found[1]


async def test_nothing_is_said_in_a_run_that_leads_back_to_nowhere(fed: FederationHarness) -> None:
    async with run_all_agents(fed):
        run = await start_run(fed, rounds=1, quorum=2)
        facts = await wait_for_run_end(fed, run)
        said = await read_all_messages(fed)
    since = facts.requested_at - timedelta(milliseconds=1)  # an envelope's time is of whole milliseconds
    orphans = {
        describe_step(one)
        for one in said.values()
        if one.envelope.time > since and one.envelope.cause and one.envelope.cause not in said
    }
    without = {
        describe_step(one) for one in said.values() if one.envelope.time > since and not one.envelope.cause
    }
    assert orphans == set()
    own_accord = {"data_counted", "data_checked", "device_report"}
    assert "run requested" in without, "a person asked for it"
    assert without - own_accord == {"run requested"}
