"""The causes of each message of a run lead back to its root cause, over agents and processes."""

from datetime import timedelta
from itertools import pairwise

from support.all_agents import run_all_agents, start_run, wait_for_run_end
from support.federation import FED, FederationHarness

from fedbus.agents.gateway.history import StreamHistory
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.client import FinTrain
from fedbus.contracts.transition import Transition


async def read_all_messages(fed: FederationHarness) -> dict[str, StoredMessage]:
    """Return all messages of both streams, by id."""
    messages: dict[str, StoredMessage] = {}
    streams = {
        events_stream(FED): stream_subjects(FED),
        lifecycle_stream(FED): [subjects.wildcard_for(FED, Transition)],
    }
    for stream, filters in streams.items():
        _, last = await fed.bus.sequence_range(stream)
        async with fed.bus.read_stream(stream, filters, whole=True) as stored:
            async for message in stored:
                messages[message.envelope.id] = message
                if message.sequence >= last:
                    break
    return messages


def describe_step(stored: StoredMessage) -> str:
    message = stored.message
    return f"{message.kind} {message.event}" if isinstance(message, Transition) else message.name


async def test_the_end_of_training_leads_back_to_the_run_request(
    fed: FederationHarness,
) -> None:
    async with run_all_agents(fed):
        await wait_for_run_end(fed, await start_run(fed, rounds=2, quorum=2))
        messages = await read_all_messages(fed)
        last = next(stored for stored in messages.values() if isinstance(stored.message, FinTrain))
        chain = [last]
        while cause := chain[-1].envelope.cause:
            chain.append(messages[cause])
        history = await StreamHistory(fed.bus).read_causes("e", last.sequence)
    chain.reverse()
    steps = [describe_step(stored) for stored in chain]

    assert steps[0] == "run requested"
    assert steps[-2:] == ["server_closed", "fin_train"]
    # each round has a message to a client and its reply
    assert steps.count("round_message") == steps.count("round_reply") == 4
    assert len(steps) < 25, steps
    assert all(before.envelope.time <= after.envelope.time for before, after in pairwise(chain))
    assert history is not None
    records, is_complete = history
    assert [record.id for record in records] == [stored.envelope.id for stored in chain]
    assert is_complete


async def test_each_message_of_a_run_has_a_known_cause(fed: FederationHarness) -> None:
    async with run_all_agents(fed):
        run = await start_run(fed, rounds=1, quorum=2)
        facts = await wait_for_run_end(fed, run)
        messages = await read_all_messages(fed)
    since = facts.requested_at - timedelta(milliseconds=1)  # envelope times are in whole milliseconds
    orphans = {
        describe_step(stored)
        for stored in messages.values()
        if stored.envelope.time > since and stored.envelope.cause and stored.envelope.cause not in messages
    }
    without_cause = {
        describe_step(stored)
        for stored in messages.values()
        if stored.envelope.time > since and not stored.envelope.cause
    }
    assert orphans == set()
    periodic = {"data_counted", "data_checked", "device_report"}
    assert "run requested" in without_cause, "a user requested it"
    assert without_cause - periodic == {"run requested"}
