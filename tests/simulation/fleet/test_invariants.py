"""The checker of the invariants finds each violation."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.fleet_faults import Fault, FaultKind
from support.fleet_invariants import InvariantChecker

from fedbus.bus.memory.stream import StoredRecord
from fedbus.contracts import subjects
from fedbus.contracts.envelope import make_envelope, pack
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.transition import LIFECYCLES, Transition
from fedbus.simulation.fleet.agents import SupervisedAgent

FED = FederationId("fleet")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
C1 = {"kind": "client", "task": "tiny", "client": "client-0001"}
SOURCE = "fedbus/fleet/client-manager/client-0001"


class FakeLog:
    """Gives transitions to a checker."""

    def __init__(self, *faults: Fault) -> None:
        self.checker = InvariantChecker(list(faults))
        self._sequence = 0

    def add(
        self,
        facts: dict[str, Any],
        event: str,
        source: str,
        target: str,
        *,
        sender: str = SOURCE,
        **fields: Any,
    ) -> None:
        lifecycle = LIFECYCLES[facts["kind"]]
        wait = lifecycle.waits.get(lifecycle.states(target))
        content = {"task": "tiny", "event": event, "source": source, "target": target, "facts": facts}
        transition = Transition.model_validate(
            content | {"waits_for": wait.waiting_for if wait else ""} | fields
        )
        subject = subjects.lifecycle(FED, transition.kind, transition.key)
        headers = make_envelope(transition, source=sender).headers()
        self._sequence += 1
        time_ns = int(NOW.timestamp() * 1e9)
        self.checker.on_stored(StoredRecord(self._sequence, subject, pack(transition), headers, time_ns))

    def serve(self) -> None:
        self.add(C1, "started", "", "s0")
        self.add(C1, "model_fetched", "s0", "pending_application")
        self.add(C1, "infer_ready", "pending_application", "serving")

    @property
    def violations(self) -> list[str]:
        return self.checker.violations


def test_a_legal_log_has_no_violations() -> None:
    log = FakeLog()
    log.serve()
    log.add(C1 | {"run": "tiny-1"}, "client_start", "serving", "learning", deadline=NOW)
    assert log.violations == []


def test_an_illegal_transition_is_found() -> None:
    log = FakeLog()
    log.serve()
    log.add(C1, "fin_train", "serving", "pending_application")
    assert ["no such arrow" in one for one in log.violations] == [True]


def test_a_transition_from_another_state_than_the_log_has_is_found() -> None:
    log = FakeLog()
    log.serve()
    log.add(C1, "model_fetched", "s0", "pending_application")
    assert "the log has it in state serving" in log.violations[0]


def test_a_second_owner_is_found() -> None:
    log = FakeLog()
    with pytest.raises(ValueError, match="forged"):
        log.add(C1, "started", "", "s0", sender="fedbus/fleet/client-manager/client-0002")
    log.add(C1, "started", "", "s0", sender="fedbus/fleet/flower-client/client-0001")
    assert "is not its owner" in log.violations[0]


def test_a_wait_without_a_deadline_is_found() -> None:
    log = FakeLog()
    log.serve()
    log.add(C1 | {"run": "tiny-1"}, "client_start", "serving", "learning")
    assert "waits without a deadline" in log.violations[0]


def test_a_counted_failure_without_a_fault_is_found() -> None:
    for faults, expected in (
        ([], 1),
        ([Fault(FaultKind.SLOW, 5, 1, "client-0001")], 1),
        ([Fault(FaultKind.SLOW, 0, 1, "client-0001")], 0),
    ):
        log = FakeLog(*faults)
        log.serve()
        log.add(C1 | {"run": "tiny-1"}, "client_start", "serving", "learning", deadline=NOW)
        log.add(C1, "fail_train", "learning", "serving", reason="ValueError: no rows")
        assert len(log.violations) == expected


def test_what_waits_for_ever_is_found_at_the_end() -> None:
    log = FakeLog()
    log.serve()
    log.add(
        C1 | {"run": "tiny-1"}, "client_start", "serving", "learning", deadline=NOW + timedelta(seconds=5)
    )
    later = NOW.timestamp() + 100
    log.checker.check_end(now_s=later, settled_since_s=later - 50, agents=[])
    text = "\n".join(log.violations)
    assert "waits in learning since 100 s" in text
    assert "its deadline passed 95 s ago" in text
    assert "no run has finished after the faults" in text


def test_an_agent_that_ended_with_a_bug_is_found() -> None:
    async def nothing(*_: object) -> None: ...

    agent = SupervisedAgent("client manager of client-0001", nothing)
    agent.errors = [ExceptionGroup("group", [KeyError("run")]), TimeoutError()]
    log = FakeLog()
    log.checker.check_end(now_s=0, settled_since_s=0, agents=[agent])
    assert log.violations[:2] == [
        "the client manager of client-0001 does not run",
        "the client manager of client-0001 ended with KeyError: 'run'",
    ]
