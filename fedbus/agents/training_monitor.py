"""The training monitor: follows a task's runs round by round, and tells the trackers that people keep their curves in.

It reads the log and says nothing, so that whatever becomes of it, no run is any different. What a tracker
does with a figure is the tracker's own; one that blocks, blocks a thread of its own, and one that fails
again and again is left out until the monitor is started anew.
"""

import asyncio
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias, TypeVar

import structlog

from fedbus.agents.tasks import backoff, first_of
from fedbus.bus.bus import Bus, Seen
from fedbus.bus.errors import NoFederation
from fedbus.bus.streams import events_stream, life_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import RoundReply
from fedbus.contracts.run import RUN, RoundResult, RunFacts
from fedbus.contracts.server import RoundMessage
from fedbus.contracts.transition import Transition
from fedbus.domain.time_split import Answered, split
from fedbus.stores.trackers.interface import RoundSeen, RunBegun, RunEnded, Tracker
from fedbus.stores.trackers.local import LocalTracker

MESSAGES_REMEMBERED: Final = 20_000
"""Of rounds under way: what was asked and not answered yet, and what was answered."""
CLIENTS_TRACKED: Final = 100
"""Of a round's clients, those whose own figures are kept: curves of more are read by nobody."""
WORDS_WAITING: Final = 1000
"""What may wait for a tracker that is slow, before it misses something."""
FAILURES_BORNE: Final = 3
CLOSE_S: Final = 30.0

Word: TypeAlias = RunBegun | RoundSeen | RunEnded
T = TypeVar("T")

log = structlog.get_logger("fedbus.training_monitor")


class Told:
    """One tracker, in a thread of its own. *memory* knows what it was told before."""

    def __init__(self, name: str, tracker: Tracker, memory: LocalTracker) -> None:
        self._name = name
        self._tracker = tracker
        self._memory = memory
        self._waiting: queue.Queue[Word | None] = queue.Queue(WORDS_WAITING)
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def tell(self, word: Word) -> None:
        """Never waits: what does not fit is missed, and said to be."""
        try:
            self._waiting.put_nowait(word)
        except queue.Full:
            log.warning("the tracker is too slow, and misses a word", tracker=self._name, run=word.run)

    def close(self) -> None:
        """Have it take what waits, and end; blocking, for CLOSE_S at the longest."""
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while (word := self._waiting.get()) is not None:
            if self._failures < FAILURES_BORNE:
                self._hand_over(word)
        self._guarded(self._tracker.close, "close")

    def _hand_over(self, word: Word) -> None:
        what = f"round {word.round}" if isinstance(word, RoundSeen) else type(word).__name__
        if self._memory.was_told(self._name, word.run, what):
            return
        match word:
            case RunBegun():
                done = self._guarded(lambda: self._tracker.begin(word), what)
            case RoundSeen():
                done = self._guarded(lambda: self._tracker.round(word), what)
            case RunEnded():
                done = self._guarded(lambda: self._tracker.end(word), what)
        if done:
            self._memory.tell(self._name, word.run, what)

    def _guarded(self, work: Callable[[], None], what: str) -> bool:
        """Whether it did; somebody else's code may raise anything, and costs nobody a run."""
        try:
            work()
        except Exception as error:  # noqa: BLE001
            self._failures += 1
            log.warning(
                "a tracker failed", tracker=self._name, at=what, reason=" ".join(str(error).split())[:300]
            )
            if self._failures == FAILURES_BORNE:
                log.warning("the tracker is left out until the monitor is started anew", tracker=self._name)
            return False
        self._failures = 0
        return True


@dataclass(frozen=True)
class _Asked:
    """A message of a round on its way."""

    run: str
    round: int
    client: str
    at: datetime


class RoundTimes:
    """When each client was asked and answered, in the rounds that are under way; bounded."""

    def __init__(self) -> None:
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._answered: OrderedDict[str, tuple[_Asked, Answered]] = OrderedDict()

    def see(self, seen: Seen) -> None:
        match seen.message:
            case RoundMessage() as message:
                asked = _Asked(message.run, message.round or 0, message.client, seen.envelope.time)
                _remember(self._asked, message.message_id, asked)
            case RoundReply() as reply if (found := self._asked.pop(reply.reply_to, None)) is not None:
                answered = Answered(reply.client, found.at, seen.envelope.time, reply.train_s)
                _remember(self._answered, reply.message_id, (found, answered))

    def of(self, run: str, number: int, ended: datetime) -> Mapping[str, Mapping[str, float]]:
        """Where the time of a round went, by client; forgets it and the rounds before."""
        mine = [one for asked, one in self._answered.values() if (asked.run, asked.round) == (run, number)]
        for key, (asked, _) in list(self._answered.items()):
            if asked.run != run or asked.round <= number:
                del self._answered[key]
        return split(mine, ended)


class TrainingMonitor:
    """Follows the runs of *task*. *trackers* are told, by their names; *memory* is the one that is always there."""

    def __init__(
        self, bus: Bus, task: str, memory: LocalTracker, trackers: Mapping[str, Tracker] | None = None
    ) -> None:
        self._bus = bus
        self._task = task
        self._memory = memory
        self._trackers = {"local": memory, **(trackers or {})}
        self._told: Sequence[Told] = ()
        self._times = RoundTimes()
        self._steps: dict[str, int] = {}
        """Rounds of all runs before each run."""
        self._next_step = 0
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until *stop* is set: from the beginning of the log, since a tracker knows what it has heard."""
        self._told = [Told(name, tracker, self._memory) for name, tracker in self._trackers.items()]
        try:
            await first_of(stop.wait(), self._follow())
        finally:
            for told in self._told:
                await asyncio.to_thread(told.close)

    async def _follow(self) -> None:
        attempt = 0
        while True:
            try:
                await first_of(self._follow_runs(), self._follow_messages())
            except NoFederation:  # the server side has not made its streams yet
                await asyncio.sleep(backoff(attempt))
                attempt += 1

    async def _follow_runs(self) -> None:
        wanted = [subjects.life(self._bus.fed, "run", ">")]
        async with self._bus.watch(life_stream(self._bus.fed), wanted, whole=True) as moves:
            self.ready.set()
            async for seen in moves:
                move = seen.message
                if (
                    isinstance(move, Transition)
                    and isinstance(move.facts, RunFacts)
                    and move.task == self._task
                ):
                    self._run_moved(move, move.facts, seen.envelope.time)

    async def _follow_messages(self) -> None:
        """What is asked of clients and what they answer: not their content, which this agent could not read."""
        wanted = [subjects.every(self._bus.fed, kind, task=self._task) for kind in (RoundMessage, RoundReply)]
        async with self._bus.watch(events_stream(self._bus.fed), wanted) as messages:
            async for seen in messages:
                self._times.see(seen)

    def _run_moved(self, move: Transition, facts: RunFacts, at: datetime) -> None:
        if facts.run not in self._steps:
            self._steps[facts.run] = self._next_step
        match move.event:
            case "quorum_reached":
                self._tell(_begun(facts, at))
            case "round_finished" if facts.rounds:
                self._round_finished(facts, facts.rounds[-1], at)
        if move.target in RUN.final:
            self._tell(_ended(move, facts, at))

    def _round_finished(self, facts: RunFacts, result: RoundResult, at: datetime) -> None:
        step = self._steps[facts.run] + result.round
        self._next_step = max(self._next_step, step)
        times = self._times.of(facts.run, result.round, at)
        self._tell(
            RoundSeen(
                run=facts.run,
                task=self._task,
                round=result.round,
                step=step,
                at=at,
                metrics=_figures(result),
                clients={
                    client: {"samples": float(samples), **times.get(client, {})}
                    for client, samples in list(result.participants.items())[:CLIENTS_TRACKED]
                },
            )
        )

    def _tell(self, word: Word) -> None:
        for told in self._told:
            told.tell(word)


def _figures(result: RoundResult) -> dict[str, float]:
    """What the app reports, loss and accuracy under these very names, and what the round itself was like."""
    joined = {"loss": result.loss, "accuracy": result.accuracy}
    return {
        **result.metrics,
        **{name: value for name, value in joined.items() if value is not None},
        "seconds": result.seconds,
        "clients": float(len(result.participants)),
        "failures": float(len(result.failures)),
        "samples": float(sum(result.participants.values())),
    }


def _begun(facts: RunFacts, at: datetime) -> RunBegun:
    return RunBegun(
        run=facts.run,
        task=facts.task,
        at=at,
        trigger=facts.trigger,
        code_version=facts.code_version,
        config=facts.plan.config,
        trace_id=facts.trace_id,
    )


def _ended(move: Transition, facts: RunFacts, at: datetime) -> RunEnded:
    return RunEnded(
        run=facts.run,
        task=facts.task,
        at=at,
        state=move.target,
        reason=move.reason,
        model_version=facts.model.version if facts.model else None,
        promoted=facts.promoted,
    )


def _remember(known: OrderedDict[str, T], key: str, value: T) -> None:
    known[key] = value
    if len(known) > MESSAGES_REMEMBERED:
        known.popitem(last=False)
