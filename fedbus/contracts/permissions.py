"""Who may say and hear what on a bus that knows its people: one table, read off the catalogue.

A role is what a set of credentials stands for. `permissions` makes of it the subjects that the
broker lets through; the accounts that `fedbus provision` writes, the page in the documentation
and the tests come from the same place. A device's subjects are a template with the client's
name in it, so a new client changes nothing on the server.

Three rules hold the table together, each with a test:

- What a device may publish, it may not subscribe to. A device may *answer* what it is sent, on whatever
  reply subject that names (so it acknowledges what its consumers hand over, and nothing else);
  could it send itself a message, it could name any subject there and then publish on it.
- No device may use the JetStream API, not even to read one message of its own: the answer goes
  where the asker says, the API that makes consumers included. See `recall`.
- Who answers requests answers to inboxes alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fedbus.contracts import catalogue, subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.server import GetServerInfo, HealthCheck
from fedbus.contracts.subjects import ROOT, SERVER_SIDE, USERS
from fedbus.contracts.transition import LIFECYCLES

NAME_TEMPLATE: Final = "{{name()}}"
"""Where the broker puts the name in somebody's credentials."""
CLIENT_TAG_TEMPLATE: Final = "{{tag(client)}}"
"""The same of every client that a site's credentials are tagged with."""

TASK_TAG_TEMPLATE: Final = "{{tag(task)}}"
"""And of every task that they take part in."""

STREAMS: Final = ("EVENTS", "LIFE", "DEVICES", "DEAD", "LEASES")
SERVICE_VERBS: Final = ("PING", "INFO", "STATS")
"""What a NATS micro service is asked about itself."""
MAX_RESPONSES: Final = 4
RESPONSE_TTL_S: Final = 600.0
"""How often, and how long after it came, a device may answer one message."""


class Role(StrEnum):
    """What credentials are for. The server side's agents may share those of the whole server, or have one each."""

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
    Role.DEVICE: "all agents of one client, and the processes they start",
    Role.SITE: "a leaf node, for the clients of one site that it carries",
    Role.SERVER: "all agents of the server side in one process",
    Role.SERVER_MANAGER: "the server manager, and the registrar beside it",
    Role.WORKFLOW_SCHEDULER: "the workflow scheduler",
    Role.FLOWER_SERVER: "the Flower server wrapper, and the processes it starts",
    Role.TRAINING_MONITOR: "the training monitor",
    Role.GATEWAY: "the dashboard: it reads everything but weights, and asks for what its token allows",
    Role.USER: "a person at a terminal who may start and stop things",
    Role.OBSERVER: "a person at a terminal who may look",
}

ROLE_AGENTS: Final = {
    Role.DEVICE: (*catalogue.CLIENT_CONSUMERS, AgentName.DEVICE_MONITOR),
    Role.SERVER_MANAGER: (AgentName.SERVER_MANAGER, AgentName.REGISTRAR, AgentName.DEVICE_MONITOR),
    Role.WORKFLOW_SCHEDULER: (AgentName.WORKFLOW_SCHEDULER, AgentName.WORKFLOW_SCHEDULER_NEWS),
    Role.FLOWER_SERVER: (AgentName.FLOWER_SERVER, AgentName.FLOWER_SERVER_GRID),
    Role.TRAINING_MONITOR: (AgentName.TRAINING_MONITOR,),
    Role.GATEWAY: (AgentName.GATEWAY, AgentName.USER),
    Role.USER: (AgentName.USER,),
    Role.OBSERVER: (),
}
"""Whose words each role says."""
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
    AgentName.WORKFLOW_SCHEDULER_NEWS: (),
    AgentName.USER: (),
}
"""Under which names an agent is a NATS micro service, where it is not its own alone."""
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
"""All but blobs: nobody's weights are for people's eyes."""


@dataclass(frozen=True)
class Permissions:
    """What the broker lets through; everything else it does not."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False
    """Whether it may publish on the reply subject of what it was sent, wherever that is."""


def permissions_for(fed: FederationId, role: Role) -> Permissions:
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
        answers=True,
    )


def _site_permissions(fed: FederationId) -> Permissions:
    """What its clients may, and their answers by name: the broker knows of no message that a leaf has handed on.

    A leaf is told of a subscription only where it may publish on all that it covers, so where the server side listens
    for chunks by ``in.>``, ``in.*.*`` would not do: no update would ever leave the site.
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
    heard = [subject for agent in agents for subject in _served_subjects(fed, agent)]
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
            *heard,
            subjects.blob(fed, f"{SERVER_SIDE}.*", "ask.*"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "in.>"),
            subjects.blob(fed, "*.*", "cast.*.*"),
            *_service_subjects(agents),
        ),
    )


def _served_subjects(fed: FederationId, agent: AgentName) -> list[str]:
    """The requests it answers, and what it hears as it is said."""
    asked = [subjects.wildcard_for(fed, kind) for kind in catalogue.requests_answered_by(agent)]
    said = [subjects.wildcard_for(fed, kind) for kind in catalogue.MESSAGES if kind.family == "client"]
    return [*asked, *said]


# --- people ----------------------------------------------------------------------------------------


def _reader_permissions(fed: FederationId, role: Role, inbox: str) -> Permissions:
    agents = ROLE_AGENTS[role]
    asks = [subjects.predictions(fed, "*", "*")] if role is not Role.OBSERVER else []
    return Permissions(
        publish=_sort_unique(
            *_publish_subjects(fed, agents, "*"),
            *(subjects.wildcard_for(fed, kind) for kind in (HealthCheck, GetServerInfo)),
            *(f"$SRV.{verb}" for verb in SERVICE_VERBS),
            *(f"$SRV.{verb}.>" for verb in SERVICE_VERBS),
            *asks,
            *([f"{subjects.INBOX}.{USERS}.>"] if role is Role.GATEWAY else []),
            *_stream_read_subjects(fed),
        ),
        subscribe=_sort_unique(
            f"{inbox}.>",
            *(f"{ROOT}.{fed}.{family}.>" for family in READABLE_FAMILIES),
            *_service_subjects(agents),
        ),
    )


# --- what the roles are made of --------------------------------------------------------------------


def _publish_subjects(fed: FederationId, agents: tuple[AgentName, ...], client: str) -> list[str]:
    return [
        subjects.wildcard_for(fed, kind, client=client)
        for agent in agents
        for kind in catalogue.PUBLISHES.get(agent, ())
    ]


def _lifecycle_subjects(fed: FederationId, agents: tuple[AgentName, ...], thing: str) -> list[str]:
    """The transitions of what they own."""
    return [subjects.lifecycle(fed, kind, thing) for kind, one in LIFECYCLES.items() if one.owner in agents]


def _service_subjects(agents: tuple[AgentName, ...]) -> list[str]:
    names = [f"fedbus-{name}" for agent in agents for name in SERVICE_NAMES.get(agent, (agent,))]
    of_each = [f"$SRV.{verb}.{name}{one}" for verb in SERVICE_VERBS for name in names for one in ("", ".*")]
    return [*(f"$SRV.{verb}" for verb in SERVICE_VERBS), *of_each] if names else []


def _stream_read_subjects(fed: FederationId) -> list[str]:
    """What looking into the streams takes, by consumers of one's own as well."""
    return [
        "$JS.API.INFO",
        "$JS.API.STREAM.NAMES",
        "$JS.API.STREAM.LIST",
        *_stream_api_subjects(
            fed, "STREAM.INFO", "STREAM.MSG.GET", "CONSUMER.LIST", "CONSUMER.NAMES", "CONSUMER.CREATE"
        ),
        *_stream_api_wildcards(fed, "CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.MSG.NEXT", "DIRECT.GET"),
        *_stream_api_subjects(fed, "DIRECT.GET"),
        *(f"$JS.{word}.{stream}.>" for stream in _stream_names(fed) for word in ("ACK", "FC")),
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


def _sort_unique(*found: str) -> tuple[str, ...]:
    return tuple(sorted(set(found)))
