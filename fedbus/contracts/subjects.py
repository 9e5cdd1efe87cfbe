"""The NATS subjects. No other module builds a subject. *fed* is the federation.

    fedbus.<fed>.svc.<task>.<request>             a request to the server side, answered on its reply subject
    fedbus.<fed>.svc.<task>.<request>.<client>    a request about the requesting client
    fedbus.<fed>.srv.<task>.<event>               between the agents of the server side
    fedbus.<fed>.cast.<task>.<event>              server side -> all clients
    fedbus.<fed>.cmd.<client>.<task>.<command>    server side -> one client; stored until the client consumes it
    fedbus.<fed>.client.<client>.<task>.<event>   one client -> server side
    fedbus.<fed>.local.<client>.<task>.<name>     between the agents of one client
    fedbus.<fed>.life.<kind>.<task or client.task or run>   the transitions of one entity
    fedbus.<fed>.blob.<owner>.<holder>.<name>     blobs, see `fedbus.bus.blobs`
    fedbus.<fed>.dead.<owner>.<agent>             dead letters
    fedbus.<fed>.lease.<task>.<agent>             the lease of an agent, see `fedbus.bus.lease`
    fedbus.<fed>.deliver.<owner>.<task>.<agent>   the delivery subject of a durable consumer
    _INBOX.<owner>.<agent>                        the replies to an agent's requests

An *owner* is a client, the server side or the users.

The client has a token of its own, so that permissions are one template for all clients: see
`fedbus.contracts.permissions`. No stream covers ``svc`` or ``blob``, because a stream acknowledges each
message that it stores, and the requester would take the acknowledgement for the reply.
"""

import functools

from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import CLIENT_FAMILIES, ClientMessage, ClientRequest, Family, Message

ROOT = "fedbus"
SERVER_SIDE = "server"
"""The owner token of the agents of the server side. No client may have this id."""
USERS = "people"
"""The owner token of users. No client may have this id."""
RESERVED_OWNERS = frozenset({SERVER_SIDE, USERS})
INBOX = "_INBOX"


class InvalidSubject(ValueError):
    """A subject that this module did not build."""


def subject_for(fed: FederationId, message: Message) -> str:
    """Return the subject of *message*. For transitions, see `lifecycle`."""
    if isinstance(message, ClientMessage):
        return f"{ROOT}.{fed}.{message.family}.{message.client}.{message.task}.{message.name}"
    assert message.family not in CLIENT_FAMILIES | {Family.LIFE}, message.name
    subject = f"{ROOT}.{fed}.{message.family}.{message.task}.{message.name}"
    return f"{subject}.{message.client}" if isinstance(message, ClientRequest) else subject


def wildcard_for(fed: FederationId, kind: type[Message], *, client: str = "*", task: str = "*") -> str:
    """Return the subject of all messages of one *kind*, optionally of one *client* or one *task*."""
    if kind.family is Family.LIFE:
        return f"{ROOT}.{fed}.life.>"
    if kind.family in CLIENT_FAMILIES:
        return f"{ROOT}.{fed}.{kind.family}.{client}.{task}.{kind.name}"
    subject = f"{ROOT}.{fed}.{kind.family}.{task}.{kind.name}"
    return f"{subject}.{client}" if issubclass(kind, ClientRequest) else subject


@functools.cache
def template(kind: type[Message]) -> str:
    """Return the subject of messages of one *kind*, with its variable tokens in braces."""
    fed = FederationId("{federation}")
    if kind.family is Family.LIFE:
        return lifecycle(fed, "{kind}", "{key}")
    return wildcard_for(fed, kind, client="{client}", task="{task}")


def federation_wildcard(fed: FederationId) -> str:
    """Return the subject of all messages in *fed*.

    Use it as the only filter of a consumer that starts at a time: with several filters and a start time,
    nats-server 2.15.1 skips the first messages.
    """
    return f"{ROOT}.{fed}.>"


def lifecycle(fed: FederationId, kind: str, key: str) -> str:
    """Return the subject of the transitions of one entity. The last message on it is the entity's state."""
    return f"{ROOT}.{fed}.life.{kind}.{key}"


def predictions(fed: FederationId, client: str, task: str) -> str:
    """Return the subject for prediction requests to *client*. Request and reply are plain JSON without an envelope."""
    return f"{ROOT}.{fed}.{Family.LOCAL}.{client}.{task}.predict"


def blob(fed: FederationId, holder: str, name: str) -> str:
    """Return a subject of the blob protocol. *holder* is an owner and a process: ``c1.trainer_0123``."""
    return f"{ROOT}.{fed}.blob.{holder}.{name}"


def dead_letter(fed: FederationId, owner: str, agent: str) -> str:
    return f"{ROOT}.{fed}.dead.{owner}.{agent}"


def lease(fed: FederationId, task: str, agent: str) -> str:
    return f"{ROOT}.{fed}.lease.{task}.{agent}"


def deliver(fed: FederationId, owner: str, agent: str) -> str:
    return f"{ROOT}.{fed}.deliver.{owner}.{agent}"


def inbox(owner: str, agent: str) -> str:
    """Return the prefix of the reply subjects of one agent's requests."""
    return f"{INBOX}.{owner}.{agent}"


def client_in(subject: str) -> str | None:
    """Return the client whose id is in *subject*; None if there is none."""
    _, _, family, *rest = _tokens(subject)
    return rest[0] if family in CLIENT_FAMILIES and len(rest) == 3 else None


def federation_in(subject: str) -> FederationId:
    return FederationId(_tokens(subject)[1])


def _tokens(subject: str) -> list[str]:
    tokens = subject.split(".")
    if len(tokens) < 4 or tokens[0] != ROOT:
        raise InvalidSubject(f"{subject!r} is not a fedbus subject")
    return tokens
