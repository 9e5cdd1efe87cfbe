"""The envelope: messages survive encoding and decoding, and invalid ones are rejected with the reason."""

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts import subjects
from fedbus.contracts.client import ClientData, FinTrain, RoundReply
from fedbus.contracts.envelope import (
    MAX_EVENT_BYTES,
    DecodeError,
    decode_body,
    decode_message,
    id_timestamp,
    make_envelope,
    pack,
    unpack,
    uuid7,
)
from fedbus.contracts.examples import EXAMPLES, NOON
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Message, Refused
from fedbus.contracts.model import MAX_INLINE_BYTES
from fedbus.contracts.round_messages import MessageContent, RoundMessage
from fedbus.contracts.run import RoundResult, RunPlan, StartRun
from fedbus.contracts.server import ServerClosed, UpdateReady
from fedbus.contracts.transition import Transition

DEV = FederationId("dev")
FIN = FinTrain(task="mnist", client="c1", run="mnist-1", rounds=4)
SUBJECT = subjects.subject_for(DEV, FIN)
C1 = "fedbus/dev/flower-client/c1"
SERVER = "fedbus/dev/server-manager/server"

MICROSECOND = timedelta(microseconds=1)
scalars = st.one_of(st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), st.text())
moments = st.integers(0, 7_000_000_000_000_000).map(
    lambda us: datetime.fromtimestamp(0, UTC) + us * MICROSECOND
)


def headers(message: Message = FIN, source: str = C1, **changed: str) -> dict[str, str]:
    """Return the headers of *message*, with some *changed*."""
    return make_envelope(message, source=source).headers() | {
        f"ce-{name}": text for name, text in changed.items()
    }


def decode_error(
    subject: str = SUBJECT, with_headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> str:
    """Return the reason why *body* on *subject* is rejected. The test fails if it is not."""
    with pytest.raises(DecodeError) as caught:
        decode_message(
            subject, headers() if with_headers is None else with_headers, pack(FIN) if body is None else body
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- valid messages --------------------------------------------------------------------------


def test_a_message_survives_encoding() -> None:
    sent = make_envelope(FIN, source=C1, trace={"traceparent": "00-1-2-01"})
    envelope, message = decode_message(SUBJECT, sent.headers(), pack(FIN))

    assert message == FIN
    assert (envelope.id, envelope.source, envelope.subject) == (sent.id, C1, "mnist-1")
    assert envelope.trace == {"traceparent": "00-1-2-01"}
    assert abs(envelope.time - sent.time).total_seconds() < 0.001


@given(st.dictionaries(st.text(), scalars), st.floats(min_value=0.001, allow_infinity=False))
def test_a_plan_keeps_the_type_of_every_scalar(
    config: dict[str, bool | int | float | str], wait_s: float
) -> None:
    plan = RunPlan(config=config, recruit_s=wait_s)
    again = decode_body(RunPlan, pack(plan))

    assert again == plan
    assert [type(value) for value in again.config.values()] == [type(value) for value in config.values()]


@given(st.dictionaries(st.text(), st.floats()), st.dictionaries(st.text(), st.text()))
def test_metrics_survive_encoding_bit_by_bit(metrics: dict[str, float], failures: dict[str, str]) -> None:
    result = RoundResult(round=1, metrics=metrics, failures=failures)
    again = decode_body(RoundResult, pack(result))

    assert pack(again) == pack(result)  # compares bits, because nan is not equal to itself


@given(moments, st.text())
def test_times_and_texts_survive_encoding(moment: datetime, reason: str) -> None:
    invitation = UpdateReady(task="t", run="t-1", plan=RunPlan(), recruit_until=moment)
    closed = ServerClosed(task="t", run="t-1", outcome="failed", reason=reason)

    assert decode_body(UpdateReady, pack(invitation)) == invitation
    assert decode_body(ServerClosed, pack(closed)) == closed


@given(st.binary(max_size=1000))
def test_bytes_survive_encoding(content: bytes) -> None:
    assert decode_body(MessageContent, pack(MessageContent(inline=content))).inline == content


def test_inline_content_is_bounded() -> None:
    with pytest.raises(DecodeError, match="MessageContent: inline: Data should have at most 65536 bytes"):
        decode_body(MessageContent, msgpack.packb({"inline": b"x" * (MAX_INLINE_BYTES + 1)}))


def test_type_run_source_and_time_are_in_the_headers() -> None:
    message = EXAMPLES[RoundMessage]
    shown = make_envelope(message, source=SERVER).headers()

    assert shown["ce-type"] == "dev.fedbus.round_message.v1"
    assert shown["ce-subject"] == "mnist-2/2"
    assert shown["ce-source"] == SERVER
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown["ce-time"])
    assert shown["Nats-Msg-Id"] == shown["ce-id"]


def test_the_stream_can_drop_a_repeat_by_its_id() -> None:
    assert make_envelope(FIN, source=C1, id="mnist-1/c1").headers()["Nats-Msg-Id"] == "mnist-1/c1"


# --- invalid messages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ce-specversion", "ce-id", "ce-type", "ce-source", "ce-time", "ce-datacontenttype"]
)
def test_a_message_with_a_missing_header_is_rejected(name: str) -> None:
    incomplete = {key: value for key, value in headers().items() if key != name}
    assert decode_error(with_headers=incomplete) == f"header {name} is missing: this is not a fedbus message"


def test_a_message_without_headers_is_rejected() -> None:
    with pytest.raises(DecodeError, match="header ce-specversion is missing"):
        decode_message(SUBJECT, None, b"hello")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"specversion": "0.3"}, "CloudEvents version 0.3 is not supported (expected 1.0)"),
        (
            {"datacontenttype": "application/json"},
            "content type 'application/json' is not supported (expected application/vnd.msgpack)",
        ),
        ({"type": "dev.fedbus.fin_train.v2"}, "does not know the message type 'dev.fedbus.fin_train.v2'"),
        ({"type": "org.example.order"}, "does not know the message type 'org.example.order'"),
        ({"time": "yesterday"}, "Invalid isoformat string: 'yesterday'"),
        ({"time": "2026-03-14T12:00:00"}, "the time '2026-03-14T12:00:00' has no time zone"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_a_foreign_envelope_is_rejected_with_the_reason(changed: dict[str, str], reason: str) -> None:
    assert reason in decode_error(with_headers=headers(FIN, C1, **changed))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the body is not valid msgpack"),
        (b"\xc1", "the body is not valid msgpack"),
        (b"hello", "the body is not valid msgpack"),
        (pack(FIN)[:-1], "the body is not valid msgpack"),
        (pack(FIN) + b"\x00", "the body is not valid msgpack"),
        (msgpack.packb({1: 2}), "the body is not valid msgpack"),
        (b"\x91" * 5000, "the body is not valid msgpack"),
        (msgpack.packb(msgpack.Timestamp(2**60)), "the body is not valid msgpack"),
        (msgpack.packb([1, 2]), "FinTrain: the body: "),
        (msgpack.packb({"task": "mnist", "client": "c1"}), "FinTrain: run: Field required"),
        (msgpack.packb({"task": "*", "client": "c1", "run": "r"}), "FinTrain: task: String should match"),
        (
            msgpack.packb({"task": "mnist", "client": "c1", "run": "r", "rounds": "many"}),
            "FinTrain: rounds: ",
        ),
    ],
)
def test_the_error_names_the_first_problem_of_a_body(body: bytes, reason: str) -> None:
    assert decode_error(body=body).startswith(reason)


@given(st.binary(max_size=2000))
def test_any_body_is_decoded_or_rejected(body: bytes) -> None:
    with suppress(DecodeError):
        decode_message(SUBJECT, headers(), body)


@given(st.text(), st.dictionaries(st.sampled_from(list(headers())), st.text()))
def test_any_headers_are_decoded_or_rejected(subject: str, changed: dict[str, str]) -> None:
    with suppress(DecodeError):
        decode_message(subject, headers() | changed, pack(FIN))


def test_an_oversized_body_is_rejected_before_decoding() -> None:
    assert decode_error(body=b"\xc1" * (MAX_EVENT_BYTES + 1)) == (
        f"the body has {MAX_EVENT_BYTES + 1} bytes (limit {MAX_EVENT_BYTES})"
    )


def test_an_oversized_body_is_not_sent() -> None:
    with pytest.raises(
        ValueError, match=rf"Refused has \d+ bytes \(limit {MAX_EVENT_BYTES}\): send large content as a blob"
    ):
        pack(Refused(reason="x" * MAX_EVENT_BYTES))


def test_a_body_at_the_limit_survives_encoding() -> None:
    room = MAX_EVENT_BYTES - len(pack(Refused(reason="x" * 70_000))) + 70_000
    largest = Refused(reason="x" * room)

    assert len(pack(largest)) == MAX_EVENT_BYTES
    assert decode_body(Refused, pack(largest)) == largest


def test_a_time_without_a_zone_is_rejected() -> None:
    body = msgpack.packb(
        EXAMPLES[UpdateReady].model_dump() | {"recruit_until": "2026-03-14T12:00:00"}, datetime=True
    )
    with pytest.raises(DecodeError, match="UpdateReady: recruit_until: Input should have timezone info"):
        decode_body(UpdateReady, body)


# --- forged messages -----------------------------------------------------------------------------


def test_a_body_of_another_client_is_rejected() -> None:
    another = FIN.model_copy(update={"client": "c2"})
    assert (
        decode_error(body=pack(another))
        == "forged: the subject is of client c1, but the body is of client c2"
    )


def test_a_source_of_another_client_is_rejected() -> None:
    assert decode_error(with_headers=headers(source="fedbus/dev/flower-client/c2")).startswith(
        "forged: only c1 may publish this"
    )


def test_a_client_cannot_publish_for_the_server_side() -> None:
    closed = ServerClosed(task="mnist", run="mnist-1", outcome="failed")
    reason = decode_error(subjects.subject_for(DEV, closed), headers(closed, source=C1), pack(closed))
    assert reason == f"forged: only server may publish this, but the source is {C1}"


def test_a_message_on_the_subject_of_another_is_rejected() -> None:
    elsewhere = SUBJECT.replace("fin_train", "joined")
    assert decode_error(elsewhere) == f"forged: a message for {SUBJECT} was published on {elsewhere}"


def test_a_message_on_the_subject_of_another_task_is_rejected() -> None:
    elsewhere = SUBJECT.replace("mnist", "other")
    assert decode_error(elsewhere) == f"forged: a message for {SUBJECT} was published on {elsewhere}"


def test_a_message_on_a_foreign_subject_is_rejected() -> None:
    assert decode_error("orders.new") == "'orders.new' is not a fedbus subject"


@pytest.mark.parametrize("key", ["c2.mnist", "c1.other"])
def test_a_transition_on_the_subject_of_another_is_rejected(key: str) -> None:
    moved = EXAMPLES[Transition]
    subject = subjects.lifecycle(DEV, "client", key)
    reason = decode_error(subject, headers(moved), pack(moved))
    assert reason == f"forged: a message for fedbus.dev.life.client.c1.mnist was published on {subject}"


def test_the_server_side_cannot_publish_for_a_client() -> None:
    moved = EXAMPLES[Transition]
    reason = decode_error(
        subjects.lifecycle(DEV, "client", "c1.mnist"), headers(moved, source=SERVER), pack(moved)
    )
    assert reason == f"forged: only c1 may publish this, but the source is {SERVER}"


def test_a_client_cannot_publish_a_transition_of_a_run() -> None:
    moved = Transition.model_validate(
        {
            "task": "mnist",
            "event": "cancelled",
            "source": "running",
            "target": "cancelled",
            "facts": {"kind": "run", "task": "mnist", "run": "mnist-1", "plan": {}, "requested_at": NOON},
        }
    )
    reason = decode_error(subjects.lifecycle(DEV, "run", "mnist-1"), headers(moved, source=C1), pack(moved))
    assert reason == f"forged: only server may publish this, but the source is {C1}"


def test_a_request_may_come_from_any_source() -> None:
    request = StartRun(task="mnist")
    subject = subjects.subject_for(DEV, request)
    for source in (C1, SERVER, "fedbus/dev/cli/server"):
        assert decode_message(subject, headers(request, source=source), pack(request))[1] == request


# --- the rest ----------------------------------------------------------------------------------------


def test_a_message_of_an_older_sender_is_decoded() -> None:
    old = {"task": "mnist", "client": "c1", "run": "mnist-1"}
    assert decode_body(FinTrain, msgpack.packb(old)) == FIN.model_copy(update={"rounds": 0})


def test_a_reply_may_be_an_error_without_content() -> None:
    reply = EXAMPLES[RoundReply].model_copy(
        update={"content": None, "error_code": 202, "error_reason": "it raised"}
    )
    assert decode_body(RoundReply, pack(reply)) == reply


def test_data_of_an_unknown_kind_are_rejected() -> None:
    with pytest.raises(DecodeError, match="Transition: facts: Input tag 'ship' found using 'kind'"):
        decode_body(
            Transition, pack(EXAMPLES[Transition]).replace(b"\xa4kind\xa6client", b"\xa4kind\xa4ship")
        )


def test_the_key_of_a_client_has_client_and_task() -> None:
    assert ClientData(client="c1", task="mnist").key == "c1.mnist"


def test_unpacked_values_are_plain_python() -> None:
    assert unpack(msgpack.packb({"at": NOON, "raw": b"\x00"}, datetime=True)) == {"at": NOON, "raw": b"\x00"}


def test_ids_are_uuid7_in_the_order_of_time() -> None:
    ids = []
    for _ in range(5):
        ids.append(uuid7())
        time.sleep(0.002)

    assert ids == sorted(ids)
    assert {UUID(one).version for one in ids} == {7}
    assert {UUID(one).variant for one in ids} == {"specified in RFC 4122"}
    assert len({uuid7() for _ in range(1000)}) == 1000


def test_the_time_of_an_id_is_known_only_for_uuid7() -> None:
    before = datetime.now(UTC)
    at = id_timestamp(uuid7())
    assert at is not None
    assert before - timedelta(milliseconds=1) <= at <= datetime.now(UTC)  # an id has milliseconds
    assert [id_timestamp(text) for text in ("", "run-1", str(uuid4()), "f" * 5000)] == [None] * 4


def test_an_id_that_is_too_long_is_rejected() -> None:
    with pytest.raises(DecodeError, match=r"the message id has 300 characters \(limit 256\)"):
        decode_message(SUBJECT, headers(id="x" * 300), pack(FIN))


def test_an_integer_of_more_than_64_bits_is_not_sent() -> None:
    with pytest.raises(ValueError, match="StartRun contains an integer of more than 64 bits"):
        pack(StartRun(task="mnist", config={"lr": 10**30}))
