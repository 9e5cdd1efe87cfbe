"""What the federation looks like now, folded from its transitions."""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fedbus.contracts.client import ClientData, FlClientData, InferenceData
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import RUN, RunData, RunState
from fedbus.contracts.server import ServerData
from fedbus.contracts.transition import Transition


@dataclass(frozen=True)
class TransitionView:
    """One transition as it is told to people."""

    at: datetime
    kind: str
    thing: str
    source: str
    event: str
    target: str
    reason: str

    def as_json(self) -> dict[str, str]:
        return {
            "at": self.at.isoformat(),
            "kind": self.kind,
            "thing": self.thing,
            "from": self.source,
            "event": self.event,
            "to": self.target,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.at.astimezone():%H:%M:%S} {self.kind} {self.thing}: {self.source or '•'} → {self.target}{why}"


@dataclass
class ClientView:
    """One client, over its three lifecycles."""

    client: str
    state: str = "s0"
    training: str = "waiting"
    inference: str = "empty"
    endpoint: str = ""
    served: ModelRef | None = None
    steps: list[TransitionView] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Serving, and nothing under way."""
        return (self.state, self.training, self.inference) == ("serving", "waiting", "serving")


@dataclass
class Fleet:
    """The server, its runs and its clients."""

    server: str = "model_init"
    server_facts: ServerData | None = None
    runs: dict[str, RunData] = field(default_factory=dict)
    run_states: dict[str, RunState] = field(default_factory=dict)
    run_reasons: dict[str, str] = field(default_factory=dict)
    clients: dict[str, ClientView] = field(default_factory=dict)
    steps: list[TransitionView] = field(default_factory=list)
    _transition_seen: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_for_change(self) -> None:
        """Wait for the next transition."""
        self._transition_seen.clear()
        await self._transition_seen.wait()

    def see(self, transition: Transition, at: datetime) -> TransitionView:
        """Take *transition* in; what it was, for whoever prints it."""
        step = TransitionView(
            at,
            transition.kind,
            transition.thing,
            transition.source,
            transition.event,
            transition.target,
            transition.reason,
        )
        self.steps.append(step)
        self._transition_seen.set()
        match transition.facts:
            case ServerData() as facts:
                self.server, self.server_facts = transition.target, facts
            case RunData() as facts:
                self.runs[facts.run] = facts
                self.run_states[facts.run] = RunState(transition.target)
                self.run_reasons[facts.run] = transition.reason
            case ClientData() as facts:
                self._update_client(facts.client, step).state = transition.target
            case FlClientData() as facts:
                self._update_client(facts.client, step).training = transition.target
            case InferenceData() as facts:
                view = self._update_client(facts.client, step)
                view.inference, view.endpoint, view.served = transition.target, facts.endpoint, facts.model
        return step

    def _update_client(self, client: str, step: TransitionView) -> ClientView:
        view = self.clients.setdefault(client, ClientView(client))
        view.steps.append(step)
        return view

    @property
    def ended(self) -> list[RunData]:
        """The runs that are over, in the order in which they were asked for."""
        return [facts for run, facts in self.runs.items() if self.run_states[run] in RUN.final]

    @property
    def current(self) -> RunData | None:
        """The run that is under way."""
        under_way = [facts for run, facts in self.runs.items() if self.run_states[run] not in RUN.final]
        return under_way[-1] if under_way else None

    def are_all_settled(self, clients: int) -> bool:
        """Whether *clients* are there and each serves the version that the server has."""
        version = self.server_facts.model.version if self.server_facts and self.server_facts.model else None
        return len(self.clients) >= clients and all(
            view.is_settled and view.served is not None and view.served.version == version
            for view in self.clients.values()
        )


def rounds_as_json(run: RunData) -> list[dict[str, Any]]:
    """The rounds of *run*; round 0, the model that it began with, is not one."""
    return [
        {"round": one.round, "loss": one.loss, "accuracy": one.accuracy, "seconds": round(one.seconds, 3)}
        for one in run.rounds
        if one.round > 0
    ]
