"""The fold of transitions and messages into the state of a federation."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.client import (
    ClientData,
    ClientDeclined,
    ClientJoined,
    FailTrain,
    FlClientData,
    Heartbeat,
    InferenceData,
    RoundReply,
)
from fedbus.contracts.code import CodeData
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.message import LifecycleData, Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.round_messages import MessageContent, RoundMessage
from fedbus.contracts.run import RunData, RunPlan
from fedbus.contracts.scheduling import ScheduleData
from fedbus.contracts.server import ServerData
from fedbus.contracts.transition import Transition
from fedbus.domain.federation_view import FederationView

TASK = "mnist"
START = datetime(2026, 1, 1, tzinfo=UTC)


class DeliveredMessage(NamedTuple):
    """A message as a stream delivers it."""

    message: Message
    sequence: int

    @property
    def at(self) -> datetime:
        return START + timedelta(seconds=self.sequence)

    @property
    def subject(self) -> tuple[str, ...]:
        match self.message:
            case Transition(kind=kind, key=thing):
                return ("life", kind, thing)
            case message:
                return (message.name, str(getattr(message, "client", "")), message.task)


def transition(data: LifecycleData, target: str, *, event: str = "moved", reason: str = "") -> Transition:
    return Transition.model_validate(
        {
            "task": data.task,
            "event": event,
            "source": "",
            "target": target,
            "reason": reason,
            "facts": data.model_dump(),
        }
    )


def model(version: int) -> ModelRef:
    return ModelRef(version=version, sha256=f"{version:064x}", size_bytes=8, architecture="a" * 64)


def run_data(number: int, **data: Any) -> RunData:
    requested_at = START + timedelta(minutes=number)
    return RunData(task=TASK, run=f"{TASK}-{number}", plan=RunPlan(), requested_at=requested_at, **data)


def client_data(client: str = "c1", **data: Any) -> ClientData:
    return ClientData(task=TASK, client=client, **data)


def round_message(number: int, client: str, id: str, kind: str = "train") -> RoundMessage:
    about: dict[str, Any] = {"task": TASK, "run": f"{TASK}-1", "client": client, "created_at": 0, "ttl_s": 60}
    return RoundMessage(
        **about, round=number, message_id=id, message_type=kind, content=MessageContent(inline=b"")
    )


def round_reply(client: str, to: str) -> RoundReply:
    about: dict[str, Any] = {"task": TASK, "run": f"{TASK}-1", "client": client, "created_at": 0, "ttl_s": 60}
    return RoundReply(**about, message_id=f"re-{to}", reply_to=to)


def view_of(*messages: Message) -> FederationView:
    return fold(number_deliveries(messages))


def number_deliveries(messages: Iterable[Message]) -> list[DeliveredMessage]:
    return [DeliveredMessage(message, sequence) for sequence, message in enumerate(messages, start=1)]


def fold(deliveries: Iterable[DeliveredMessage], view: FederationView | None = None) -> FederationView:
    view = view or FederationView(max_history=100)
    for one in deliveries:
        view.apply(one.message, at=one.at, sequence=one.sequence)
    return view


def entities(view: FederationView) -> tuple[object, ...]:
    return view.servers, view.codes, view.schedules, view.runs, view.clients


def whole_state(view: FederationView) -> tuple[object, ...]:
    return *entities(view), view.rounds, view.presence.last_seen, list(view.history)


# --- laws -----------------------------------------------------------------------------------------

CLIENTS = st.sampled_from(["c1", "c2"])
NUMBERS = st.integers(1, 3)
STATES = st.sampled_from(["waiting", "serving", "training", "finished", "newer-than-this-code"])


@st.composite
def random_transitions(draw: st.DrawFn) -> Message:
    about: dict[str, Any] = {"task": TASK, "client": draw(CLIENTS)}
    data: LifecycleData = draw(
        st.sampled_from(
            [
                ServerData(task=TASK, model=model(draw(NUMBERS))),
                CodeData(task=TASK),
                ScheduleData(task=TASK, since=START, clock_since=START),
                run_data(draw(NUMBERS)),
                client_data(about["client"]),
                FlClientData(**about),
                InferenceData(**about),
            ]
        )
    )
    return transition(data, draw(STATES))


@st.composite
def random_run_transitions(draw: st.DrawFn) -> Message:
    return transition(run_data(draw(NUMBERS)), draw(st.sampled_from(["running", "finished"])))


@st.composite
def random_participations(draw: st.DrawFn) -> Message:
    about: dict[str, Any] = {"task": TASK, "client": draw(CLIENTS), "run": f"{TASK}-{draw(NUMBERS)}"}
    declined, failed = (kind(**about, reason="no") for kind in (ClientDeclined, FailTrain))
    return draw(st.sampled_from([ClientJoined(**about), declined, failed]))


@st.composite
def random_round_messages(draw: st.DrawFn) -> Message:
    """A message of one of three rounds, or a reply to it; each message has an id of its own."""
    number, client = draw(NUMBERS), draw(CLIENTS)
    message_id = f"{number}-{client}-{draw(NUMBERS)}"
    return draw(st.sampled_from([round_message(number, client, message_id), round_reply(client, message_id)]))


def logs_of(*kinds: st.SearchStrategy[Message]) -> st.SearchStrategy[list[DeliveredMessage]]:
    """Up to 20 messages about few entities, in the order of the stream.

    A message id occurs once, and a reply comes after its message.
    """

    def is_possible(message: Message, before: list[Message]) -> bool:
        match message:
            case RoundMessage():
                return message not in before
            case RoundReply(reply_to=id):
                return any(isinstance(one, RoundMessage) and one.message_id == id for one in before)
            case _:
                return True

    def possible_log(messages: list[Message]) -> list[DeliveredMessage]:
        return number_deliveries(one for at, one in enumerate(messages) if is_possible(one, messages[:at]))

    return st.lists(st.one_of(*kinds), max_size=20).map(possible_log)


LOGS = logs_of(random_transitions(), random_participations(), random_round_messages())
LOGS_OF_RUNS = logs_of(random_run_transitions())
LOGS_OF_ROUNDS = logs_of(random_round_messages())


@given(log=LOGS | LOGS_OF_ROUNDS, data=st.data())
def test_redelivery_of_a_prefix_does_not_change_the_view(
    log: list[DeliveredMessage], data: st.DataObject
) -> None:
    applied = data.draw(st.integers(0, len(log)))
    redelivered = data.draw(st.integers(0, applied))
    again = [*log[:applied], *log[:redelivered], *log[applied:]]
    assert whole_state(fold(again)) == whole_state(fold(log))


@given(log=LOGS_OF_RUNS, data=st.data())
def test_redelivery_holds_when_the_view_forgets_runs(
    log: list[DeliveredMessage], data: st.DataObject
) -> None:
    applied = data.draw(st.integers(0, len(log)))
    redelivered = data.draw(st.integers(0, applied))
    small, again = (FederationView(max_finished_runs=1, max_history=100) for _ in range(2))
    fold(log, small)
    fold([*log[:applied], *log[:redelivered], *log[applied:]], again)
    assert whole_state(again) == whole_state(small)


@given(log=LOGS, data=st.data())
def test_entities_do_not_depend_on_the_order_of_delivery(
    log: list[DeliveredMessage], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(log))
    assert entities(fold(shuffled)) == entities(fold(log))


@given(log=LOGS)
def test_a_snapshot_gives_the_same_entities_as_the_whole_log(log: list[DeliveredMessage]) -> None:
    last_per_subject = {one.subject: one for one in log}
    assert entities(fold(last_per_subject.values())) == entities(fold(log))


@given(log=LOGS)
def test_apply_reports_whether_the_view_changed(log: list[DeliveredMessage]) -> None:
    view = FederationView(max_history=100)
    for one in log:
        before = repr((entities(view), view.rounds))
        is_changed = view.apply(one.message, at=one.at, sequence=one.sequence)
        assert is_changed == (repr((entities(view), view.rounds)) != before)


# --- limits ---------------------------------------------------------------------------------------


def test_a_view_forgets_the_runs_that_finished_first() -> None:
    view = FederationView(max_finished_runs=2)
    running = DeliveredMessage(transition(run_data(1), "running"), 1)
    finished = [DeliveredMessage(transition(run_data(number), "finished"), number) for number in range(2, 6)]
    fold([running, *finished], view)
    assert list(view.runs) == ["mnist-1", "mnist-4", "mnist-5"]

    redelivered = DeliveredMessage(transition(run_data(2), "running"), 2)
    assert not view.apply(redelivered.message, at=redelivered.at, sequence=redelivered.sequence)
    assert list(view.runs) == ["mnist-1", "mnist-4", "mnist-5"]


def test_history_keeps_the_last_transitions() -> None:
    view = FederationView(max_history=2)
    fold(
        number_deliveries(transition(run_data(1), state) for state in ("requested", "recruiting", "running")),
        view,
    )
    assert [one.state for one in view.history] == ["recruiting", "running"]


def test_a_view_keeps_no_history_by_default() -> None:
    view = FederationView()
    fold(number_deliveries([transition(run_data(1), "requested")]), view)
    assert not view.history


# --- queries --------------------------------------------------------------------------------------


def test_runs_are_active_until_they_finish() -> None:
    view = view_of(
        transition(run_data(9), "finished"),
        transition(run_data(10), "running"),
        transition(run_data(2), "failed"),
    )
    assert [one.data.run for one in view.active_runs] == ["mnist-10"]
    assert [one.data.run for one in view.finished_runs] == ["mnist-2", "mnist-9"]
    assert view.active_run(TASK) == view.latest_run == view.runs["mnist-10"]
    assert view.active_run("other") is None


def test_an_empty_federation_has_neither_runs_nor_a_champion() -> None:
    view = FederationView()
    assert view.latest_run is None
    assert view.champion(TASK) is None
    assert not view.do_all_serve_champion(TASK, 0)


def test_a_client_is_one_record_over_three_lifecycles() -> None:
    view = view_of(
        transition(client_data(model=model(3), code_version="abc"), "learning"),
        transition(FlClientData(task=TASK, client="c1", run=f"{TASK}-1"), "training"),
    )
    client = view.clients["c1", TASK]
    assert (client.state, client.training_state, client.inference_state) == ("learning", "training", "")
    assert client.model_version == 3, "about to be served"
    assert client.code_version == "abc"
    assert client.run == f"{TASK}-1"
    assert client.is_training
    assert view.training_count == 1
    served = InferenceData(task=TASK, client="c1", model=model(2), endpoint="http://127.0.0.1:8080")
    view.apply(transition(served, "serving"), at=START, sequence=9)
    assert client.model_version == 2
    assert client.endpoint == "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("served", "training", "settled"), [(2, "waiting", True), (1, "waiting", False), (2, "training", False)]
)
def test_all_clients_serve_the_champion(served: int, training: str, *, settled: bool) -> None:
    about: dict[str, Any] = {"task": TASK, "client": "c1"}
    view = view_of(
        transition(ServerData(task=TASK, model=model(2)), "waiting"),
        transition(client_data(), "serving"),
        transition(FlClientData(**about), training),
        transition(InferenceData(**about, model=model(served)), "serving"),
    )
    assert view.do_all_serve_champion(TASK, 1) is settled
    assert not view.do_all_serve_champion(TASK, 2)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no run is in progress"),
        ([transition(run_data(1), "recruiting")], "has not joined mnist-1 yet"),
        ([transition(run_data(1), "running")], "is not in mnist-1"),
        ([ClientDeclined(task=TASK, client="c1", run="mnist-1", reason="hot")], "declined mnist-1: hot"),
        ([FailTrain(task=TASK, client="c1", run="mnist-1", reason="hot")], "failed in mnist-1: hot"),
        (
            [
                ClientDeclined(task=TASK, client="c1", run="mnist-1", reason="hot"),
                ClientJoined(task=TASK, client="c1", run="mnist-1"),
            ],
            "no run is in progress",
        ),
        (
            [
                ClientDeclined(task=TASK, client="c1", run="mnist-1", reason="hot"),
                transition(run_data(2), "recruiting"),
            ],
            "has not joined mnist-2 yet",
        ),
        ([transition(client_data(), "terminated", reason="no model")], "gave up: no model"),
        ([transition(client_data(), "s0")], "begins: waits for the server and the models"),
        ([transition(client_data(), "syncing")], "gets other code ready"),
        ([transition(client_data(), "pending_application")], "takes a new model"),
        ([transition(FlClientData(task=TASK, client="c1"), "training")], ""),
    ],
)
def test_each_client_has_a_reason_for_not_training(messages: list[Message], reason: str) -> None:
    view = view_of(transition(client_data(), "serving"), *messages)
    assert view.not_training_reason(view.clients["c1", TASK]) == reason


def test_a_round_counts_the_replies_to_its_last_messages() -> None:
    view = view_of(
        round_message(2, "c1", "m1"),
        round_message(2, "c2", "m2"),
        round_reply("c1", "m1"),
        round_reply("c1", "unknown"),
    )
    assert view.rounds[TASK].pending_clients == ["c2"]
    assert len(view.rounds[TASK].answered) == 1
    view.apply(round_message(2, "c1", "m3", "evaluate"), at=START, sequence=5)
    assert view.rounds[TASK].message_type == "evaluate"
    assert view.rounds[TASK].pending_clients == ["c1"]


# --- presence -------------------------------------------------------------------------------------


def test_what_a_client_publishes_shows_that_it_is_there() -> None:
    view = view_of(
        transition(client_data("c1"), "serving"),
        ClientJoined(task=TASK, client="c2", run="mnist-1"),
        round_message(1, "c3", "m1"),
    )
    assert view.presence.last_seen == {
        "c1": START + timedelta(seconds=1),
        "c2": START + timedelta(seconds=2),
    }, "a message to c3 is not from it"


def test_a_late_message_does_not_make_a_client_seen_earlier() -> None:
    view = FederationView()
    joined = ClientJoined(task=TASK, client="c1", run="mnist-1")
    view.apply(joined, at=START + timedelta(seconds=5), sequence=2)
    view.apply(joined, at=START, sequence=1)
    assert view.presence.last_seen["c1"] == START + timedelta(seconds=5)


def test_the_last_device_report_counts_after_a_clock_was_corrected() -> None:
    view = FederationView()
    early, late = (DeviceReport(task=TASK, client="c1", cpu=cpu, memory=0, disk=0) for cpu in (0.1, 0.2))
    assert view.apply(early, at=START + timedelta(days=1))
    assert view.apply(late, at=START)
    assert view.presence.devices["c1"].report == view.presence.reports["c1", TASK].report == late
    assert view.presence.last_seen["c1"] == START
    assert not view.apply(Heartbeat(task=TASK, client="c1", run="mnist-1"), at=START + timedelta(seconds=1))
    assert view.presence.last_seen["c1"] == START + timedelta(seconds=1)
    assert not view.clients, "a report alone makes no client of a task"
