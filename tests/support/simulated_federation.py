"""A federation without agents: a test stores the messages of its agents in the real streams.

So a test can have a thousand clients in a moment, and messages with any content.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from fedbus.bus.bus import Bus
from fedbus.contracts import subjects
from fedbus.contracts.client import ClientData, FlClientData, InferenceData
from fedbus.contracts.envelope import Envelope, make_envelope, pack
from fedbus.contracts.message import ClientMessage, LifecycleData, Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import RoundResult, RunData, RunPlan
from fedbus.contracts.server import ServerData
from fedbus.contracts.transition import Transition

TASK = "mnist"
COMMIT = "3a1f6c0d9be2475f8a6e0b1c2d3e4f5061728394"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
BATCH_SIZE = 200


def make_model_ref(version: int) -> ModelRef:
    return ModelRef(version=version, sha256=f"{version:064x}", size_bytes=439_576, architecture="a" * 64)


@dataclass
class SimulatedFederation:
    """Stores messages of any agent, with the time of *clock*."""

    bus: Bus
    clock: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(minutes=10))
    trace_id: str = ""

    def advance(self, seconds: float) -> None:
        self.clock += timedelta(seconds=seconds)

    async def publish(self, message: Message, *, agent: str = "test") -> str:
        """Store a message, and return its id."""
        owner = message.client if isinstance(message, ClientMessage) and message.family != "cmd" else "server"
        return await self._store(subjects.subject_for(self.bus.fed, message), message, agent, owner)

    async def transition(
        self,
        facts: LifecycleData,
        event: str,
        source: str,
        target: str,
        reason: str = "",
        waits_for: str = "",
    ) -> str:
        transition = Transition.model_validate(
            {
                "task": facts.task,
                "event": event,
                "source": source,
                "target": target,
                "reason": reason,
                "waits_for": waits_for,
                "facts": facts.model_dump(),
            }
        )
        subject = subjects.lifecycle(self.bus.fed, transition.kind, transition.key)
        return await self._store(subject, transition, "test", getattr(facts, "client", "server"))

    async def _store(self, subject: str, message: Message, agent: str, owner: str) -> str:
        trace = {"traceparent": f"00-{self.trace_id}-00f067aa0ba902b7-01"} if self.trace_id else {}
        plain = make_envelope(message, source=f"fedbus/{self.bus.fed}/{agent}/{owner}", trace=trace)
        envelope = Envelope(**{**vars(plain), "time": self.clock})
        await self.bus.publish_to_stream(subject, envelope.headers(), pack(message))
        return envelope.id

    # --- whole lifecycles -------------------------------------------------------------------------

    async def create_clients(self, names: Iterable[str], *, version: int = 2) -> None:
        """Create clients that serve and wait for a run."""
        names = list(names)
        for at in range(0, len(names), BATCH_SIZE):
            await asyncio.gather(
                *(self._create_client(name, version) for name in names[at : at + BATCH_SIZE])
            )

    async def _create_client(self, name: str, version: int) -> None:
        about: dict[str, Any] = {"task": TASK, "client": name}
        facts = ClientData(
            **about, model=make_model_ref(version), code_version=COMMIT, labels={"site": "lab"}
        )
        await self.transition(facts, "started", "", "s0", waits_for="the server and the model repository")
        await self.transition(facts, "model_fetched", "s0", "pending_application")
        await self.transition(facts, "infer_ready", "pending_application", "serving")
        await self.transition(FlClientData(**about), "started", "", "waiting")
        inference = InferenceData(**about, model=make_model_ref(version), endpoint="http://127.0.0.1:8080")
        await self.transition(inference, "infer_start", "empty", "serving")

    async def create_server(self, version: int = 2, **changes: Any) -> str:
        facts = ServerData(
            task=TASK, model=make_model_ref(version), term=version, code_version=COMMIT, **changes
        )
        return await self.transition(facts, "model_ready", "model_init", "waiting")

    def make_run_facts(
        self, number: int, rounds: int, *, of: int = 4, loss: float = 0.9, **facts: Any
    ) -> RunData:
        results = [
            RoundResult(
                round=at,
                metrics={"loss": loss * 0.8**at, "accuracy": 1 - 0.5 * loss * 0.8**at},
                seconds=6.5 if at else 0,
                participants={"c1": 18000, "c2": 18000, "c3": 18000} if at else {},
            )
            for at in range(rounds + 1)
        ]
        return RunData.model_validate(
            {
                "task": TASK,
                "run": f"{TASK}-{number}",
                "plan": RunPlan(rounds=of, quorum=2, config={"lr": 0.02}).model_dump(),
                "requested_at": self.clock,
                "trigger": "schedule" if number % 2 else "manual",
                "rounds": [one.model_dump() for one in results],
                "cohort": ("c1", "c2", "c3"),
                "code_version": COMMIT,
                "trace_id": TRACE,
            }
            | facts
        )
