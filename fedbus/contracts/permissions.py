"""The subjects that each role may publish and subscribe to, derived from the catalogue.

Each set of credentials has one role. `permissions_for` returns the subjects that nats-server allows for it.
The accounts of `fedbus provision`, the permissions page of the documentation and the tests use the same
function. The subjects of a device are a template with the client's name, so a new client changes nothing on
the server.

Three rules, each with a test:

- A device may not subscribe to a subject that it may publish to. A device may publish to the reply subject
  of each message it receives, which it needs for acknowledgements. If it could send a message to itself, it
  could set any reply subject and then publish to that.
- A device may not use the JetStream API, not even to read one of its own messages. JetStream sends its
  response to any reply subject, including the API subject that creates consumers. See
  `fedbus.contracts.state_recall`.
- An agent that answers requests may publish replies to inboxes only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fedbus.contracts import catalogue, subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Family
from fedbus.contracts.server import GetServerInfo, HealthCheck
from fedbus.contracts.subjects import ROOT, SERVER_SIDE, USERS
from fedbus.contracts.transition import LIFECYCLES

NAME_TEMPLATE: Final = "{{name()}}"
"""nats-server replaces it by the name in the credentials."""
CLIENT_TAG_TEMPLATE: Final = "{{tag(client)}}"
"""nats-server replaces it by each client that the credentials of a site have as tag."""
TASK_TAG_TEMPLATE: Final = "{{tag(task)}}"
"""nats-server replaces it by each task that the credentials of a site have as tag."""

STREAMS: Final = ("EVENTS", "LIFE", "DEVICES", "DEAD", "LEASES")
SERVICE_VERBS: Final = ("PING", "INFO", "STATS")
"""The discovery requests of the NATS micro-service protocol."""
MAX_RESPONSES: Final = 4
"""How often a device may publish to the reply subject of one message."""
RESPONSE_TTL_S: Final = 600.0
"""How long after a message a device may publish to its reply subject."""


class Role(StrEnum):
    """The role of a set of credentials.

    The agents of the server side can share the credentials of ``server``, or have credentials of their own role.
    """

    DEVICE = "device"
    SITE = "site"
    SERVER = "server"
    SERVER_MANAGER = "server-manager"
    WORKFLOW_SCHEDULER = "workflow-scheduler"
    FLOWER_SERVER = "flower-server"
    TRAINING_MONITOR = "training-monitor"
    GATEWAY = "gateway"
    USER = "user"
    OBSERVER = "observer"


ROLE_DESCRIPTIONS: Final = {
    Role.DEVICE: "all agents of one client, and the processes that they start",
    Role.SITE: "the leaf node of a site, which forwards the messages of the clients at the site",
    Role.SERVER: "all agents of the server side in one process",
    Role.SERVER_MANAGER: "the server manager and the registrar",
    Role.WORKFLOW_SCHEDULER: "the workflow scheduler",
    Role.FLOWER_SERVER: "the Flower server, and the processes that it starts",
    Role.TRAINING_MONITOR: "the training monitor",
    Role.GATEWAY: "the gateway of the dashboard, which reads everything except weights and sends the commands of users",
    Role.USER: "a user who may read everything except weights, and who may send commands",
    Role.OBSERVER: "a user who may read everything except weights",
}

ROLE_AGENTS: Final = {
    Role.DEVICE: (*catalogue.CLIENT_CONSUMERS, AgentName.DEVICE_MONITOR),
    Role.SERVER_MANAGER: (AgentName.SERVER_MANAGER, AgentName.REGISTRAR, AgentName.DEVICE_MONITOR),
    Role.WORKFLOW_SCHEDULER: (AgentName.WORKFLOW_SCHEDULER, AgentName.WORKFLOW_SCHEDULER_INPUTS),
    Role.FLOWER_SERVER: (AgentName.FLOWER_SERVER, AgentName.FLOWER_SERVER_GRID),
    Role.TRAINING_MONITOR: (AgentName.TRAINING_MONITOR,),
    Role.GATEWAY: (AgentName.GATEWAY, AgentName.USER),
    Role.USER: (AgentName.USER,),
    Role.OBSERVER: (),
}
"""The agents of each role."""
SERVER_ROLES: Final = (
    Role.SERVER_MANAGER,
    Role.WORKFLOW_SCHEDULER,
    Role.FLOWER_SERVER,
    Role.TRAINING_MONITOR,
)
SERVICE_NAMES: Final[Mapping[AgentName, tuple[str, ...]]] = {
    AgentName.INFERENCE: (AgentName.INFERENCE, "predict"),
    AgentName.TRAINER: (),
    AgentName.FLOWER_SERVER_GRID: (),
    AgentName.WORKFLOW_SCHEDULER_INPUTS: (),
    AgentName.USER: (),
}
"""The names of an agent's NATS micro services, if they differ from the agent's name."""
READABLE_FAMILIES: Final = (
    "svc",
    "srv",
    "cast",
    "cmd",
    "client",
    "local",
    "life",
    "dead",
    "lease",
    "deliver",
)
"""The families that users may read: all except blobs, because weights stay among agents."""


@dataclass(frozen=True)
class Permissions:
    """The subjects that nats-server allows. It denies all others."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    allow_responses: bool = False
    """True if it may publish to the reply subject of each message it receives."""


def permissions_for(fed: FederationId, role: Role) -> Permissions:
    """Return the permissions of *role* in federation *fed*."""
    match role:
        case Role.DEVICE:
            return _device_permissions(fed, NAME_TEMPLATE)
        case Role.SITE:
            return _site_permissions(fed)
        case Role.SERVER:
            return _merge_permissions([_server_agent_permissions(fed, one) for one in SERVER_ROLES])
        case Role.GATEWAY:
            return _reader_permissions(fed, role, subjects.inbox(SERVER_SIDE, AgentName.GATEWAY))
        case Role.USER | Role.OBSERVER:
            return _reader_permissions(fed, role, f"{subjects.INBOX}.{USERS}")
        case _:
            return _server_agent_permissions(fed, role)


# --- a device ----------------------------------------------------------------------------------


def _device_permissions(fed: FederationId, client: str) -> Permissions:
    agents = ROLE_AGENTS[Role.DEVICE]
    return Permissions(
        publish=_sort_unique(
            *_publish_subjects(fed, agents, client),
            *_lifecycle_subjects(fed, agents, f"{client}.*"),
            subjects.dead_letter(fed, client, "*"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", f"ask.{client}"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "in.*.*"),
            subjects.blob(fed, f"{client}.*", "cast.*.*"),
        ),
        subscribe=_sort_unique(
            f"{subjects.INBOX}.{client}.>",
            subjects.deliver(fed, client, "*.*"),
            subjects.predictions(fed, client, "*"),
            subjects.blob(fed, f"{client}.*", "ask.*"),
            subjects.blob(fed, f"{client}.*", "in.>"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "cast.*.*"),
            *_service_subjects(agents),
        ),
        allow_responses=True,
    )


def _site_permissions(fed: FederationId) -> Permissions:
    """Return the permissions of all clients of the site, and the subjects of their acknowledgements.

    nats-server does not track the reply subjects of messages that it sends to a leaf node, so the
    acknowledgements need explicit subjects. It announces a subscription to a leaf node only if the leaf may
    publish to everything that the subscription covers. The server side subscribes to chunks with ``in.>``, so
    with ``in.*.*`` no update would leave the site.
    """
    its_clients = _device_permissions(fed, CLIENT_TAG_TEMPLATE)
    consumers = [f"{CLIENT_TAG_TEMPLATE}_{TASK_TAG_TEMPLATE}_{agent}" for agent in catalogue.CLIENT_CONSUMERS]
    answers = [f"$JS.ACK.{_stream_names(fed)[0]}.{consumer}.>" for consumer in consumers]
    chunks = subjects.blob(fed, f"{SERVER_SIDE}.*", "in.>")
    publish = _sort_unique(*its_clients.publish, *answers, chunks, f"{subjects.INBOX}.{USERS}.>")
    return Permissions(publish=publish, subscribe=its_clients.subscribe)


# --- the server side -----------------------------------------------------------------------------


def _server_agent_permissions(fed: FederationId, role: Role) -> Permissions:
    agents = ROLE_AGENTS[role]
    served = [subject for agent in agents for subject in _served_subjects(fed, agent)]
    return Permissions(
        publish=_sort_unique(
            *_publish_subjects(fed, agents, "*"),
            *_lifecycle_subjects(fed, agents, ">"),
            subjects.dead_letter(fed, SERVER_SIDE, "*"),
            *(subjects.lease(fed, "*", agent) for agent in agents),
            f"{subjects.INBOX}.>",
            subjects.blob(fed, "*.*", f"ask.{SERVER_SIDE}"),
            subjects.blob(fed, "*.*", "in.*.*"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "cast.*.*"),
            *_stream_api_subjects(fed, "STREAM.CREATE", "STREAM.UPDATE"),
            *_stream_api_wildcards(fed, "CONSUMER.DURABLE.CREATE", "CONSUMER.DELETE"),
            *_stream_read_subjects(fed),
        ),
        subscribe=_sort_unique(
            *(f"{subjects.inbox(SERVER_SIDE, agent)}.>" for agent in agents),
            subjects.deliver(fed, SERVER_SIDE, "*.*"),
            *(subjects.lease(fed, "*", agent) for agent in agents),
            *served,
            subjects.blob(fed, f"{SERVER_SIDE}.*", "ask.*"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "in.>"),
            subjects.blob(fed, "*.*", "cast.*.*"),
            *_service_subjects(agents),
        ),
    )


def _served_subjects(fed: FederationId, agent: AgentName) -> list[str]:
    """Return the subjects of the requests that *agent* answers, and of all events of clients."""
    requests = [subjects.wildcard_for(fed, kind) for kind in catalogue.requests_answered_by(agent)]
    events = [subjects.wildcard_for(fed, kind) for kind in catalogue.MESSAGES if kind.family is Family.CLIENT]
    return [*requests, *events]


# --- users -----------------------------------------------------------------------------------------


def _reader_permissions(fed: FederationId, role: Role, inbox: str) -> Permissions:
    agents = ROLE_AGENTS[role]
    predictions = [subjects.predictions(fed, "*", "*")] if role is not Role.OBSERVER else []
    return Permissions(
        publish=_sort_unique(
            *_publish_subjects(fed, agents, "*"),
            *(subjects.wildcard_for(fed, kind) for kind in (HealthCheck, GetServerInfo)),
            *(f"$SRV.{verb}" for verb in SERVICE_VERBS),
            *(f"$SRV.{verb}.>" for verb in SERVICE_VERBS),
            *predictions,
            *([f"{subjects.INBOX}.{USERS}.>"] if role is Role.GATEWAY else []),
            *_stream_read_subjects(fed),
        ),
        subscribe=_sort_unique(
            f"{inbox}.>",
            *(f"{ROOT}.{fed}.{family}.>" for family in READABLE_FAMILIES),
            *_service_subjects(agents),
        ),
    )


# --- parts of the roles ----------------------------------------------------------------------------


def _publish_subjects(fed: FederationId, agents: tuple[AgentName, ...], client: str) -> list[str]:
    return [
        subjects.wildcard_for(fed, kind, client=client)
        for agent in agents
        for kind in catalogue.PUBLISHES.get(agent, ())
    ]


def _lifecycle_subjects(fed: FederationId, agents: tuple[AgentName, ...], key: str) -> list[str]:
    """Return the transition subjects of all lifecycles that *agents* own."""
    return [subjects.lifecycle(fed, kind, key) for kind, one in LIFECYCLES.items() if one.owner in agents]


def _service_subjects(agents: tuple[AgentName, ...]) -> list[str]:
    names = [f"fedbus-{name}" for agent in agents for name in SERVICE_NAMES.get(agent, (agent,))]
    of_each = [f"$SRV.{verb}.{name}{one}" for verb in SERVICE_VERBS for name in names for one in ("", ".*")]
    return [*(f"$SRV.{verb}" for verb in SERVICE_VERBS), *of_each] if names else []


def _stream_read_subjects(fed: FederationId) -> list[str]:
    """Return the API subjects for reading the streams, with consumers of the reader's own."""
    return [
        "$JS.API.INFO",
        "$JS.API.STREAM.NAMES",
        "$JS.API.STREAM.LIST",
        *_stream_api_subjects(
            fed, "STREAM.INFO", "STREAM.MSG.GET", "CONSUMER.LIST", "CONSUMER.NAMES", "CONSUMER.CREATE"
        ),
        *_stream_api_wildcards(fed, "CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.MSG.NEXT", "DIRECT.GET"),
        *_stream_api_subjects(fed, "DIRECT.GET"),
        *(f"$JS.{name}.{stream}.>" for stream in _stream_names(fed) for name in ("ACK", "FC")),
    ]


def _stream_api_subjects(fed: FederationId, *calls: str) -> list[str]:
    return [f"$JS.API.{call}.{stream}" for call in calls for stream in _stream_names(fed)]


def _stream_api_wildcards(fed: FederationId, *calls: str) -> list[str]:
    return [f"{subject}.>" for subject in _stream_api_subjects(fed, *calls)]


def _stream_names(fed: FederationId) -> list[str]:
    return [f"FEDBUS_{fed}_{stream}" for stream in STREAMS]


def _merge_permissions(parts: list[Permissions]) -> Permissions:
    return Permissions(
        publish=_sort_unique(*(subject for part in parts for subject in part.publish)),
        subscribe=_sort_unique(*(subject for part in parts for subject in part.subscribe)),
    )


def _sort_unique(*names: str) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
