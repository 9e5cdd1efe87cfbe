"""The catalogue has every message, and the tables that are derived from it are consistent."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from support.subjects import matches_subject

from fedbus import agents, contracts
from fedbus.contracts import subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.catalogue import (
    BY_TYPE,
    CLIENT_AGENTS,
    CLIENT_CONSUMERS,
    FOLLOWS_LIFECYCLES,
    MESSAGES,
    PUBLISHES,
    SERVER_AGENTS,
    SUBSCRIBES,
    requests_answered_by,
    stream_subjects,
    subscribed_subjects,
)
from fedbus.contracts.examples import EXAMPLES, REPLIES
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import CLIENT_FAMILIES, Body, ClientMessage, Family, Message, Refused, Request
from fedbus.contracts.run import StartRun
from fedbus.contracts.transition import LIFECYCLES, Transition

DEV = FederationId("dev")
each_message = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.name)
each_request = pytest.mark.parametrize(
    "kind", [kind for kind in MESSAGES if issubclass(kind, Request)], ids=lambda kind: kind.name
)
each_consumer = pytest.mark.parametrize("agent", [*SUBSCRIBES, *FOLLOWS_LIFECYCLES])

AGENT_OF_MODULE = {"client_app_process": "trainer"}
"""A module that publishes under another name than that of its package."""

FOR_USERS = {
    "declined",
    "model_prepared",
    "model_turned_down",
    "model_shadowed",
    "model_canaried",
    "model_committed",
    "capture_paused",
    "capture_resumed",
}
"""Stored messages without a consumer among the agents. Users and the dashboard read them."""


def test_the_catalogue_has_every_message_class() -> None:
    declared = set[type[Message]]()
    for module in pkgutil.iter_modules(contracts.__path__, f"{contracts.__name__}."):
        declared |= {
            kind
            for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            if issubclass(kind, Message) and "name" in vars(kind)
        }

    assert declared == set(MESSAGES)
    assert len(MESSAGES) == len(set(MESSAGES)) == len(BY_TYPE)


@each_message
def test_every_message_has_a_docstring(kind: type[Message]) -> None:
    assert kind.__doc__ not in (None, Message.__doc__, Request.__doc__, ClientMessage.__doc__)


@each_message
def test_a_message_has_a_client_if_its_subject_has_one(kind: type[Message]) -> None:
    assert issubclass(kind, ClientMessage) == (kind.family in CLIENT_FAMILIES)


@each_message
def test_a_message_has_an_example(kind: type[Message]) -> None:
    assert type(EXAMPLES[kind]) is kind


def test_every_reply_has_an_example() -> None:
    kinds = {kind.reply_type for kind in MESSAGES if issubclass(kind, Request)}
    assert set(REPLIES) == {*kinds, Refused}


def test_the_example_of_a_transition_is_legal() -> None:
    example = EXAMPLES[Transition]
    assert isinstance(example, Transition)
    assert example.is_legal


# --- publishers and consumers -----------------------------------------------------------------


@each_message
def test_each_message_has_exactly_one_publisher(kind: type[Message]) -> None:
    publishers = [agent for agent, kinds in PUBLISHES.items() if kind in kinds]
    if kind is StartRun:  # by users, and by the server manager for a trial run of new code
        assert publishers == ["server-manager", "user"]
    else:
        assert len(publishers) == (0 if kind is Transition else 1)


@each_message
def test_each_stored_message_has_a_consumer(kind: type[Message]) -> None:
    consumers = [agent for agent, kinds in SUBSCRIBES.items() if kind in kinds]
    only_for_users = kind.name in FOR_USERS
    assert bool(consumers) == (kind.durable and kind is not Transition and not only_for_users)


@each_consumer
def test_an_agent_consumes_messages_of_one_stream(agent: AgentName) -> None:
    """A durable consumer reads one stream, so a message that is not in it would never arrive."""
    stored = {subject.rpartition(".")[2] for subject in stream_subjects(DEV)}
    consumed = {
        subject.rpartition(".")[2] for subject in subscribed_subjects(DEV, agent, task="mnist", client="c1")
    }
    assert consumed <= stored or agent in FOLLOWS_LIFECYCLES


@each_consumer
def test_an_agent_of_a_client_consumes_only_its_own_messages(agent: AgentName) -> None:
    for subject in subscribed_subjects(DEV, agent, task="mnist", client="c1"):
        assert "mnist" in subject.split(".")
        if agent in CLIENT_CONSUMERS:
            assert subjects.client_in(subject) in ("c1", None)


def test_a_device_does_not_consume_events_of_other_clients() -> None:
    for agent in CLIENT_CONSUMERS:
        for kind in SUBSCRIBES[agent]:
            other = subjects.wildcard_for(DEV, kind, client="c2", task="mnist")
            consumed = subscribed_subjects(DEV, agent, task="mnist", client="c1")
            assert kind.family is Family.CAST or not any(matches_subject(one, other) for one in consumed)


@each_request
def test_each_request_has_an_agent_that_answers_it(kind: type[Request[Body]]) -> None:
    assert kind.responder in SERVER_AGENTS
    assert kind in requests_answered_by(kind.responder)
    assert not kind.durable


def test_the_scheduler_follows_the_server_of_its_task() -> None:
    assert subscribed_subjects(DEV, AgentName.WORKFLOW_SCHEDULER, task="mnist") == [
        "fedbus.dev.life.server.mnist"
    ]
    assert set(FOLLOWS_LIFECYCLES.values()) <= set(LIFECYCLES)


def test_publishers_and_consumers_are_agents_or_users() -> None:
    parts = {"trainer", "flower-server-grid", "workflow-scheduler-news", "user"}
    assert {*PUBLISHES, *SUBSCRIBES, *FOLLOWS_LIFECYCLES} - parts <= {*SERVER_AGENTS, *CLIENT_AGENTS}


def test_an_agent_publishes_only_its_own_messages() -> None:
    modules = [path for path in Path(agents.__path__[0]).rglob("*.py") if path.parent.name != "common"]
    assert len(modules) > 30
    known = {kind.__name__: kind for kind in MESSAGES}
    for path in modules:
        package = path.relative_to(agents.__path__[0]).parts[0]
        agent = AGENT_OF_MODULE.get(path.stem, package.replace("_", "-"))
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        created = {known[call.id] for call in calls if isinstance(call, ast.Name) and call.id in known}
        publishes = {str(name): kinds for name, kinds in PUBLISHES.items()}
        assert created <= {*publishes.get(agent, ()), Transition}, path.name


# --- the streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subject",
    [
        *[subjects.subject_for(DEV, EXAMPLES[kind]) for kind in MESSAGES if not kind.durable],
        subjects.blob(DEV, "c1.trainer_0123", "get"),
        subjects.dead_letter(DEV, "c1", "inference"),
        subjects.deliver(DEV, "c1", "mnist.inference"),
        "_INBOX.c1.trainer.abc",
    ],
)
def test_the_event_stream_has_only_stored_messages(subject: str) -> None:
    assert not any(matches_subject(stored, subject) for stored in stream_subjects(DEV))


@pytest.mark.parametrize(
    "kind", [kind for kind in MESSAGES if kind.durable and kind is not Transition], ids=lambda kind: kind.name
)
def test_the_event_stream_stores_a_durable_message_once(kind: type[Message]) -> None:
    subject = subjects.subject_for(DEV, EXAMPLES[kind])
    assert sum(matches_subject(stored, subject) for stored in stream_subjects(DEV)) == 1
