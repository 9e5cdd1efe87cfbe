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
from fedbus.contracts.subjects import PEOPLE, ROOT, SERVER_SIDE
from fedbus.contracts.transition import LIFECYCLES

NAME: Final = "{{name()}}"
"""Where the broker puts the name in somebody's credentials."""
CLIENT_TAG: Final = "{{tag(client)}}"
"""The same of every client that a site's credentials are tagged with."""

TASK_TAG: Final = "{{tag(task)}}"
"""And of every task that they take part in."""

STREAMS: Final = ("EVENTS", "LIFE", "DEVICES", "DEAD", "LEASES")
VERBS: Final = ("PING", "INFO", "STATS")
"""What a NATS micro service is asked about itself."""
ANSWERS_EACH: Final = 4
ANSWER_WITHIN_S: Final = 600.0
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


ABOUT: Final = {
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

AGENTS: Final = {
    Role.DEVICE: (*catalogue.OF_A_CLIENT, AgentName.DEVICE_MONITOR),
    Role.SERVER_MANAGER: (AgentName.SERVER_MANAGER, AgentName.REGISTRAR, AgentName.DEVICE_MONITOR),
    Role.WORKFLOW_SCHEDULER: (AgentName.WORKFLOW_SCHEDULER, AgentName.WORKFLOW_SCHEDULER_NEWS),
    Role.FLOWER_SERVER: (AgentName.FLOWER_SERVER, AgentName.FLOWER_SERVER_GRID),
    Role.TRAINING_MONITOR: (AgentName.TRAINING_MONITOR,),
    Role.GATEWAY: (AgentName.GATEWAY, AgentName.USER),
    Role.USER: (AgentName.USER,),
    Role.OBSERVER: (),
}
"""Whose words each role says."""
OF_THE_SERVER: Final = (
    Role.SERVER_MANAGER,
    Role.WORKFLOW_SCHEDULER,
    Role.FLOWER_SERVER,
    Role.TRAINING_MONITOR,
)
SERVICES: Final[Mapping[AgentName, tuple[str, ...]]] = {
    AgentName.INFERENCE: (AgentName.INFERENCE, "predict"),
    AgentName.TRAINER: (),
    AgentName.FLOWER_SERVER_GRID: (),
    AgentName.WORKFLOW_SCHEDULER_NEWS: (),
    AgentName.USER: (),
}
"""Under which names an agent is a NATS micro service, where it is not its own alone."""
READABLE: Final = ("svc", "srv", "cast", "cmd", "client", "local", "life", "dead", "lease", "deliver")
"""All but blobs: nobody's weights are for people's eyes."""


@dataclass(frozen=True)
class Permissions:
    """What the broker lets through; everything else it does not."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False
    """Whether it may publish on the reply subject of what it was sent, wherever that is."""


def permissions(fed: FederationId, role: Role) -> Permissions:
    match role:
        case Role.DEVICE:
            return _device(fed, NAME)
        case Role.SITE:
            return _site(fed)
        case Role.SERVER:
            return _union([_server_agent(fed, one) for one in OF_THE_SERVER])
        case Role.GATEWAY:
            return _reader(fed, role, subjects.inbox(SERVER_SIDE, AgentName.GATEWAY))
        case Role.USER | Role.OBSERVER:
            return _reader(fed, role, f"{subjects.INBOX}.{PEOPLE}")
        case _:
            return _server_agent(fed, role)


# --- a device ----------------------------------------------------------------------------------


def _device(fed: FederationId, client: str) -> Permissions:
    agents = AGENTS[Role.DEVICE]
    return Permissions(
        publish=_sorted(
            *_words(fed, agents, client),
            *_moves(fed, agents, f"{client}.*"),
            subjects.dead(fed, client, "*"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", f"ask.{client}"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "in.*.*"),
            subjects.blob(fed, f"{client}.*", "cast.*.*"),
        ),
        subscribe=_sorted(
            f"{subjects.INBOX}.{client}.>",
            subjects.deliver(fed, client, "*.*"),
            subjects.predictions(fed, client, "*"),
            subjects.blob(fed, f"{client}.*", "ask.*"),
            subjects.blob(fed, f"{client}.*", "in.>"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "cast.*.*"),
            *_asked_of_a_service(agents),
        ),
        answers=True,
    )


def _site(fed: FederationId) -> Permissions:
    """What its clients may, and their answers by name: the broker knows of no message that a leaf has handed on.

    A leaf is told of a subscription only where it may publish on all that it covers, so where the server side listens
    for chunks by ``in.>``, ``in.*.*`` would not do: no update would ever leave the site.
    """
    its_clients = _device(fed, CLIENT_TAG)
    consumers = [f"{CLIENT_TAG}_{TASK_TAG}_{agent}" for agent in catalogue.OF_A_CLIENT]
    answers = [f"$JS.ACK.{_names(fed)[0]}.{consumer}.>" for consumer in consumers]
    chunks = subjects.blob(fed, f"{SERVER_SIDE}.*", "in.>")
    publish = _sorted(*its_clients.publish, *answers, chunks, f"{subjects.INBOX}.{PEOPLE}.>")
    return Permissions(publish=publish, subscribe=its_clients.subscribe)


# --- the server side -----------------------------------------------------------------------------


def _server_agent(fed: FederationId, role: Role) -> Permissions:
    agents = AGENTS[role]
    heard = [subject for agent in agents for subject in _overheard(fed, agent)]
    return Permissions(
        publish=_sorted(
            *_words(fed, agents, "*"),
            *_moves(fed, agents, ">"),
            subjects.dead(fed, SERVER_SIDE, "*"),
            *(subjects.lease(fed, "*", agent) for agent in agents),
            f"{subjects.INBOX}.>",
            subjects.blob(fed, "*.*", f"ask.{SERVER_SIDE}"),
            subjects.blob(fed, "*.*", "in.*.*"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "cast.*.*"),
            *_streams(fed, "STREAM.CREATE", "STREAM.UPDATE"),
            *_streams_below(fed, "CONSUMER.DURABLE.CREATE", "CONSUMER.DELETE"),
            *_reading(fed),
        ),
        subscribe=_sorted(
            *(f"{subjects.inbox(SERVER_SIDE, agent)}.>" for agent in agents),
            subjects.deliver(fed, SERVER_SIDE, "*.*"),
            *(subjects.lease(fed, "*", agent) for agent in agents),
            *heard,
            subjects.blob(fed, f"{SERVER_SIDE}.*", "ask.*"),
            subjects.blob(fed, f"{SERVER_SIDE}.*", "in.>"),
            subjects.blob(fed, "*.*", "cast.*.*"),
            *_asked_of_a_service(agents),
        ),
    )


def _overheard(fed: FederationId, agent: AgentName) -> list[str]:
    """The requests it answers, and what it hears as it is said."""
    asked = [subjects.every(fed, kind) for kind in catalogue.requests_of(agent)]
    said = [subjects.every(fed, kind) for kind in catalogue.MESSAGES if kind.family == "client"]
    return [*asked, *said]


# --- people ----------------------------------------------------------------------------------------


def _reader(fed: FederationId, role: Role, inbox: str) -> Permissions:
    agents = AGENTS[role]
    asks = [subjects.predictions(fed, "*", "*")] if role is not Role.OBSERVER else []
    return Permissions(
        publish=_sorted(
            *_words(fed, agents, "*"),
            *(subjects.every(fed, kind) for kind in (HealthCheck, GetServerInfo)),
            *(f"$SRV.{verb}" for verb in VERBS),
            *(f"$SRV.{verb}.>" for verb in VERBS),
            *asks,
            *([f"{subjects.INBOX}.{PEOPLE}.>"] if role is Role.GATEWAY else []),
            *_reading(fed),
        ),
        subscribe=_sorted(
            f"{inbox}.>",
            *(f"{ROOT}.{fed}.{family}.>" for family in READABLE),
            *_asked_of_a_service(agents),
        ),
    )


# --- what the roles are made of --------------------------------------------------------------------


def _words(fed: FederationId, agents: tuple[AgentName, ...], client: str) -> list[str]:
    return [
        subjects.every(fed, kind, client=client) for agent in agents for kind in catalogue.SAYS.get(agent, ())
    ]


def _moves(fed: FederationId, agents: tuple[AgentName, ...], thing: str) -> list[str]:
    """The transitions of what they own."""
    return [subjects.life(fed, kind, thing) for kind, one in LIFECYCLES.items() if one.owner in agents]


def _asked_of_a_service(agents: tuple[AgentName, ...]) -> list[str]:
    names = [f"fedbus-{name}" for agent in agents for name in SERVICES.get(agent, (agent,))]
    of_each = [f"$SRV.{verb}.{name}{one}" for verb in VERBS for name in names for one in ("", ".*")]
    return [*(f"$SRV.{verb}" for verb in VERBS), *of_each] if names else []


def _reading(fed: FederationId) -> list[str]:
    """What looking into the streams takes, by consumers of one's own as well."""
    return [
        "$JS.API.INFO",
        "$JS.API.STREAM.NAMES",
        "$JS.API.STREAM.LIST",
        *_streams(fed, "STREAM.INFO", "STREAM.MSG.GET", "CONSUMER.LIST", "CONSUMER.NAMES", "CONSUMER.CREATE"),
        *_streams_below(fed, "CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.MSG.NEXT", "DIRECT.GET"),
        *_streams(fed, "DIRECT.GET"),
        *(f"$JS.{word}.{stream}.>" for stream in _names(fed) for word in ("ACK", "FC")),
    ]


def _streams(fed: FederationId, *calls: str) -> list[str]:
    return [f"$JS.API.{call}.{stream}" for call in calls for stream in _names(fed)]


def _streams_below(fed: FederationId, *calls: str) -> list[str]:
    return [f"{subject}.>" for subject in _streams(fed, *calls)]


def _names(fed: FederationId) -> list[str]:
    return [f"FEDBUS_{fed}_{stream}" for stream in STREAMS]


def _union(parts: list[Permissions]) -> Permissions:
    return Permissions(
        publish=_sorted(*(subject for part in parts for subject in part.publish)),
        subscribe=_sorted(*(subject for part in parts for subject in part.subscribe)),
    )


def _sorted(*found: str) -> tuple[str, ...]:
    return tuple(sorted(set(found)))
