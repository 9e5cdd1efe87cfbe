"""The invariants of all lifecycles, checked with each transition of a simulated fleet and at its end."""

from dataclasses import dataclass, field
from typing import Final

from fedbus.agents.client_manager.agent import BootstrapFailed
from fedbus.bus.errors import BusError
from fedbus.bus.memory.stream import StoredRecord
from fedbus.contracts.client import ClientEvent, ClientState
from fedbus.contracts.envelope import decode_message
from fedbus.contracts.run import RUN, RunState
from fedbus.contracts.server import ServerData, ServerEvent, ServerState
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.contracts.transition import LIFECYCLES, Transition
from fedbus.simulation.fleet.agents import SupervisedAgent
from support.fleet_faults import Fault

WITH_DEADLINE: Final = frozenset(
    {
        ("client", ClientState.LEARNING),
        ("client", ClientState.SYNCING),
        ("server", ServerState.RECRUITING),
        ("server", ServerState.PUBLISHING),
    }
)
"""The states that name their deadline in the transition that leads to them, unless they are their own source."""
DEADLINE_SLACK_S: Final = 1.0
RESOLUTION_S: Final = 1e-3
"""Times of messages are rounded."""
EFFECT_S: Final = 170.0
"""The time after a fault within which it may cause a failure: the limit of a run, and a restart."""
EXPECTED_ERRORS: Final = (BusError, BootstrapFailed, ConnectionError, TimeoutError)
"""The errors with which an agent may end; its supervisor starts it again."""


@dataclass(frozen=True)
class _Last:
    target: str
    sequence: int
    at_s: float
    deadline_s: float | None


@dataclass
class InvariantChecker:
    """Checks the transitions of a fleet with these *faults*; collects *violations* as text."""

    faults: list[Fault]
    violations: list[str] = field(default_factory=list)
    runs: dict[str, str] = field(default_factory=dict)
    """The last state of each run."""
    finished: list[tuple[str, float]] = field(default_factory=list)
    """The runs that produced a model version, and when."""
    _last: dict[str, _Last] = field(default_factory=dict)
    _last_sequence: int = 0
    _start_s: float | None = None
    """The time of the first transition, at which the fleet starts."""

    def on_stored(self, record: StoredRecord) -> None:
        """Check a stored message, if it is a transition."""
        if ".life." not in record.subject:
            return
        envelope, message = decode_message(record.subject, record.headers, record.data)
        assert isinstance(message, Transition)
        self._check(message, record, envelope.source)

    def _check(self, one: Transition, record: StoredRecord, source: str) -> None:
        entity, lifecycle = record.subject.split(".life.")[1], LIFECYCLES[one.kind]
        last, at_s = self._last.get(record.subject), record.time_ns / 1e9
        self._start_s = at_s if self._start_s is None else self._start_s
        is_creation = one.event == lifecycle.creation and one.source == ""
        if last is None and not is_creation:
            self._report(one, entity, "its first transition is not its creation")
        if last is not None and one.source != last.target:
            self._report(one, entity, f"the log has it in state {last.target}")
        if not is_creation and not one.is_legal:
            self._report(one, entity, "the table has no such arrow")
        if is_creation and one.target != lifecycle.initial:
            self._report(one, entity, f"it begins in {one.target}")
        if record.sequence <= self._last_sequence:
            self._report(one, entity, "the log is not in order")
        agent, owner = source.split("/")[2:]
        expected_owner = getattr(one.facts, "client", SERVER_SIDE)
        if (agent, owner) != (lifecycle.owner, expected_owner):
            self._report(one, entity, f"{source} is not its owner")
        wait = lifecycle.waits.get(lifecycle.states(one.target))
        if one.waits_for != (wait.waiting_for if wait else ""):
            self._report(one, entity, f"it waits for {one.waits_for!r}")
        is_entered = one.source != one.target
        deadline_s = one.deadline.timestamp() if one.deadline else None
        if is_entered and (one.kind, one.target) in WITH_DEADLINE and deadline_s is None:
            self._report(one, entity, "it waits without a deadline")
        self._last_sequence = record.sequence
        self._last[record.subject] = _Last(one.target, record.sequence, at_s, deadline_s)
        self._follow(one, at_s)

    def _follow(self, one: Transition, at_s: float) -> None:
        match one.kind:
            case "run":
                self.runs[one.key] = one.target
                if one.target == RunState.FINISHED:
                    self.finished.append((one.key, at_s))
            case "server" if one.event == ServerEvent.ROUND_FINISHED and isinstance(one.facts, ServerData):
                self._check_round(one, one.facts, at_s)
            case "client" if one.event in (ClientEvent.FAIL_TRAIN, ClientEvent.TRAINER_LOST):
                self._check_failure(one, at_s)
            case _:
                pass

    def _check_round(self, one: Transition, facts: ServerData, at_s: float) -> None:
        """Check that each counted failure has a cause: a fault of that client, or of the server side."""
        result = facts.last
        assert result is not None
        if unknown := (result.failures.keys() | result.participants.keys()) - set(facts.cohort):
            self._report(one, one.key, f"{sorted(unknown)} are not in the cohort")
        if both := result.failures.keys() & result.participants.keys():
            self._report(one, one.key, f"{sorted(both)} have failed and taken part")
        for client, reason in result.failures.items():
            if not self._has_cause(client, at_s):
                self._report(one, one.key, f"{client} is counted as failed without a fault: {reason}")

    def _check_failure(self, one: Transition, at_s: float) -> None:
        client = one.key.partition(".")[0]
        if not self._has_cause(client, at_s) and not one.reason.startswith("the run "):
            self._report(one, one.key, f"it failed without a fault: {one.reason}")

    def _has_cause(self, client: str, at_s: float) -> bool:
        """Return whether a fault of *client* or of the server side is so recent that it may have an effect."""
        since_start_s = at_s - (self._start_s or 0.0)
        return any(
            fault.client in ("", client)
            and fault.at_s - RESOLUTION_S <= since_start_s <= fault.at_s + fault.lasts_s + EFFECT_S
            for fault in self.faults
        )

    def _report(self, one: Transition, entity: str, problem: str) -> None:
        self.violations.append(
            f"{one.kind} {entity}: {one.event} from {one.source or '•'} to {one.target}: {problem}"
        )

    # --- the end --------------------------------------------------------------------------------------

    def check_end(self, *, now_s: float, settled_since_s: float, agents: list[SupervisedAgent]) -> None:
        """Check the fleet after a time without faults: it has recovered, and nothing waits for ever.

        Args:
            now_s: The time of the end.
            settled_since_s: All waits that began before it must be over.
            agents: All agents of the fleet.

        """
        for agent in agents:
            self._check_agent(agent)
        for subject, last in self._last.items():
            kind, key = subject.split(".life.")[1].split(".", 1)
            self._check_wait(kind, key, last, now_s, settled_since_s)
        if not any(at_s > settled_since_s for _, at_s in self.finished):
            self.violations.append("no run has finished after the faults")

    def _check_agent(self, agent: SupervisedAgent) -> None:
        if not agent.is_running:
            self.violations.append(f"the {agent.name} does not run")
        for error in agent.errors:
            for one in _leaves(error):
                if not isinstance(one, EXPECTED_ERRORS):
                    self.violations.append(f"the {agent.name} ended with {type(one).__name__}: {one}")

    def _check_wait(self, kind: str, key: str, last: _Last, now_s: float, settled_since_s: float) -> None:
        lifecycle = LIFECYCLES[kind]
        state = lifecycle.states(last.target)
        if kind == RUN.kind and state not in RUN.final and last.at_s < settled_since_s:
            self.violations.append(f"run {key} is {state} since {now_s - last.at_s:.0f} s")
        if state in lifecycle.waits and last.at_s < settled_since_s:
            self.violations.append(f"{kind} {key} waits in {state} since {now_s - last.at_s:.0f} s")
        if (
            last.deadline_s is not None
            and last.deadline_s + DEADLINE_SLACK_S < now_s
            and state in lifecycle.waits
        ):
            self.violations.append(
                f"{kind} {key} is in {state}, and its deadline passed {now_s - last.deadline_s:.0f} s ago"
            )
        if kind == "client" and state is ClientState.TERMINATED:
            self.violations.append(f"{kind} {key} is {state}")


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]
