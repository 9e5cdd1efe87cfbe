"""The JetStream streams of a federation, and the durable consumers of its agents.

    FEDBUS_<fed>_EVENTS   the durable messages of the catalogue, for a week
    FEDBUS_<fed>_LIFE     the transitions: the last one on a subject is the entity's state
    FEDBUS_<fed>_DEVICES  the last report of each device; published without waiting for an acknowledgement
    FEDBUS_<fed>_DEAD     messages that could not be decoded, with the reason
    FEDBUS_<fed>_LEASES   the leases, for seconds: see `lease`

The server side creates all of them, including the consumers of clients: a client with the permission to create
a consumer could read everything.
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
"""A lease expires when its holder has not renewed it for this long."""
LEASE_BYTES = 1024**2
MAX_TRANSITIONS_PER_SUBJECT = 1000
"""The history of one entity, for `fedbus run show` and the trace."""
DUPLICATE_WINDOW_S = 120.0
ACK_WAIT_S = 5.0
"""A message that is not acknowledged for this long is redelivered: its consumer or the NATS server failed."""
MAX_DELIVER = 10
MAX_ACK_PENDING = 1000
MAX_ACK_PENDING_IN_ORDER = 1
"""For consumers of lifecycles: with more, a redelivered transition would arrive after newer ones."""


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
    """Return the stream that *agent* consumes."""
    return lifecycle_stream(fed) if agent in catalogue.FOLLOWS_LIFECYCLES else events_stream(fed)


def stream_names(fed: FederationId) -> list[str]:
    """Return the names of all streams of *fed*."""
    return [
        events_stream(fed),
        lifecycle_stream(fed),
        devices_stream(fed),
        dead_letter_stream(fed),
        lease_stream(fed),
    ]


def consumer_name(owner: str, task: str, agent: AgentName) -> str:
    """Return the name of an agent's durable consumer in one task: ``c1_mnist_inference``."""
    return f"{owner}_{task}_{agent}"


async def create_streams(js: JetStreamContext, fed: FederationId) -> None:
    """Create the streams of *fed*, or update their settings; idempotent."""
    for base in _stream_configs(fed):
        config = replace(base, metadata={"fedbus-federation": fed})
        try:
            await js.add_stream(config)
        except BadRequestError:  # it exists with the settings of another version
            await js.update_stream(config)


async def list_streams(js: JetStreamContext, fed: FederationId) -> dict[str, int] | None:
    """Return the number of messages in each existing stream of *fed*; None if the server has no JetStream."""
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
    """Create the durable consumer of *agent*, which stores messages from now on; idempotent. Return its name."""
    name = consumer_name(owner, task, agent)
    config = ConsumerConfig(
        durable_name=name,
        description=f"Messages of task {task} for the {agent} of {owner}",
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
    """Delete the consumer of *agent* with its pending messages; no error if it does not exist."""
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
            f"The last report of each device of the federation {fed}",
            catalogue.last_value_subjects(fed),
            max_age=RETENTION_S,
            max_bytes=DEVICES_BYTES,
            max_msg_size=2 * MAX_EVENT_BYTES,
            max_msgs_per_subject=1,
            duplicate_window=LEASE_S,  # reports are not repeated, and each remembered id costs memory
            allow_direct=True,
        ),
        _stream_config(
            dead_letter_stream(fed),
            f"Messages of the federation {fed} that could not be decoded, with the reason",
            [subjects.dead_letter(fed, "*", "*")],
            max_age=RETENTION_S,
            max_bytes=DEAD_BYTES,
        ),
        _stream_config(
            lease_stream(fed),
            f"Leases of the federation {fed}: they expire {LEASE_S:g} s after the last renewal",
            [subjects.lease(fed, "*", "*")],
            max_age=LEASE_S,
            max_bytes=LEASE_BYTES,
            max_msgs_per_subject=1,
            duplicate_window=LEASE_S,
        ),
    ]


def _stream_config(name: str, description: str, stream_subjects: list[str], **limits: Any) -> StreamConfig:
    """Configure a stream on disk: a stream in memory would not exist any more after a restart of the server."""
    return StreamConfig(
        name=name,
        description=description,
        subjects=stream_subjects,
        storage=StorageType.FILE,
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.OLD,
        **limits,
    )
