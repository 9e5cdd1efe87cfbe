"""The one place that knows how subjects are spelled. *fed* is the federation.

    fedbus.<fed>.svc.<task>.<request>             a request to the server side, answered on its reply subject
    fedbus.<fed>.svc.<task>.<request>.<client>    the same, where it is about the client that asks
    fedbus.<fed>.srv.<task>.<event>               between the agents of the server side
    fedbus.<fed>.cast.<task>.<event>              server side -> all clients
    fedbus.<fed>.cmd.<client>.<task>.<command>    server side -> one client; kept while it is away
    fedbus.<fed>.client.<client>.<task>.<event>   one client -> server side
    fedbus.<fed>.local.<client>.<task>.<word>     between the agents of one client
    fedbus.<fed>.life.<kind>.<task or client.task or run>   a lifecycle has moved
    fedbus.<fed>.blob.<owner>.<holder>.<word>     weights in flight, see `fedbus.bus.blobs`
    fedbus.<fed>.dead.<owner>.<agent>             what could not be read, with the reason
    fedbus.<fed>.lease.<task>.<agent>             which of several agents acts, see `fedbus.bus.lease`
    fedbus.<fed>.deliver.<owner>.<task>.<agent>   where the bus puts what a durable consumer holds
    _INBOX.<owner>.<agent>                        where the answers to requests go

An *owner* is a client, or the server side, or people.

The identity stands in a token of its own, so that permissions can be a template per client: see
`fedbus.contracts.permissions_for`. A
stream never covers ``svc`` or ``blob``: it acknowledges whatever it stores, and would
answer before the agent could.
"""

import functools

from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import CLIENT_FAMILIES, ClientMessage, ClientRequest, Family, Message

ROOT = "fedbus"
SERVER_SIDE = "server"
"""Stands where a client's id would, for the agents of the server side. No client may be called so."""
USERS = "people"
"""The same for whoever sits at a terminal."""
RESERVED_OWNERS = frozenset({SERVER_SIDE, USERS})
"""Owners that are no clients."""
INBOX = "_INBOX"


class InvalidSubject(ValueError):
    """A subject that is not spelled as this module spells them."""


def subject_for(fed: FederationId, message: Message) -> str:
    """Where *message* goes. Transitions know their own place: see `life`."""
    if isinstance(message, ClientMessage):
        return f"{ROOT}.{fed}.{message.family}.{message.client}.{message.task}.{message.word}"
    assert message.family not in CLIENT_FAMILIES | {Family.LIFE}, message.word
    subject = f"{ROOT}.{fed}.{message.family}.{message.task}.{message.word}"
    return f"{subject}.{message.client}" if isinstance(message, ClientRequest) else subject


def wildcard_for(fed: FederationId, kind: type[Message], *, client: str = "*", task: str = "*") -> str:
    """All messages of one *kind*, or those of one *client* or one *task*."""
    if kind.family is Family.LIFE:
        return f"{ROOT}.{fed}.life.>"
    if kind.family in CLIENT_FAMILIES:
        return f"{ROOT}.{fed}.{kind.family}.{client}.{task}.{kind.word}"
    subject = f"{ROOT}.{fed}.{kind.family}.{task}.{kind.word}"
    return f"{subject}.{client}" if issubclass(kind, ClientRequest) else subject


@functools.cache
def template(kind: type[Message]) -> str:
    """Where messages of one *kind* go, with what differs among them in braces."""
    fed = FederationId("{federation}")
    if kind.family is Family.LIFE:
        return lifecycle(fed, "{kind}", "{thing}")
    return wildcard_for(fed, kind, client="{client}", task="{task}")


def federation_wildcard(fed: FederationId) -> str:
    """All that is said in *fed*. The one filter for a whole stream from some time on.

    nats-server 2.15.1 leaves out the first messages where a start time meets several filters.
    """
    return f"{ROOT}.{fed}.>"


def lifecycle(fed: FederationId, kind: str, thing: str) -> str:
    """Where the transitions of one *thing* go: its last message is its state."""
    return f"{ROOT}.{fed}.life.{kind}.{thing}"


def predictions(fed: FederationId, client: str, task: str) -> str:
    """Where anybody on the bus may ask *client* for a prediction: plain JSON both ways, no envelope."""
    return f"{ROOT}.{fed}.{Family.LOCAL}.{client}.{task}.predict"


def blob(fed: FederationId, holder: str, word: str) -> str:
    """*holder* is an owner and a name of its own: ``c1.trainer_0123``."""
    return f"{ROOT}.{fed}.blob.{holder}.{word}"


def dead_letter(fed: FederationId, owner: str, agent: str) -> str:
    return f"{ROOT}.{fed}.dead.{owner}.{agent}"


def lease(fed: FederationId, task: str, agent: str) -> str:
    return f"{ROOT}.{fed}.lease.{task}.{agent}"


def deliver(fed: FederationId, owner: str, agent: str) -> str:
    return f"{ROOT}.{fed}.deliver.{owner}.{agent}"


def inbox(owner: str, agent: str) -> str:
    """The beginning of all places where the answers to one agent's requests go."""
    return f"{INBOX}.{owner}.{agent}"


def client_in(subject: str) -> str | None:
    """The client whose id stands in *subject*, or None where none does."""
    _, _, family, *rest = _tokens(subject)
    return rest[0] if family in CLIENT_FAMILIES and len(rest) == 3 else None


def federation_in(subject: str) -> FederationId:
    return FederationId(_tokens(subject)[1])


def _tokens(subject: str) -> list[str]:
    tokens = subject.split(".")
    if len(tokens) < 4 or tokens[0] != ROOT:
        raise InvalidSubject(f"{subject!r} is not a subject of fedbus")
    return tokens
