"""The wire format of each message, in golden files. A changed file is a changed wire format.

After adding a message or a field, run with FEDBUS_GOLDEN=write and review the diff. An existing file may change only
if its example has another free text, or if no released version sends the message.
"""

import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedbus.contracts import subjects
from fedbus.contracts.client import FinTrain
from fedbus.contracts.envelope import Envelope, decode_body, decode_message, pack
from fedbus.contracts.examples import EXAMPLES, FACTS, NOON, REPLIES
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Body, LifecycleData, Message, Request, type_name
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.contracts.transition import Transition

GOLDEN = Path(__file__).parent / "golden"
DEV = FederationId("dev")
TRACE = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}


def compare_with_golden(name: str, now: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the golden file *name*; with FEDBUS_GOLDEN=write, replace it by *now* first."""
    path = GOLDEN / f"{name}.json"
    if os.environ.get("FEDBUS_GOLDEN") == "write":
        path.write_text(json.dumps(now, indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def place(message: Message) -> str:
    if isinstance(message, Transition):
        return subjects.lifecycle(DEV, message.kind, message.key)
    return subjects.subject_for(DEV, message)


def envelope(message: Message) -> Envelope:
    owner = getattr(message, "client", SERVER_SIDE) if message.family in ("client", "local") else SERVER_SIDE
    if isinstance(message, Transition):
        owner = getattr(message.facts, "client", SERVER_SIDE)
    return Envelope(
        id="01957f2c-8d00-7abc-8def-0123456789ab",
        type=type_name(type(message)),
        source=f"fedbus/dev/some-agent/{owner}",
        subject=message.subject_ref,
        time=NOON,
        trace=TRACE,
    )


TRANSITIONS = [
    Transition(task="mnist", event="started", source="", target="somewhere", facts=facts) for facts in FACTS
]


@pytest.mark.parametrize("message", EXAMPLES.values(), ids=lambda one: one.name)
def test_the_encoding_of_a_message_is_unchanged(message: Message) -> None:
    now = {"subject": place(message), "headers": envelope(message).headers(), "body": pack(message).hex()}
    golden = compare_with_golden(f"{message.name}.v{message.version}", now)

    assert golden == now
    assert decode_message(golden["subject"], golden["headers"], bytes.fromhex(golden["body"])) == (
        envelope(message),
        message,
    )


def test_the_cause_of_a_message_is_in_its_envelope() -> None:
    message = EXAMPLES[FinTrain]
    caused = replace(envelope(message), cause="01957f2c-8c00-7abc-8def-0123456789ab")
    golden = compare_with_golden("envelope.caused", caused.headers())

    assert golden == caused.headers()
    assert decode_message(place(message), golden, pack(message)) == (caused, message)


@pytest.mark.parametrize("answer", REPLIES.values(), ids=lambda one: type(one).__name__)
def test_the_encoding_of_a_reply_is_unchanged(answer: Body) -> None:
    golden = compare_with_golden(f"answer.{type(answer).__name__}.v1", {"body": pack(answer).hex()})

    assert golden == {"body": pack(answer).hex()}
    assert decode_body(type(answer), bytes.fromhex(golden["body"])) == answer


@pytest.mark.parametrize("facts", FACTS, ids=lambda one: one.kind)
def test_the_encoding_of_lifecycle_data_is_unchanged(facts: LifecycleData) -> None:
    golden = compare_with_golden(f"facts.{facts.kind}.v1", {"body": pack(facts).hex()})

    assert golden == {"body": pack(facts).hex()}
    assert decode_body(type(facts), bytes.fromhex(golden["body"])) == facts


def test_each_message_has_a_file_and_each_file_a_message() -> None:
    expected = {f"{message.name}.v{message.version}" for message in EXAMPLES.values()}
    expected |= {"envelope.caused"}
    expected |= {f"answer.{kind.__name__}.v1" for kind in REPLIES} | {f"facts.{one.kind}.v1" for one in FACTS}
    assert {path.stem for path in GOLDEN.glob("*.json")} == expected


@pytest.mark.parametrize("transition", TRANSITIONS, ids=lambda one: one.kind)
def test_a_transition_decodes_the_data_of_its_kind(transition: Transition) -> None:
    _, again = decode_message(place(transition), envelope(transition).headers(), pack(transition))

    assert isinstance(again, Transition)
    assert again == transition
    assert type(again.facts) is type(transition.facts)


@pytest.mark.parametrize("message", EXAMPLES.values(), ids=lambda one: one.name)
def test_an_unknown_field_of_a_newer_sender_is_ignored(message: Message) -> None:
    newer = type(message).model_validate(message.model_dump() | {"added_later": NOON + timedelta(days=1)})
    assert newer == message


def test_all_requests_have_version_1() -> None:
    assert {kind.version for kind in EXAMPLES if issubclass(kind, Request)} == {1}
