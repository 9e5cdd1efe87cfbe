"""The permissions of each role, tested as patterns, without a nats-server."""

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
    """Return whether both patterns cover a common subject."""
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


def test_a_device_cannot_send_messages_to_itself() -> None:
    """Otherwise it could set any reply subject in that message, and then publish to it as a reply."""
    for publish, subscribe in itertools.product(of_c1(DEVICE.publish), of_c1(DEVICE.subscribe)):
        assert not overlaps(publish, subscribe), (publish, subscribe)


def test_a_device_may_not_use_the_jetstream_api() -> None:
    assert not [subject for subject in DEVICE.publish if subject.startswith("$JS")]
    assert not [subject for subject in DEVICE.subscribe if subject.startswith("$JS")]


def test_the_name_of_a_device_is_in_what_it_may_publish() -> None:
    for subject in DEVICE.publish:
        parts = subject.split(".")
        to_the_server = parts[2] == "blob" and parts[3] == subjects.SERVER_SIDE and parts[5] == "in"
        assert NAME_TEMPLATE in parts or to_the_server or parts[2] == "svc", subject


def test_a_device_may_publish_all_messages_of_its_agents() -> None:
    for agent in catalogue.CLIENT_CONSUMERS:
        for kind in catalogue.PUBLISHES.get(agent, ()):
            example = EXAMPLES[kind]
            own = example.model_copy(update={"client": "c1"})
            assert is_covered(of_c1(DEVICE.publish), subjects.subject_for(DEV, own)), kind.name


def test_a_device_may_not_publish_messages_of_others() -> None:
    for kind in catalogue.MESSAGES:
        example = EXAMPLES[kind]
        if isinstance(example, ClientMessage | ClientRequest):
            other = example.model_copy(update={"client": "c2"})
            assert not is_covered(of_c1(DEVICE.publish), subjects.subject_for(DEV, other)), kind.name
        elif kind.family not in (Family.LIFE, Family.SVC):
            assert not is_covered(of_c1(DEVICE.publish), subjects.subject_for(DEV, example)), kind.name


@pytest.mark.parametrize("kind", LIFECYCLES)
def test_only_the_owner_may_publish_transitions(kind: str) -> None:
    owner = LIFECYCLES[kind].owner
    for role in (Role.DEVICE, *SERVER_ROLES, Role.USER, Role.OBSERVER, Role.GATEWAY):
        may = of_c1(permissions_for(DEV, role).publish)
        assert is_covered(may, subjects.lifecycle(DEV, kind, "c1.mnist")) == (owner in ROLE_AGENTS[role]), (
            role
        )


@pytest.mark.parametrize("role", SERVER_ROLES)
def test_a_server_role_may_use_the_subjects_of_its_agents(role: Role) -> None:
    may = permissions_for(DEV, role)
    for agent in ROLE_AGENTS[role]:
        for kind in catalogue.PUBLISHES.get(agent, ()):
            if kind is not Transition:
                assert is_covered(may.publish, subjects.subject_for(DEV, EXAMPLES[kind])), kind.name
        for request in catalogue.requests_answered_by(agent):
            assert is_covered(may.subscribe, subjects.subject_for(DEV, EXAMPLES[request])), request.name
        assert is_covered(may.subscribe, f"{subjects.inbox(subjects.SERVER_SIDE, agent)}.x.y")


@pytest.mark.parametrize("role", [Role.USER, Role.OBSERVER, Role.GATEWAY])
def test_users_and_the_gateway_cannot_read_blobs(role: Role) -> None:
    assert not [subject for subject in permissions_for(DEV, role).subscribe if ".blob." in subject]
    assert not is_covered(permissions_for(DEV, role).subscribe, "fedbus.dev.blob.c1.trainer_1.in.x.0")


def test_an_observer_may_not_send_commands() -> None:
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
def test_no_role_has_a_wildcard_for_everything(role: Role) -> None:
    may = permissions_for(DEV, role)
    assert not {">", "*", "fedbus.>", "fedbus.dev.>", "$JS.>", "$JS.API.>", "$SYS.>"} & {
        *may.publish,
        *may.subscribe,
    }


@each_role
def test_each_role_has_a_description(role: Role) -> None:
    assert ROLE_DESCRIPTIONS[role]


def test_a_site_may_acknowledge_only_for_its_own_clients() -> None:
    may = tuple(
        subject.replace("{{tag(client)}}", "c1").replace("{{tag(task)}}", "mnist")
        for subject in permissions_for(DEV, Role.SITE).publish
    )
    for agent in catalogue.CLIENT_CONSUMERS:
        own, others = consumer_name("c1", "mnist", agent), consumer_name("c2", "mnist", agent)
        assert is_covered(may, f"$JS.ACK.{events_stream(DEV)}.{own}.1.2.3.4.0")
        assert not is_covered(may, f"$JS.ACK.{events_stream(DEV)}.{others}.1.2.3.4.0")
