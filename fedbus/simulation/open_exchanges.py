"""The book of the open messages of a simulated run, with their payloads in the engine."""

from collections.abc import Sequence

from fedbus.learning.library import OutgoingMessage
from fedbus.learning.payload import Payload
from fedbus.simulation.engine import SimulationEngine, SumRequest
from fedbus.simulation.exchanges import Call, Exchange, PlacedPayload
from fedbus.simulation.scheduling import Job


class OpenExchanges:
    """The exchanges that have not ended, of the clients with the names *clients*."""

    def __init__(self, engine: SimulationEngine, clients: Sequence[str]) -> None:
        self.by_number: dict[int, Exchange] = {}
        self._engine = engine
        self._indices = {client: index for index, client in enumerate(clients)}
        self._last_number = 0
        self._unsummed: dict[tuple[int, int], list[Exchange]] = {}
        """Answered messages whose updates are in a sum that has not arrived, by worker and call."""

    def __len__(self) -> int:
        return len(self.by_number)

    @property
    def has_unanswered(self) -> bool:
        """Whether a worker has to answer a message."""
        return any(exchange.answer is None for exchange in self.by_number.values())

    def get(self, number: int) -> Exchange | None:
        return self.by_number.get(number)

    def of_call(self, call: Call) -> list[Exchange]:
        """Return the open exchanges of *call*."""
        return [exchange for exchange in self.by_number.values() if exchange.call is call]

    def open_call(self, total: int, *, is_posted: bool) -> Call:
        """Open a call of *total* messages."""
        return Call(self._take_number(), total, is_posted=is_posted)

    def place(self, payload: Payload) -> PlacedPayload:
        """Place *payload* in the engine, until the last exchange with it ends. Raises EngineFailed."""
        return PlacedPayload(self._engine.place(payload), payload.size_bytes)

    def open(
        self,
        message: OutgoingMessage,
        call: Call,
        placed: PlacedPayload,
        *,
        position: int,
        round_number: int,
        limit_s: float,
        sent_at: float,
    ) -> Exchange:
        """Open the exchange of *message*. The index of its client is -1 if there is no such client."""
        if message.sum is not None and call.sum_request is None:
            call.sum_request = SumRequest(call.number, message.sum)
        placed.open_messages += 1
        number = self._take_number()
        client = self._indices.get(message.client, -1)
        job = Job(number, client, message.kind, position, call=call.number)
        exchange = Exchange(message, round_number, call, placed, job, limit_s, sent_at)
        self.by_number[number] = exchange
        return exchange

    def close(self, exchange: Exchange) -> None:
        """Remove the exchange, and free its payload if no other one has it."""
        del self.by_number[exchange.job.number]
        exchange.placed.open_messages -= 1
        if not exchange.placed.open_messages:
            self._engine.release(exchange.placed.payload)

    # --- sums ---------------------------------------------------------------------------------

    def add_unsummed(self, exchange: Exchange, worker: int) -> None:
        """Record that the update of an answered message is in the next sum of *worker*."""
        self._unsummed.setdefault((worker, exchange.call.number), []).append(exchange)
        exchange.call.unsummed += 1

    def take_summed(self, worker: int, call: int) -> list[Exchange]:
        """Return the exchanges whose updates are in the sum that has arrived."""
        return self._unsummed.pop((worker, call), [])

    def lose_sums(self, worker: int) -> list[Exchange]:
        """Return the exchanges whose updates were in sums of *worker*, which has died. They have no answer now."""
        calls = [call for one, call in self._unsummed if one == worker]
        lost = [exchange for call in calls for exchange in self.take_summed(worker, call)]
        for exchange in lost:
            exchange.call.unsummed -= 1
            exchange.answer = None
        return lost

    def _take_number(self) -> int:
        self._last_number += 1
        return self._last_number
