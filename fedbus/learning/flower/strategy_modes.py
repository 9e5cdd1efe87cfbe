"""The aggregation modes for unmodified Flower strategies, in Flower's own `Strategy.start`.

In each round, `start` sends the messages of `configure_train`, and passes the replies to `aggregate_train`. In a mode
other than ``sync``, `StrategyModes` is between the two: the messages are the cohort of a `ModeDriver`, which sends them
when the mode requires it. The replies are those that the mode aggregates. A reply to an older model is first made a
reply to the current one (`stale_updates`), so the strategy's own aggregation, such as Adam's, acts on it as on any
other.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, MultiKrum, Strategy

from fedbus.contracts.task.aggregation import AggregationTable
from fedbus.learning.aggregation_planner import AggregationReport, Merge
from fedbus.learning.flower.compressed_records import SentArrays, copy_array_records, find_reference
from fedbus.learning.flower.grid import MessengerGrid
from fedbus.learning.flower.private_api import NUMPY
from fedbus.learning.flower.replies import GridClosed, ModeMessages, ReplyStream, sample_count
from fedbus.learning.flower.sent_messages import SentRequest
from fedbus.learning.flower.update_check import TREE_STRATEGIES, numeric_arrays
from fedbus.learning.library import ClientReply, MessengerClosed, ModeUnsupported
from fedbus.learning.mode_driver import ModeDriver, TakenUpdate, TrackedMessage
from fedbus.learning.payload import Payload
from fedbus.learning.stale_updates import UpdateRefused, check_same_shapes, merge_update

_COMPARING: Final = (MultiKrum, Bulyan)
"""Strategies that compare all updates of a cohort. Krum is a MultiKrum."""


class StrategyModes:
    """The exchanges of a strategy in the mode of *table*, which is not ``sync``."""

    def __init__(self, grid: MessengerGrid, table: AggregationTable) -> None:
        self._grid = grid
        self._table = table
        self._driver = ModeDriver[SentRequest](grid.messenger, table)

    @property
    def report(self) -> AggregationReport:
        return self._driver.report

    def begin_training(self, strategy: Strategy) -> None:
        """Begin a training with *strategy*.

        Raises:
            ModeUnsupported: the mode cannot be used with the strategy. The text has the reason.

        """
        if (reason := self._find_obstacle(strategy)) is not None:
            name = type(strategy).__name__
            raise ModeUnsupported(
                f"the aggregation mode {self._table.mode} does not work with {name}: {reason}"
            )
        self._driver.begin_training()

    def train(self, messages: Iterable[Message], round_number: int, *, streams: bool) -> ModeMessages:
        """Return *messages* for `Grid.send_and_receive`, which returns a `ReplyStream` if *streams* is set."""
        by_client: dict[str, Message] = {}
        for message in messages:
            client = self._grid.find_client(message.metadata.dst_node_id)
            if client is not None:
                by_client.setdefault(client, message)
        cohort = _Cohort(self._grid, by_client)

        def exchange(timeout: float | None) -> Any:
            outcomes = self._driver.train(
                round_number,
                cohort.makers(),
                cohort.read,
                timeout_s=math.inf if timeout is None else timeout,
            )
            replies = (
                one.update if isinstance(one, TakenUpdate) else self._grid.make_reply(one.reply, one.sent)
                for one in outcomes
            )
            closing = _raise_grid_closed(replies)
            return ReplyStream(closing) if streams else list(closing)

        return ModeMessages(by_client.values(), exchange)

    def evaluate(self, messages: Iterable[Message]) -> ModeMessages:
        """Return *messages* for `Grid.send_and_receive`, which sends those to idle clients only."""
        listed = list(messages)

        def exchange(timeout: float | None) -> list[Message]:
            payloads: dict[int, Payload] = {}
            requests = [
                one for message in listed if (one := self._grid.encode(message, payloads)) is not None
            ]
            replies = self._driver.exchange(requests, timeout_s=math.inf if timeout is None else timeout)
            return list(_raise_grid_closed(self._grid.decode(reply, sent) for reply, sent in replies))

        return ModeMessages(listed, exchange)

    def _find_obstacle(self, strategy: Strategy) -> str | None:
        """Return why the mode does not work with *strategy*; None if it does."""
        table = self._table
        if not isinstance(strategy, FedAvg):
            return 'it does not derive from FedAvg. Use mode = "sync"'
        owner = next(cls for cls in type(strategy).__mro__ if "start" in vars(cls))
        if owner is not Strategy:
            return f'it has a loop of its own ({owner.__name__}.start), which waits for all clients. Use mode = "sync"'
        if not table.merges_late:
            return None  # all updates are of the current model
        advice = 'Use mode = "sync", or "deadline" with late = "drop"'
        if isinstance(strategy, TREE_STRATEGIES):
            return f"its updates are trees, and a tree for an older model cannot be merged into a newer one. {advice}"
        if isinstance(strategy, _COMPARING):
            return (
                "it compares the updates of a whole cohort, and takes an update of an older model for a malicious one. "
                f"{advice}, or FedMedian or FedTrimmedAvg"
            )
        return None


class _Cohort:
    """The messages of one round by client: those to send, and the model that they carry."""

    def __init__(self, grid: MessengerGrid, messages: dict[str, Message]) -> None:
        self._grid = grid
        self._messages = messages
        self._payloads: dict[int, Payload] = {}
        """The payloads of the contents, by id. The messages keep the contents."""
        self._models: dict[int, SentArrays] = {}

    def makers(self) -> dict[str, Any]:
        return {client: lambda client=client: self._make(client) for client in self._messages}

    def _make(self, client: str) -> TrackedMessage[SentRequest]:
        """Make a new message to *client* with the newest model: the strategy made one, but several may be sent."""
        template = self._messages[client]
        metadata = template.metadata
        message = Message(
            template.content,
            dst_node_id=metadata.dst_node_id,
            message_type=metadata.message_type,
            ttl=metadata.ttl,
            group_id=metadata.group_id,
        )
        request = self._grid.encode(message, self._payloads)
        assert request is not None, "the node is known"
        return request

    def read(self, reply: ClientReply, sent: SentRequest, merge: Merge) -> Message:
        """Decode *reply* to *sent*, merge its arrays into the current model, and accept it. Raises UpdateRefused."""
        content = self._grid.read(reply, sent)
        for name, record in content.array_records.items():
            start = find_reference(name, sent.content.arrays or {})
            if start is not None:
                self._merge(content, name, record, start, merge, reply.client)
        self._grid.messenger.accept(reply, samples=sample_count(content))
        return self._grid.make_reply(reply, sent, content)

    def _merge(
        self,
        content: RecordDict,
        name: str,
        record: ArrayRecord,
        start: ArrayRecord,
        merge: Merge,
        client: str,
    ) -> None:
        """Replace the *record* of *content*, which began with *start*, by what it contributes to the current model."""
        update, start_arrays = numeric_arrays(record), numeric_arrays(start)
        if merge.keeps_update:
            if start_arrays:
                check_same_shapes(update, start_arrays)
            return
        if other := next((key for key, array in record.items() if array.stype != NUMPY), None):
            raise UpdateRefused(
                f"the array {other!r} has no numbers, so it cannot be merged into a newer model"
            )
        current = find_reference(name, self._current_model(client))
        if current is None:
            raise UpdateRefused(f"the current model has no record {name!r}")
        merged = merge_update(update, start_arrays, numeric_arrays(current), merge)
        content[name] = ArrayRecord({key: Array(array) for key, array in merged.items()})

    def _current_model(self, client: str) -> SentArrays:
        """Return the arrays of the newest message to *client*, or to any client if this one is not in the cohort."""
        message = self._messages.get(client) or next(iter(self._messages.values()))
        key = id(message.content)
        if key not in self._models:
            self._models[key] = copy_array_records(message.content)
        return self._models[key]


def _raise_grid_closed(replies: Iterable[Message]) -> Iterator[Message]:
    """Yield *replies*. Raises GridClosed at the end of the run."""
    try:
        yield from replies
    except MessengerClosed as error:
        raise GridClosed(str(error)) from None
