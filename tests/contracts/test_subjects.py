"""Subjects: one grammar, in which the identity has its fixed place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.subjects import matches

from fedbus.contracts import subjects
from fedbus.contracts.catalogue import MESSAGES
from fedbus.contracts.examples import EXAMPLES
from fedbus.contracts.identifiers import ID_PATTERN, FederationId
from fedbus.contracts.message import OF_ONE_CLIENT, ClientMessage, Family, Message
from fedbus.contracts.subjects import ForeignSubject
from fedbus.contracts.transition import Transition

DEV = FederationId("dev")
SAID = [kind for kind in MESSAGES if kind is not Transition]
each_message = pytest.mark.parametrize("kind", SAID, ids=lambda kind: kind.word)
ids = st.from_regex(ID_PATTERN, fullmatch=True)


@each_message
def test_a_message_goes_where_its_listeners_listen(kind: type[Message]) -> None:
    example = EXAMPLES[kind]
    client = example.client if isinstance(example, ClientMessage) else "*"
    subject = subjects.of(DEV, example)

    assert matches(subjects.every(DEV, kind), subject)
    assert matches(subjects.every(DEV, kind, client=client, task=example.task), subject)
    assert not matches(subjects.every(DEV, kind, task="another"), subject)
    assert not matches(subjects.every(FederationId("other"), kind), subject)


@each_message
def test_the_template_of_a_subject_is_the_subject_with_names_for_what_differs(kind: type[Message]) -> None:
    example = EXAMPLES[kind]
    named = {"federation": DEV, "task": example.task, "client": getattr(example, "client", "")}
    assert subjects.template(kind).format(**named) == subjects.of(DEV, example)


def test_all_transitions_have_one_template() -> None:
    assert subjects.template(Transition) == "fedbus.{federation}.life.{kind}.{thing}"


@each_message
def test_no_two_words_share_a_subject(kind: type[Message]) -> None:
    subject = subjects.of(DEV, EXAMPLES[kind])
    assert [other for other in SAID if matches(subjects.every(DEV, other), subject)] == [kind]


@given(client=ids, task=ids, fed=ids)
def test_the_client_is_read_where_permissions_look_for_it(client: str, task: str, fed: str) -> None:
    for kind in SAID:
        subject = subjects.every(FederationId(fed), kind, client=client, task=task)
        expected = client if kind.family in OF_ONE_CLIENT else None
        assert subjects.client_in(subject) == expected
        assert subjects.federation_in(subject) == fed


def test_the_state_of_everything_is_under_one_root() -> None:
    subject = subjects.life(DEV, "client", "c1.mnist")

    assert subject == "fedbus.dev.life.client.c1.mnist"
    assert matches(subjects.every(DEV, Transition), subject)


def test_a_message_of_the_life_family_has_no_place_of_its_own() -> None:
    with pytest.raises(AssertionError):
        subjects.of(DEV, EXAMPLES[Transition])


def test_the_roots_of_the_families_do_not_meet() -> None:
    others = {
        subjects.blob(DEV, "c1.holder", "get"),
        subjects.dead(DEV, "c1", "inference"),
        subjects.deliver(DEV, "c1", "mnist.inference"),
        subjects.life(DEV, "run", "mnist-1"),
    }
    for subject in others:
        assert not any(matches(subjects.every(DEV, kind), subject) for kind in SAID)
    assert {str(family) for family in Family}.isdisjoint({"blob", "dead", "deliver"})


@pytest.mark.parametrize("subject", ["", "orders", "fedbus.dev.svc", "other.dev.client.c1.mnist.fin_train"])
def test_a_foreign_subject_is_refused(subject: str) -> None:
    with pytest.raises(ForeignSubject, match="is not a subject of fedbus"):
        subjects.client_in(subject)
