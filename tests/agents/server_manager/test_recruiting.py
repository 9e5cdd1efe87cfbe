"""How long a run waits for its quorum, and when it gives up."""

from collections.abc import Collection, Mapping

from support.server_effects import OPEN, STOPS_RECRUITING, closed, joined
from support.server_machine import (
    NAME,
    NEW,
    NOW,
    OLD,
    PLAN,
    RECRUIT_UNTIL,
    RUN,
    RUN_DATA,
    TRAINED,
    ServerDriver,
    model,
    running_machine,
)

from fedbus.agents.common.machine import Log, Publish, StartTimer, TimerFired
from fedbus.agents.server_manager.effects import MoveServer, ReadRecruits, RecordRun, StopFlowerServer
from fedbus.agents.server_manager.events import FitChecked, FlowerServerStarted, RecruitsRead, TimerName
from fedbus.agents.server_manager.recruiting import (
    AppNotLoaded,
    ExtendDeadline,
    QuorumMissed,
    ReadClients,
    Recruiting,
)
from fedbus.contracts.client import FailTrain
from fedbus.contracts.flower_server import BeginTraining, ServerStarted
from fedbus.contracts.server import ServerEvent, ServerState, UpdateReady


def load_failed(client: str, reason: str = "no") -> FailTrain:
    return FailTrain(task=NAME, client=client, run=RUN, reason=reason, trainer_lost=True, load_failed=True)


def read_recruits(
    *known: str,
    declined: Mapping[str, str] | None = None,
    load_failures: Mapping[str, str] | None = None,
    loading: Collection[str] = (),
) -> RecruitsRead:
    return RecruitsRead(declined or {}, load_failures or {}, frozenset(loading), frozenset(known))


def recruiting_expired(reason: str, *, missing: int) -> list[object]:
    return [
        StopFlowerServer(RUN),
        STOPS_RECRUITING,
        MoveServer(ServerEvent.RECRUITING_EXPIRED, {"missing": missing}, reason),
        closed("failed", reason),
        RecordRun("failed"),
    ]


# --- decisions ----------------------------------------------------------------------------------------


def test_the_time_for_the_app_is_extended_once() -> None:
    recruiting = Recruiting(is_starting=True)
    assert recruiting.deadline is None
    assert recruiting.on_deadline(PLAN) == ExtendDeadline(PLAN.round_s)
    assert recruiting.on_deadline(PLAN) == AppNotLoaded("the server did not load the app within 90 s")


def test_the_time_to_join_begins_when_recruiting_opens() -> None:
    recruiting = Recruiting(is_starting=True)
    recruiting.on_deadline(PLAN)
    assert recruiting.open(PLAN, NOW) == RECRUIT_UNTIL == recruiting.deadline
    assert recruiting.on_deadline(PLAN) == ReadClients()


def test_the_time_to_load_the_code_is_extended_once() -> None:
    recruiting = Recruiting(["c1"])
    read = read_recruits("c1", "c2", loading={"c2"})
    assert recruiting.on_recruits_read(read, PLAN) is None
    assert recruiting.on_deadline(PLAN) == ReadClients()
    assert recruiting.on_recruits_read(read, PLAN) == ExtendDeadline(PLAN.round_s)
    assert recruiting.on_recruits_read(read, PLAN) is None
    assert recruiting.on_deadline(PLAN) == ReadClients()
    assert recruiting.on_recruits_read(read, PLAN) == QuorumMissed("1 of 2 clients joined in time (c1)", 1)


def test_a_client_that_joins_after_a_load_failure_counts() -> None:
    recruiting = Recruiting()
    recruiting.on_recruits_read(read_recruits("c1", "c2", "c3"), PLAN)
    assert recruiting.on_fail_train(load_failed("c1"), PLAN) is None
    recruiting.add("c1")
    assert recruiting.on_fail_train(load_failed("c2"), PLAN) is None
    assert recruiting.on_fail_train(load_failed("c3"), PLAN) == ReadClients()


def test_the_quorum_is_of_clients_not_of_messages() -> None:
    recruiting = Recruiting(["c1"])
    recruiting.add("c1")
    assert (recruiting.joined, recruiting.has_quorum(PLAN)) == (("c1",), False)
    recruiting.add("c2")
    assert (recruiting.joined, recruiting.has_quorum(PLAN)) == (("c1", "c2"), True)


# --- what the server manager does ---------------------------------------------------------------------


def test_a_flower_server_that_is_up_invites_the_clients() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, traceparent="00-trace", **RUN_DATA))
    invitation = UpdateReady(
        task=NAME,
        run=RUN,
        plan=PLAN,
        recruit_until=RECRUIT_UNTIL,
        code_version=OLD,
        model=model(1),
        traceparent="00-trace",
    )
    assert driver.handle(ServerStarted(task=NAME, run=RUN)) == [
        StartTimer(TimerName.RECRUITING, PLAN.recruit_s),
        Publish(invitation),
    ]
    assert driver.machine.health(NOW).open_run == invitation


def test_the_quorum_starts_the_training_and_counts_clients_once() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    assert driver.handle(joined("c1")) == []
    assert driver.handle(joined("c1")) == []
    assert driver.handle(joined("c9", code=NEW)) == [
        Log("warning", "Ignoring a client with another code version", {"client": "c9", "code": NEW})
    ]
    assert driver.handle(joined("c2")) == [
        STOPS_RECRUITING,
        MoveServer(ServerEvent.QUORUM_REACHED, {"cohort": ("c1", "c2")}),
        Publish(BeginTraining(task=NAME, run=RUN, cohort=("c1", "c2"))),
    ]


def test_expired_recruiting_names_joined_and_declined_clients() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    driver.handle(joined("c1"))
    assert driver.handle(TimerFired(TimerName.RECRUITING)) == [ReadRecruits(RUN)]
    reason = "1 of 2 clients joined in time (c1); c2 declined: its battery is low"
    assert driver.handle(read_recruits(declined={"c1": "it was busy", "c2": "its battery is low"})) == [
        StopFlowerServer(RUN),
        STOPS_RECRUITING,
        MoveServer(ServerEvent.RECRUITING_EXPIRED, {"missing": 1}, reason),
        closed("failed", reason),
        RecordRun("failed"),
    ]


def test_a_run_whose_quorum_cannot_load_the_code_fails_at_once() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    why = "module 'client' imports 'no_such', which is not installed (client.py:1)"
    assert driver.handle(load_failed("c1", why)) == [ReadRecruits(RUN)]
    reason = f"0 of 2 clients joined in time (none); c1 cannot load the task's code: {why}"
    read = read_recruits("c1", "c2", load_failures={"c1": why})
    assert driver.handle(read) == recruiting_expired(reason, missing=2)


def test_a_client_that_cannot_load_the_code_leaves_a_run_that_others_can_join() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    assert driver.handle(load_failed("c1")) == [ReadRecruits(RUN)]
    assert driver.handle(read_recruits("c1", "c2", "c3", load_failures={"c1": "no"})) == []
    assert driver.handle(joined("c2")) == []
    assert driver.handle(load_failed("c3")) == [ReadRecruits(RUN)]
    failed = "c1 cannot load the task's code: no; c3 cannot load the task's code: no"
    reason = f"1 of 2 clients joined in time (c2); {failed}"
    read = read_recruits("c1", "c2", "c3", load_failures={"c1": "no", "c3": "no"})
    assert driver.handle(read) == recruiting_expired(reason, missing=1)


def test_many_failing_clients_are_not_read_again_while_the_quorum_is_possible() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    clients = [f"c{number}" for number in range(10)]
    driver.handle(load_failed("c0"))
    driver.handle(read_recruits(*clients, load_failures={"c0": "no"}))
    assert [driver.handle(load_failed(client)) for client in clients[1:8]] == [[]] * 7
    assert driver.handle(load_failed("c8")) == [ReadRecruits(RUN)]


def test_a_run_waits_for_clients_that_still_load_the_code() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    driver.handle(joined("c1"))
    driver.handle(TimerFired(TimerName.RECRUITING))
    read = read_recruits("c1", "c2", loading={"c1", "c2"})
    assert driver.handle(read) == [StartTimer(TimerName.RECRUITING, PLAN.round_s)]
    assert driver.handle(joined("c2"))[1:] == [
        MoveServer(ServerEvent.QUORUM_REACHED, {"cohort": ("c1", "c2")}),
        Publish(BeginTraining(task=NAME, run=RUN, cohort=("c1", "c2"))),
    ]


def test_a_run_fails_when_the_last_loading_client_fails() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    driver.handle(TimerFired(TimerName.RECRUITING))
    driver.handle(read_recruits("c1", "c2", "c3", loading={"c1", "c2", "c3"}))
    lost = FailTrain(task=NAME, client="c1", run=RUN, reason="out of memory", trainer_lost=True)
    assert driver.handle(lost) == [ReadRecruits(RUN)]
    assert driver.handle(read_recruits("c1", "c2", "c3", loading={"c2", "c3"})) == []  # the timer runs
    driver.handle(lost)
    reason = "0 of 2 clients joined in time (none)"
    assert driver.handle(read_recruits("c1", "c2", "c3", loading={"c3"})) == recruiting_expired(
        reason, missing=2
    )


def test_the_time_to_recruit_begins_when_the_server_has_loaded_the_app() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    for event in (OPEN, FitChecked(), FlowerServerStarted(RUN)):
        driver.handle(event)
    assert driver.handle(TimerFired(TimerName.RECRUITING)) == [StartTimer(TimerName.RECRUITING, PLAN.round_s)]
    timer, _ = driver.handle(ServerStarted(task=NAME, run=RUN))
    assert timer == StartTimer(TimerName.RECRUITING, PLAN.recruit_s)
    assert driver.handle(TimerFired(TimerName.RECRUITING)) == [ReadRecruits(RUN)]


def test_a_server_that_never_loads_the_app_fails_the_run() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    for event in (OPEN, FitChecked(), FlowerServerStarted(RUN), TimerFired(TimerName.RECRUITING)):
        driver.handle(event)
    stop, *_, record = driver.handle(TimerFired(TimerName.RECRUITING))
    assert (stop, record) == (StopFlowerServer(RUN), RecordRun("failed"))


def test_loading_has_a_deadline() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    driver.handle(TimerFired(TimerName.RECRUITING))
    read = read_recruits("c1", "c2", loading={"c1", "c2"})
    driver.handle(read)
    assert driver.handle(TimerFired(TimerName.RECRUITING)) == [ReadRecruits(RUN)]
    assert driver.handle(read) == recruiting_expired("0 of 2 clients joined in time (none)", missing=2)


def test_a_late_recruiting_deadline_changes_nothing() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    assert driver.handle(TimerFired(TimerName.RECRUITING)) == []
