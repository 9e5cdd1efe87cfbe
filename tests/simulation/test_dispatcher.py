"""What the dispatcher has in transit when a worker dies: the state of clients that move."""

from fedbus.learning.library import OutgoingMessage
from fedbus.learning.payload import Payload
from fedbus.simulation.dispatcher import Dispatcher, WorkerLoss
from fedbus.simulation.engine import MessageBatch, MessageItem, Order, StateTaken, TakeState, WorkerReply
from fedbus.simulation.open_exchanges import OpenExchanges
from fedbus.simulation.settings import client_name

CLIENTS = 4
STATE = b"state"


class RecordingEngine:
    """Records the orders of each worker, which does not carry them out."""

    workers = 2

    def __init__(self) -> None:
        self.orders: list[tuple[int, Order]] = []
        self.killed: list[int] = []

    def place(self, payload: Payload) -> int:
        return 1

    def release(self, payload: int) -> None: ...

    def submit(self, worker: int, order: Order) -> None:
        self.orders.append((worker, order))

    def kill(self, worker: int) -> None:
        self.killed.append(worker)


class Dispatch:
    """A dispatcher after a first round in which worker 0 got the clients 0 and 2, and they took the longest."""

    def __init__(self) -> None:
        self.engine = RecordingEngine()
        names = [client_name(index, CLIENTS) for index in range(CLIENTS)]
        self.exchanges = OpenExchanges(self.engine, names)  # type: ignore[arg-type]
        self.dispatcher = Dispatcher(
            self.engine,  # type: ignore[arg-type]
            self.exchanges.by_number,
            in_order=False,
            has_time_limits=True,
        )
        self.reply_to_all(self.send(*range(CLIENTS)))

    def send(self, *clients: int, limit_s: float = 100.0) -> list[tuple[int, MessageItem]]:
        """Send a message to each of *clients*, and return those that workers have got."""
        placed = self.exchanges.place(Payload.pack([]))
        call = self.exchanges.open_call(len(clients), is_posted=False)
        exchanges = []
        for position, client in enumerate(clients):
            name = client_name(client, CLIENTS)
            message = OutgoingMessage(client=name, kind="train", payload=Payload.pack([]))
            exchanges.append(
                self.exchanges.open(
                    message, call, placed, position=position, round_number=1, limit_s=limit_s, sent_at=0.0
                )
            )
        self.dispatcher.add(exchanges)
        return self.dispatch()

    def dispatch(self) -> list[tuple[int, MessageItem]]:
        """Return the messages that workers get now."""
        begin = len(self.engine.orders)
        self.dispatcher.dispatch()
        return [
            (worker, item)
            for worker, order in self.engine.orders[begin:]
            if isinstance(order, MessageBatch)
            for item in order.items
        ]

    def reply(self, worker: int, item: MessageItem) -> None:
        seconds = 0.01 if item.client % 2 else 1.0
        self.dispatcher.record_reply(worker, WorkerReply(item.number, seconds, seconds, 0.0, 1.0, None))

    def reply_to_all(self, messages: list[tuple[int, MessageItem]]) -> None:
        """Reply to *messages*, and to those that workers get after them."""
        while messages:
            for worker, item in messages:
                self.reply(worker, item)
            messages = self.dispatch()

    def move(self) -> int:
        """Begin a second round, in which a client of worker 0 moves to worker 1. Return the client."""
        self.reply_to_all(self.send(*range(CLIENTS)))
        ((worker, order),) = [one for one in self.engine.orders if isinstance(one[1], TakeState)]
        assert worker == 0
        assert isinstance(order, TakeState)
        return order.client

    def lose(self, worker: int) -> WorkerLoss:
        """Let a worker die. The messages that it had are sent again."""
        loss = self.dispatcher.lose(worker)
        self.dispatcher.add([self.exchanges.by_number[job.number] for job in loss.jobs])
        return loss


def test_state_on_its_way_to_a_dead_worker_goes_to_the_next_one() -> None:
    dispatch = Dispatch()
    client = dispatch.move()
    dispatch.dispatcher.record_state(StateTaken(0, client, STATE))
    for _ in range(3):
        ((worker, item),) = [one for one in dispatch.dispatch() if one[1].client == client]
        assert item.state == STATE
        assert client not in dispatch.lose(worker).stateful
    ((worker, item),) = [one for one in dispatch.dispatch() if one[1].client == client]
    dispatch.reply(worker, item)
    assert not dispatch.dispatcher._sent_states
    assert not dispatch.dispatcher._arrived_states
    assert client in dispatch.lose(worker).stateful  # the worker has had it
    assert [item.state for _, item in dispatch.send(client)] == [None]


def test_a_dead_worker_does_not_lose_state_that_has_not_left_another_one() -> None:
    dispatch = Dispatch()
    client = dispatch.move()
    assert client not in dispatch.lose(1).stateful
    dispatch.dispatcher.record_state(StateTaken(0, client, STATE))
    assert STATE in [item.state for _, item in dispatch.dispatch()]


def test_state_that_was_to_come_from_a_dead_worker_is_lost() -> None:
    dispatch = Dispatch()
    client = dispatch.move()
    assert sorted(dispatch.lose(0).stateful) == [0, 2]
    assert client in (0, 2)
    assert (client, None) in [(item.client, item.state) for _, item in dispatch.dispatch()]


def test_the_next_worker_is_not_asked_for_state_of_a_dead_one() -> None:
    dispatch = Dispatch()
    placed = len(dispatch.engine.orders)
    schedule = dispatch.dispatcher._schedule
    schedule._move(0, 1)  # another thread has sent a message, and no order was submitted yet
    dispatch.lose(0)
    dispatch.dispatch()
    assert not [order for _, order in dispatch.engine.orders[placed:] if isinstance(order, TakeState)]


def test_a_message_is_not_blamed_for_the_limit_of_one_that_was_replied_to() -> None:
    dispatch = Dispatch()
    ((worker, item),) = dispatch.send(1, limit_s=0.0)
    dispatch.dispatcher.record_sign(worker)
    dispatch.dispatcher.expire()
    assert dispatch.engine.killed == [worker]
    dispatch.reply(worker, item)
    ((_, later),) = dispatch.send(1)
    loss = dispatch.lose(worker)
    assert [job.number for job in loss.jobs] == [later.number]
    assert loss.culprit is None
    assert loss.expired_limit_s == 0.0
    ((worker, _),) = dispatch.dispatch()
    assert dispatch.lose(worker).culprit is loss.jobs[0]
