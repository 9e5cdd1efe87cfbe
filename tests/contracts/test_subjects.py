"""Subjects: unique for each message, with the client in a fixed token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.subjects import matches_subject

from fedbus.contracts import subjects
from fedbus.contracts.catalogue import MESSAGES
from fedbus.contracts.examples import EXAMPLES
from fedbus.contracts.identifiers import ID_PATTERN, FederationId
from fedbus.contracts.message import CLIENT_FAMILIES, ClientMessage, Family, Message
from fedbus.contracts.subjects import InvalidSubject
from fedbus.contracts.transition import Transition

DEV = FederationId("dev")
MESSAGE_KINDS = [kind for kind in MESSAGES if kind is not Transition]
each_message = pytest.mark.parametrize("kind", MESSAGE_KINDS, ids=lambda kind: kind.name)
ids = st.from_regex(ID_PATTERN, fullmatch=True)


@each_message
def test_a_message_matches_the_wildcards_of_its_consumers(kind: type[Message]) -> None:
    example = EXAMPLES[kind]
    client = example.client if isinstance(example, ClientMessage) else "*"
    subject = subjects.subject_for(DEV, example)

    assert matches_subject(subjects.wildcard_for(DEV, kind), subject)
    assert matches_subject(subjects.wildcard_for(DEV, kind, client=client, task=example.task), subject)
    assert not matches_subject(subjects.wildcard_for(DEV, kind, task="another"), subject)
    assert not matches_subject(subjects.wildcard_for(FederationId("other"), kind), subject)


@each_message
def test_a_filled_template_is_the_subject(kind: type[Message]) -> None:
    example = EXAMPLES[kind]
    named = {"federation": DEV, "task": example.task, "client": getattr(example, "client", "")}
    assert subjects.template(kind).format(**named) == subjects.subject_for(DEV, example)


def test_all_transitions_have_one_template() -> None:
    assert subjects.template(Transition) == "fedbus.{federation}.life.{kind}.{key}"


@each_message
def test_no_two_messages_share_a_subject(kind: type[Message]) -> None:
    subject = subjects.subject_for(DEV, EXAMPLES[kind])
    assert [
        other for other in MESSAGE_KINDS if matches_subject(subjects.wildcard_for(DEV, other), subject)
    ] == [kind]


@given(client=ids, task=ids, fed=ids)
def test_the_client_is_read_from_its_token_in_the_subject(client: str, task: str, fed: str) -> None:
    for kind in MESSAGE_KINDS:
        subject = subjects.wildcard_for(FederationId(fed), kind, client=client, task=task)
        expected = client if kind.family in CLIENT_FAMILIES else None
        assert subjects.client_in(subject) == expected
        assert subjects.federation_in(subject) == fed


def test_all_transitions_are_under_one_root() -> None:
    subject = subjects.lifecycle(DEV, "client", "c1.mnist")

    assert subject == "fedbus.dev.life.client.c1.mnist"
    assert matches_subject(subjects.wildcard_for(DEV, Transition), subject)


def test_a_transition_has_no_subject_of_its_own() -> None:
    with pytest.raises(AssertionError):
        subjects.subject_for(DEV, EXAMPLES[Transition])


def test_the_families_share_no_subject() -> None:
    others = {
        subjects.blob(DEV, "c1.holder", "get"),
        subjects.dead_letter(DEV, "c1", "inference"),
        subjects.deliver(DEV, "c1", "mnist.inference"),
        subjects.lifecycle(DEV, "run", "mnist-1"),
    }
    for subject in others:
        assert not any(matches_subject(subjects.wildcard_for(DEV, kind), subject) for kind in MESSAGE_KINDS)
    assert {str(family) for family in Family}.isdisjoint({"blob", "dead", "deliver"})


@pytest.mark.parametrize("subject", ["", "orders", "fedbus.dev.svc", "other.dev.client.c1.mnist.fin_train"])
def test_a_foreign_subject_is_refused(subject: str) -> None:
    with pytest.raises(InvalidSubject, match="is not a fedbus subject"):
        subjects.client_in(subject)
