"""How a task has learnt so far: its rounds joined over all runs, and where each client's time went.

The figures are those of the log, so they are there for whoever may read it, on any machine: what a round came to
is in the facts of its run, and how long a client trained, was on its way and waited follows from the times at which
the round's messages and their answers were said, for as long as the stream of events keeps them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean
from typing import Final

from fedbus.app.session import lives, moved
from fedbus.bus.bus import Bus, Seen
from fedbus.bus.streams import events_stream, life_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import RoundReply
from fedbus.contracts.run import RoundResult, RunFacts
from fedbus.contracts.server import RoundMessage
from fedbus.contracts.transition import Transition
from fedbus.domain.reliability import Standing, standings
from fedbus.domain.time_split import Answered, split

PARTS: Final = ("train_s", "transfer_s", "wait_s")

Split = Mapping[str, Mapping[str, float]]
"""Seconds by client and part."""


@dataclass(frozen=True)
class Point:
    """One round. *step* counts over all runs: each begins where the last one ended, with its round 0."""

    run: str
    step: int
    result: RoundResult
    times: Split = field(default_factory=dict)

    def mean_s(self, part: str) -> float | None:
        """Over the clients of the round."""
        found = [times[part] for times in self.times.values()]
        return fmean(found) if found else None


@dataclass(frozen=True)
class Curve:
    """All rounds of a task that the log remembers, oldest first."""

    task: str
    points: tuple[Point, ...]

    @property
    def rounds(self) -> list[Point]:
        """To be drawn: round 0 is the end of the run before, but for the first."""
        return [point for at, point in enumerate(self.points) if point.result.round > 0 or at == 0]

    @property
    def standings(self) -> dict[str, Standing]:
        return standings(point.result for point in self.points)

    def times_of(self, client: str) -> dict[str, float] | None:
        """Where the time of *client* went in a round, on average."""
        mine = [point.times[client] for point in self.points if client in point.times]
        return {part: fmean(times[part] for times in mine) for part in PARTS} if mine else None


async def curve_of(bus: Bus, task: str, *, last: int | None = None) -> Curve:
    """The curve of *task*, over its *last* runs or all of them."""
    seen = [one for one in await lives(bus, "run") if one.message.task == task]
    runs = [facts for one in seen if isinstance(facts := moved(one).facts, RunFacts)][-(last or len(seen)) :]
    times = await _times(bus, task, runs[0].requested_at) if runs else {}
    return Curve(task, tuple(join(runs, times)))


def join(runs: Iterable[RunFacts], times: Mapping[tuple[str, int], Split]) -> list[Point]:
    """The rounds of *runs*, oldest first, as one curve. *times*: by run and round."""
    points: list[Point] = []
    begin = 0
    for facts in runs:
        points.extend(
            Point(facts.run, begin + one.round, one, times.get((facts.run, one.round), {}))
            for one in facts.rounds
        )
        begin = points[-1].step if points else 0
    return points


async def _times(bus: Bus, task: str, since: datetime) -> dict[tuple[str, int], Split]:
    """Where the time of each round went, by run and round."""
    words = [subjects.every(bus.fed, kind, task=task) for kind in (RoundMessage, RoundReply)]
    answers = answers_in(await _held(bus, events_stream(bus.fed), words, since))
    moves = await _held(bus, life_stream(bus.fed), [subjects.life(bus.fed, "run", ">")], since)
    return {key: split(answers[key], ended) for key, ended in _ends(moves).items() if key in answers}


def answers_in(messages: Iterable[Seen]) -> dict[tuple[str, int], list[Answered]]:
    """Each message of a round and its reply, by run and round."""
    asked: dict[str, tuple[RoundMessage, datetime]] = {}
    found: dict[tuple[str, int], list[Answered]] = defaultdict(list)
    for seen in messages:
        match seen.message:
            case RoundMessage() as message:
                asked[message.message_id] = (message, seen.envelope.time)
            case RoundReply() as reply if reply.reply_to in asked:
                message, at = asked.pop(reply.reply_to)
                answered = Answered(reply.client, at, seen.envelope.time, reply.train_s)
                found[message.run, message.round or 0].append(answered)
    return found


def _ends(moves: Iterable[Seen]) -> dict[tuple[str, int], datetime]:
    """When each round was over."""
    found = {}
    for seen in moves:
        match seen.message:
            case Transition(event="round_finished", facts=RunFacts(run=run, rounds=(*_, last))):
                found[run, last.round] = seen.envelope.time
    return found


async def _held(bus: Bus, stream: str, wanted: list[str], since: datetime) -> list[Seen]:
    """What *stream* holds now of the *wanted* subjects, from *since* on."""
    newest = max((seen.sequence for seen in await bus.snapshot(stream, wanted)), default=0)
    found: list[Seen] = []
    if newest:
        async with bus.watch(stream, wanted, since=since) as said:
            async for seen in said:
                found.append(seen)
                if seen.sequence >= newest:
                    break
    return found
