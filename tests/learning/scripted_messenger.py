"""A `Messenger` on a virtual clock, whose clients answer after scripted times. Nothing sleeps."""

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import (
    ClientReply,
    ClientResponse,
    ErrorCode,
    IncomingMessage,
    NotEnoughClients,
    OutgoingMessage,
    ReplyError,
    RoundTally,
)
from fedbus.learning.round_tallies import RoundTallies
from fedbus.learning.round_timing import ExchangeTiming

Handler = Callable[[IncomingMessage], ClientResponse]


@dataclass
class ScriptedClient:
    """*handle* answers a message; the reply arrives *durations* seconds after its client is free.

    The last duration counts for all further messages. None: the client never answers.
    """

    handle: Handler
    durations: list[float | None]
    evaluate_s: float = 0.0
    free_at: float = 0.0
    received: list[tuple[float, str, int | None]] = field(default_factory=list)
    """Time, kind and round of each message."""
    messages: int = 0

    def next_duration(self, kind: str) -> float | None:
        if not kind.startswith("train"):
            return self.evaluate_s
        duration = self.durations[min(self.messages, len(self.durations) - 1)]
        self.messages += 1
        return duration


class ScriptedMessenger:
    """The clients queue messages as real ones do, and answer in order of virtual arrival."""

    run = "run-1"
    adds_updates = False

    def __init__(self, clients: dict[str, ScriptedClient], plan: RunPlan | None = None) -> None:
        self.plan = plan or RunPlan(rounds=3, round_s=1e6)
        self.scripts = clients
        self.present = list(clients)
        self.max_open = 0
        self._now = 0.0
        self._numbers = count()
        self._arrivals: list[tuple[float, int, ClientReply, int]] = []
        """Arrival time, a number for its order, the reply, and the queue: 0 of `post`, else of a call of `send`."""
        self._queues = count(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tallies = RoundTallies()

    # --- the script -------------------------------------------------------------------------------

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Call *action* at a time, before the replies of the same time."""
        heapq.heappush(self._events, (time_s, next(self._numbers), action))

    def join(self, client: str) -> None:
        self.present.append(client)

    def leave(self, client: str) -> None:
        """End the open messages of *client* with an error, as the real messenger does."""
        self.present.remove(client)
        for position, (_, number, reply, queue) in enumerate(self._arrivals):
            if reply.client == client:
                error = ReplyError(ErrorCode.CLIENT_LOST, f"{client}: the battery is low")
                lost = ClientReply(request=reply.request, round=reply.round, error=error)
                self._arrivals[position] = (self._now, number, lost, queue)
        heapq.heapify(self._arrivals)

    # --- Messenger --------------------------------------------------------------------------------

    @property
    def has_open_messages(self) -> bool:
        return bool(self._arrivals)

    def now(self) -> float:
        return self._now

    def clients(self) -> list[str]:
        return list(self.present)

    def failed_clients(self) -> dict[str, str]:
        return {}

    def wait_for_clients(self, count: int = 1, *, timeout_s: float | None = None) -> list[str]:
        if len(self.present) < count:
            raise NotEnoughClients(f"{len(self.present)} of {count} clients joined")
        return self.clients()

    def wait_for_change(self, clients: Collection[str], *, timeout_s: float) -> list[str]:
        del clients
        self._advance(self._now + timeout_s)
        return self.clients()

    def send(
        self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None
    ) -> Iterator[ClientReply]:
        queue = next(self._queues)
        sent = self._send(messages, queue)
        for _ in sent:
            reply = self._next(queue, until=float("inf"))
            assert reply is not None
            yield reply
        assert timeout_s is None or self._now <= timeout_s * self.plan.rounds, "a time limit is not scripted"

    def post(self, messages: Iterable[OutgoingMessage]) -> list[str]:
        return self._send(messages, 0)

    def collect(self, message_ids: Iterable[str]) -> list[ClientReply]:
        raise NotImplementedError

    def take(self, *, timeout_s: float, clients: Collection[str] | None = None) -> ClientReply | None:
        return self._next(0, until=self._now + timeout_s, clients=clients)

    def accept(self, reply: ClientReply, *, samples: int = 0) -> None:
        self._tallies.accept(reply, samples)

    def reject(self, reply: ClientReply, reason: str) -> None:
        self._tallies.reject(reply, reason)

    def tally(self, round_number: int) -> RoundTally:
        return self._tallies.copy(round_number)

    # --- the clock --------------------------------------------------------------------------------

    def _send(self, messages: Iterable[OutgoingMessage], queue: int) -> list[str]:
        sent = list(messages)
        for message in sent:
            self._schedule(message, queue)
        self.max_open = max(self.max_open, len(self._arrivals))
        return [message.message_id for message in sent]

    def _schedule(self, message: OutgoingMessage, queue: int) -> None:
        script = self.scripts[message.client]
        script.received.append((self._now, message.kind, message.round))
        duration = script.next_duration(message.kind)
        number = message.round or 0
        if duration is None:
            error = ReplyError(ErrorCode.MESSAGE_UNAVAILABLE, f"{message.client}: no reply")
            reply = ClientReply(request=message, round=number, error=error)
            arrival = self._now + self.plan.round_s
        else:
            arrival = max(self._now, script.free_at) + duration
            incoming = IncomingMessage(
                message_id=message.message_id,
                kind=message.kind,
                data=message.payload.to_bytes(),
                round=message.round,
                node_config={"partition-id": list(self.scripts).index(message.client), "num-partitions": 9},
            )
            response = script.handle(incoming)
            reply = ClientReply(
                request=message,
                round=number,
                message_id=f"reply to {message.message_id}",
                data=None if response.payload is None else response.payload.to_bytes(),
                error=response.error,
                metrics=response.metrics,
                timing=ExchangeTiming(message.client, self._now, arrival, duration),
            )
            script.free_at = arrival
        heapq.heappush(self._arrivals, (arrival, next(self._numbers), reply, queue))

    def _next(
        self, queue: int, *, until: float, clients: Collection[str] | None = None
    ) -> ClientReply | None:
        """Advance to the next reply of *queue*. None at *until*, or if the clients differ from *clients*."""
        while True:
            own = [entry for entry in self._arrivals if entry[3] == queue]
            arrival = min(own)[0] if own else float("inf")
            if self._events and self._events[0][0] <= min(arrival, until):
                time_s, _, action = heapq.heappop(self._events)
                self._advance(time_s)
                action()
                continue
            if own and arrival <= max(until, self._now):
                entry = min(own)
                self._arrivals.remove(entry)
                heapq.heapify(self._arrivals)
                self._advance(arrival)
                reply = entry[2]
                if reply.error is not None:
                    self.reject(reply, reply.error.reason)
                return reply
            if clients is not None and set(clients) != set(self.present):
                return None
            assert until != float("inf"), "the run would wait without end"
            self._advance(until)
            return None

    def _advance(self, time_s: float) -> None:
        self._now = max(self._now, time_s)
