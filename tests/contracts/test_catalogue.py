"""The catalogue: every message is in it, and what is derived from it agrees."""

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
from fedbus.contracts.examples import EXAMPLES, REPLIES, reply_types
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import CLIENT_FAMILIES, ClientMessage, Family, Message, Request
from fedbus.contracts.run import StartRun
from fedbus.contracts.transition import LIFECYCLES, Transition

DEV = FederationId("dev")
each_message = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.word)
each_request = pytest.mark.parametrize(
    "kind", [kind for kind in MESSAGES if issubclass(kind, Request)], ids=lambda kind: kind.word
)
each_listener = pytest.mark.parametrize("agent", [*SUBSCRIBES, *FOLLOWS_LIFECYCLES])

AGENT_OF_MODULE = {"client_app_process": "trainer"}
"""A module that publishes under another name than that of its package."""

FOR_PEOPLE = {
    "declined",
    "model_prepared",
    "model_turned_down",
    "model_shadowed",
    "model_canaried",
    "model_committed",
    "capture_paused",
    "capture_resumed",
}
"""Words that are kept and that no agent needs: people and dashboards watch the stream for them."""


def test_every_message_that_is_declared_is_listed() -> None:
    declared = set[type[Message]]()
    for module in pkgutil.iter_modules(contracts.__path__, f"{contracts.__name__}."):
        declared |= {
            kind
            for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            if issubclass(kind, Message) and "word" in vars(kind)
        }

    assert declared == set(MESSAGES)
    assert len(MESSAGES) == len(set(MESSAGES)) == len(BY_TYPE)


@each_message
def test_a_message_says_in_a_sentence_what_it_is(kind: type[Message]) -> None:
    assert kind.__doc__ not in (None, Message.__doc__, Request.__doc__, ClientMessage.__doc__)


@each_message
def test_a_message_names_its_client_where_its_subject_does(kind: type[Message]) -> None:
    assert issubclass(kind, ClientMessage) == (kind.family in CLIENT_FAMILIES)


@each_message
def test_a_message_has_an_example(kind: type[Message]) -> None:
    assert type(EXAMPLES[kind]) is kind


def test_an_answer_has_an_example() -> None:
    assert set(REPLIES) == set(reply_types())


def test_the_example_of_a_transition_is_legal() -> None:
    example = EXAMPLES[Transition]
    assert isinstance(example, Transition)
    assert example.is_legal


# --- who says and who hears -------------------------------------------------------------------


@each_message
def test_each_word_is_said_by_exactly_one_agent(kind: type[Message]) -> None:
    speakers = [agent for agent, said in PUBLISHES.items() if kind in said]
    if kind is StartRun:  # by people, and for new code by itself
        assert speakers == ["server-manager", "user"]
    else:
        assert len(speakers) == (0 if kind is Transition else 1)


@each_message
def test_what_is_kept_is_heard_by_somebody(kind: type[Message]) -> None:
    listeners = [agent for agent, heard in SUBSCRIBES.items() if kind in heard]
    for_people_alone = kind.word in FOR_PEOPLE
    assert bool(listeners) == (kind.durable and kind is not Transition and not for_people_alone)


@each_listener
def test_an_agent_hears_what_is_kept_in_one_stream(agent: AgentName) -> None:
    """A durable consumer reads one stream, so what is lost on others must not be in its list."""
    kept = {subject.rpartition(".")[2] for subject in stream_subjects(DEV)}
    words = {
        subject.rpartition(".")[2] for subject in subscribed_subjects(DEV, agent, task="mnist", client="c1")
    }
    assert words <= kept or agent in FOLLOWS_LIFECYCLES


@each_listener
def test_a_listener_on_a_device_hears_of_its_own_client_and_task_alone(agent: AgentName) -> None:
    for subject in subscribed_subjects(DEV, agent, task="mnist", client="c1"):
        assert "mnist" in subject.split(".")
        if agent in CLIENT_CONSUMERS:
            assert subjects.client_in(subject) in ("c1", None)


def test_a_device_hears_nothing_that_other_clients_say() -> None:
    for agent in CLIENT_CONSUMERS:
        for kind in SUBSCRIBES[agent]:
            other = subjects.wildcard_for(DEV, kind, client="c2", task="mnist")
            wanted = subscribed_subjects(DEV, agent, task="mnist", client="c1")
            assert kind.family is Family.CAST or not any(matches_subject(one, other) for one in wanted)


@each_request
def test_a_request_is_answered_by_an_agent_that_serves_it(kind: type[Request]) -> None:
    assert kind.server in SERVER_AGENTS
    assert kind in requests_answered_by(kind.server)
    assert not kind.durable


def test_what_an_agent_follows_is_a_lifecycle() -> None:
    assert subscribed_subjects(DEV, AgentName.WORKFLOW_SCHEDULER, task="mnist") == [
        "fedbus.dev.life.server.mnist"
    ]
    assert set(FOLLOWS_LIFECYCLES.values()) <= set(LIFECYCLES)


def test_all_that_speak_or_hear_are_agents_or_people() -> None:
    parts = {"trainer", "flower-server-grid", "workflow-scheduler-news", "user"}
    assert {*PUBLISHES, *SUBSCRIBES, *FOLLOWS_LIFECYCLES} - parts <= {*SERVER_AGENTS, *CLIENT_AGENTS}


def test_no_agent_says_what_is_not_its_to_say() -> None:
    modules = [path for path in Path(agents.__path__[0]).rglob("*.py") if path.parent.name != "common"]
    assert len(modules) > 30
    known = {kind.__name__: kind for kind in MESSAGES}
    for path in modules:
        package = path.relative_to(agents.__path__[0]).parts[0]
        agent = AGENT_OF_MODULE.get(path.stem, package.replace("_", "-"))
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        made = {known[call.id] for call in calls if isinstance(call, ast.Name) and call.id in known}
        says = {str(name): kinds for name, kinds in PUBLISHES.items()}
        assert made <= {*says.get(agent, ()), Transition}, path.name


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
def test_the_event_stream_covers_no_request_no_blob_and_no_delivery(subject: str) -> None:
    assert not any(matches_subject(kept, subject) for kept in stream_subjects(DEV))


@pytest.mark.parametrize(
    "kind", [kind for kind in MESSAGES if kind.durable and kind is not Transition], ids=lambda kind: kind.word
)
def test_the_event_stream_keeps_what_is_durable_once(kind: type[Message]) -> None:
    subject = subjects.subject_for(DEV, EXAMPLES[kind])
    assert sum(matches_subject(kept, subject) for kept in stream_subjects(DEV)) == 1
