"""What the bus keeps: five streams, and a durable consumer for each agent that must miss nothing.

    FEDBUS_<fed>_EVENTS   the durable words of the catalogue, for a week
    FEDBUS_<fed>_LIFE     the transitions: the last one on a subject is that thing's state
    FEDBUS_<fed>_DEVICES  of each device the last word on how it is: nobody waits for it to be written
    FEDBUS_<fed>_DEAD     what could not be read, with the reason
    FEDBUS_<fed>_LEASES   who does what only one may do, for seconds: see `lease`

The server side makes them all, the clients' consumers too: a client that could make a
consumer could read everything.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import BadRequestError, NoStreamResponseError, NotFoundError, ServiceUnavailableError

from fedbus.contracts import catalogue, subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.envelope import MAX_EVENT_BYTES
from fedbus.contracts.identifiers import FederationId

DAY_S = 24 * 3600.0
RETENTION_S = 7 * DAY_S
EVENTS_BYTES = 1024**3
LIFECYCLE_BYTES = 1024**3
DEVICES_BYTES = 64 * 1024**2
DEAD_BYTES = 64 * 1024**2
LEASE_S = 5.0
"""After this long without a word of its holder a lease is free."""
LEASE_BYTES = 1024**2
MAX_TRANSITIONS_PER_SUBJECT = 1000
"""Of one thing: its history, as `fedbus run show` and the trace tell it."""
DUPLICATE_WINDOW_S = 120.0
ACK_WAIT_S = 5.0
"""After this long without an acknowledgement a message is delivered again: its reader died, or the server did."""
MAX_DELIVER = 10
MAX_ACK_PENDING = 1000
MAX_ACK_PENDING_IN_ORDER = 1
"""Of a consumer that follows a lifecycle: with more, a redelivered transition comes after newer ones."""


def events_stream(fed: FederationId) -> str:
    return f"FEDBUS_{fed}_EVENTS"


def lifecycle_stream(fed: FederationId) -> str:
    return f"FEDBUS_{fed}_LIFE"


def devices_stream(fed: FederationId) -> str:
    return f"FEDBUS_{fed}_DEVICES"


def dead_letter_stream(fed: FederationId) -> str:
    return f"FEDBUS_{fed}_DEAD"


def lease_stream(fed: FederationId) -> str:
    return f"FEDBUS_{fed}_LEASES"


def stream_for(fed: FederationId, agent: AgentName) -> str:
    """The stream that *agent* listens to."""
    return lifecycle_stream(fed) if agent in catalogue.FOLLOWS_LIFECYCLES else events_stream(fed)


def stream_names(fed: FederationId) -> list[str]:
    """All streams of *fed*."""
    return [
        events_stream(fed),
        lifecycle_stream(fed),
        devices_stream(fed),
        dead_letter_stream(fed),
        lease_stream(fed),
    ]


def consumer_name(owner: str, task: str, agent: AgentName) -> str:
    """The durable consumer of one agent in one task: ``c1_mnist_inference``."""
    return f"{owner}_{task}_{agent}"


async def create_streams(js: JetStreamContext, fed: FederationId) -> None:
    """The streams of *fed*, made or brought up to date. Repeating it changes nothing."""
    for plain in _stream_configs(fed):
        config = replace(plain, metadata={"fedbus-federation": fed})
        try:
            await js.add_stream(config)
        except BadRequestError:  # it is there, with another version's settings
            await js.update_stream(config)


async def list_streams(js: JetStreamContext, fed: FederationId) -> dict[str, int] | None:
    """The streams of *fed* that are there, with the messages in each; None where the server has no JetStream."""
    found: dict[str, int] = {}
    try:
        for name in stream_names(fed):
            with suppress(NotFoundError):
                found[name] = (await js.stream_info(name)).state.messages
    except (NoStreamResponseError, ServiceUnavailableError):
        return None
    return found


async def create_consumer(
    js: JetStreamContext, fed: FederationId, agent: AgentName, *, task: str, owner: str, client: str = "*"
) -> str:
    """The durable consumer of *agent*: what comes from now on waits in it. Repeating it changes nothing."""
    name = consumer_name(owner, task, agent)
    config = ConsumerConfig(
        durable_name=name,
        description=f"what the {agent} of {owner} hears of {task}",
        deliver_subject=subjects.deliver(fed, owner, f"{task}.{agent}"),
        deliver_policy=DeliverPolicy.NEW,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT_S,
        max_deliver=MAX_DELIVER,
        max_ack_pending=MAX_ACK_PENDING_IN_ORDER
        if agent in catalogue.FOLLOWS_LIFECYCLES
        else MAX_ACK_PENDING,
        filter_subjects=catalogue.subscribed_subjects(fed, agent, task=task, client=client),
        metadata={"fedbus-agent": agent, "fedbus-owner": owner, "fedbus-task": task},
    )
    await js.add_consumer(stream_for(fed, agent), config)
    return name


async def delete_consumer(
    js: JetStreamContext, fed: FederationId, agent: AgentName, *, task: str, owner: str
) -> None:
    """Forget the consumer of *agent*, and what waits in it."""
    try:
        await js.delete_consumer(stream_for(fed, agent), consumer_name(owner, task, agent))
    except NotFoundError:
        return


def _stream_configs(fed: FederationId) -> list[StreamConfig]:
    return [
        _stream_config(
            events_stream(fed),
            f"Events and commands of the federation {fed}",
            catalogue.stream_subjects(fed),
            max_age=RETENTION_S,
            max_bytes=EVENTS_BYTES,
            max_msg_size=2 * MAX_EVENT_BYTES,
            duplicate_window=DUPLICATE_WINDOW_S,
            allow_direct=True,
        ),
        _stream_config(
            lifecycle_stream(fed),
            f"Transitions of the federation {fed}: the last message on a subject is its state",
            [f"{subjects.ROOT}.{fed}.life.>"],
            max_msgs_per_subject=MAX_TRANSITIONS_PER_SUBJECT,
            max_bytes=LIFECYCLE_BYTES,
            max_msg_size=2 * MAX_EVENT_BYTES,
            duplicate_window=DUPLICATE_WINDOW_S,
            allow_direct=True,
            deny_delete=True,
        ),
        _stream_config(
            devices_stream(fed),
            f"How the devices of the federation {fed} are: of each its last report",
            catalogue.last_value_subjects(fed),
            max_age=RETENTION_S,
            max_bytes=DEVICES_BYTES,
            max_msg_size=2 * MAX_EVENT_BYTES,
            max_msgs_per_subject=1,
            duplicate_window=LEASE_S,  # no report is sent twice, and each id that is remembered costs memory
            allow_direct=True,
        ),
        _stream_config(
            dead_letter_stream(fed),
            f"What nobody in the federation {fed} could read, with the reason",
            [subjects.dead_letter(fed, "*", "*")],
            max_age=RETENTION_S,
            max_bytes=DEAD_BYTES,
        ),
        _stream_config(
            lease_stream(fed),
            f"Who in the federation {fed} does what only one may do: gone after {LEASE_S:g} s of silence",
            [subjects.lease(fed, "*", "*")],
            max_age=LEASE_S,
            max_bytes=LEASE_BYTES,
            max_msgs_per_subject=1,
            duplicate_window=LEASE_S,
        ),
    ]


def _stream_config(name: str, description: str, kept: list[str], **limits: Any) -> StreamConfig:
    """On disk, where it outlives a restart (one in memory is gone then, and not only empty); the oldest go first."""
    return StreamConfig(
        name=name,
        description=description,
        subjects=kept,
        storage=StorageType.FILE,
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.OLD,
        **limits,
    )
