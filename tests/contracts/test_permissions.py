"""What each role may, as the table says it: laws that hold before any broker is asked."""

import itertools

import pytest
from support.subjects import matches_subject

from fedbus.bus.streams import consumer_name, events_stream
from fedbus.contracts import catalogue, subjects
from fedbus.contracts.examples import EXAMPLES
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import ClientMessage, ClientRequest, Family
from fedbus.contracts.permissions import (
    NAME_TEMPLATE,
    ROLE_AGENTS,
    ROLE_DESCRIPTIONS,
    SERVER_ROLES,
    Role,
    permissions_for,
)
from fedbus.contracts.transition import LIFECYCLES, Transition

DEV = FederationId("dev")
DEVICE = permissions_for(DEV, Role.DEVICE)
each_role = pytest.mark.parametrize("role", Role)


def overlaps(one: str, other: str) -> bool:
    """Whether there is a subject that both patterns cover."""
    for left, right in itertools.zip_longest(one.split("."), other.split(".")):
        if ">" in (left, right):
            return True
        if left is None or right is None or (left != right and "*" not in (left, right)):
            return False
    return True


def is_covered(patterns: tuple[str, ...], subject: str) -> bool:
    return any(matches_subject(pattern, subject) for pattern in patterns)


def of_c1(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(pattern.replace(NAME_TEMPLATE, "c1") for pattern in patterns)


def test_a_device_can_send_itself_nothing() -> None:
    """Else it could name any subject as that message's reply, and be let through there as if it answered."""
    for said, heard in itertools.product(of_c1(DEVICE.publish), of_c1(DEVICE.subscribe)):
        assert not overlaps(said, heard), (said, heard)


def test_no_device_uses_the_api_of_the_streams() -> None:
    assert not [subject for subject in DEVICE.publish if subject.startswith("$JS")]
    assert not [subject for subject in DEVICE.subscribe if subject.startswith("$JS")]


def test_a_device_stands_by_its_name_in_all_it_says_but_questions_that_anybody_may_ask() -> None:
    for subject in DEVICE.publish:
        parts = subject.split(".")
        to_the_server = parts[2] == "blob" and parts[3] == subjects.SERVER_SIDE and parts[5] == "in"
        assert NAME_TEMPLATE in parts or to_the_server or parts[2] == "svc", subject


def test_a_device_may_say_all_that_its_agents_say() -> None:
    for agent in catalogue.CLIENT_CONSUMERS:
        for kind in catalogue.PUBLISHES.get(agent, ()):
            example = EXAMPLES[kind]
            own = example.model_copy(update={"client": "c1"})
            assert is_covered(of_c1(DEVICE.publish), subjects.subject_for(DEV, own)), kind.word


def test_a_device_may_say_nothing_in_the_name_of_another() -> None:
    for kind in catalogue.MESSAGES:
        example = EXAMPLES[kind]
        if isinstance(example, ClientMessage | ClientRequest):
            other = example.model_copy(update={"client": "c2"})
            assert not is_covered(of_c1(DEVICE.publish), subjects.subject_for(DEV, other)), kind.word
        elif kind.family not in (Family.LIFE, Family.SVC):
            assert not is_covered(of_c1(DEVICE.publish), subjects.subject_for(DEV, example)), kind.word


@pytest.mark.parametrize("kind", LIFECYCLES)
def test_each_lifecycle_is_moved_by_its_owner_alone(kind: str) -> None:
    owner = LIFECYCLES[kind].owner
    for role in (Role.DEVICE, *SERVER_ROLES, Role.USER, Role.OBSERVER, Role.GATEWAY):
        may = of_c1(permissions_for(DEV, role).publish)
        assert is_covered(may, subjects.lifecycle(DEV, kind, "c1.mnist")) == (owner in ROLE_AGENTS[role]), (
            role
        )


@pytest.mark.parametrize("role", SERVER_ROLES)
def test_an_agent_of_the_server_may_say_and_hear_what_is_its_own(role: Role) -> None:
    may = permissions_for(DEV, role)
    for agent in ROLE_AGENTS[role]:
        for kind in catalogue.PUBLISHES.get(agent, ()):
            if kind is not Transition:
                assert is_covered(may.publish, subjects.subject_for(DEV, EXAMPLES[kind])), kind.word
        for request in catalogue.requests_answered_by(agent):
            assert is_covered(may.subscribe, subjects.subject_for(DEV, EXAMPLES[request])), request.word
        assert is_covered(may.subscribe, f"{subjects.inbox(subjects.SERVER_SIDE, agent)}.x.y")


@pytest.mark.parametrize("role", [Role.USER, Role.OBSERVER, Role.GATEWAY])
def test_nobody_who_looks_sees_weights(role: Role) -> None:
    assert not [subject for subject in permissions_for(DEV, role).subscribe if ".blob." in subject]
    assert not is_covered(permissions_for(DEV, role).subscribe, "fedbus.dev.blob.c1.trainer_1.in.x.0")


def test_who_only_looks_changes_nothing() -> None:
    for subject in permissions_for(DEV, Role.OBSERVER).publish:
        kind = subject.rpartition(".")[2]
        assert subject.startswith("$") or kind in ("health_check", "get_server_info"), subject


@each_role
def test_no_role_reaches_another_federation(role: Role) -> None:
    may = permissions_for(DEV, role)
    for subject in (*may.publish, *may.subscribe):
        assert subject.startswith(("fedbus.dev.", "_INBOX.", "$SRV.", "$JS.")), subject
        if subject.startswith(("$JS.API.STREAM.", "$JS.API.CONSUMER.")) and subject.count(".") > 3:
            assert "FEDBUS_dev_" in subject, subject


@each_role
def test_nobody_may_say_or_hear_everything(role: Role) -> None:
    may = permissions_for(DEV, role)
    assert not {">", "*", "fedbus.>", "fedbus.dev.>", "$JS.>", "$JS.API.>", "$SYS.>"} & {
        *may.publish,
        *may.subscribe,
    }


@each_role
def test_each_role_says_what_it_is_for(role: Role) -> None:
    assert ROLE_DESCRIPTIONS[role]


def test_a_site_may_acknowledge_for_its_own_clients_in_their_tasks_alone() -> None:
    may = tuple(
        subject.replace("{{tag(client)}}", "c1").replace("{{tag(task)}}", "mnist")
        for subject in permissions_for(DEV, Role.SITE).publish
    )
    for agent in catalogue.CLIENT_CONSUMERS:
        own, others = consumer_name("c1", "mnist", agent), consumer_name("c2", "mnist", agent)
        assert is_covered(may, f"$JS.ACK.{events_stream(DEV)}.{own}.1.2.3.4.0")
        assert not is_covered(may, f"$JS.ACK.{events_stream(DEV)}.{others}.1.2.3.4.0")
