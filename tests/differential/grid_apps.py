"""Cases of `flwr.serverapp.Grid`, `flwr.app.Message` and its metadata."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from differential.cases import App, arrays, case, echo, numbers, partition, queries
from differential.recording import RECORD, Unordered, observe
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid


def add_echo(app: App) -> None:
    app.client.query()(echo)


def add_number(app: App) -> None:
    app.client.query()(lambda message, context: numbers(message, number=partition(context)))


def add_slow(app: App, seconds: float) -> None:
    """The client with number n replies after n times *seconds*."""

    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        time.sleep(seconds * partition(context))
        return numbers(message, number=partition(context))


def add_held(app: App) -> None:
    """The clients reply after `release`."""

    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        while not _release_file(context).exists():
            time.sleep(0.01)
        return numbers(message, number=partition(context))


def release(context: Context) -> None:
    """Let the clients of `add_held` reply."""
    _release_file(context).touch()


def _release_file(context: Context) -> Path:
    return Path(f"{context.run_config[RECORD]}.released")


def by_number(reply: Message) -> int:
    return int(reply.content["m"]["number"])


def pull(grid: Grid, ids: list[str], *, wait_s: float = 60.0) -> list[Message]:
    """Pull until each id has a reply."""
    replies: list[Message] = []
    left, end = set(ids), time.monotonic() + wait_s
    while left and time.monotonic() < end:
        replies += grid.pull_messages(left)
        left -= {reply.metadata.reply_to_message_id for reply in replies}
        time.sleep(0.05)
    return replies


@case("get_node_ids returns each node once")
def node_ids(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())
        observe(
            context,
            count=len(nodes),
            distinct=len(set(nodes)),
            types=sorted({type(node).__name__ for node in nodes}),
        )
        observe(context, same=sorted(nodes) == sorted(grid.get_node_ids()))


@case("send_and_receive returns a list")
def replies_are_a_list(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        replies: Any = grid.send_and_receive(queries(grid))
        observe(context, type=type(replies).__name__, is_list=isinstance(replies, list), count=len(replies))
        replies.sort(key=by_number)
        more = replies + [replies[0]]
        observe(context, sorted=replies, sums=[len(more), len([*more, *replies]), len(replies * 2)])
        observe(
            context,
            equal=replies == list(replies),
            copy=replies.copy() == replies,
            last=replies[-1] is replies.pop(),
        )
        replies.append(more[0])
        replies.extend(more)
        replies.insert(0, more[1])
        replies.reverse()
        observe(
            context,
            count=len(replies),
            index=replies.index(more[1]),
            slice=len(replies[1:3]),
            holds=more[0] in replies,
        )
        del replies[0]
        replies[0] = more[0]
        replies.clear()
        observe(context, empty=replies == [], falsy=not replies)


@case("replies can be read more than once")
def replies_twice(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive(queries(grid))
        observe(context, first=Unordered(replies), second=Unordered(replies), count=len(list(replies)))


@case("send_and_receive of no message returns an empty list")
def no_messages(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        observe(context, replies=grid.send_and_receive([]), pushed=list(grid.push_messages([])))
        observe(
            context, with_timeout=grid.send_and_receive([], timeout=1.0), pulled=list(grid.pull_messages([]))
        )


@case("messages may be a generator")
def generator_of_messages(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())
        messages = (Message(RecordDict(), node, "query") for node in nodes)
        observe(context, replies=Unordered(grid.send_and_receive(messages)))


@case("a reply that has not arrived at the timeout is absent")
def late_replies_are_absent(app: App) -> None:
    add_held(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        observe(context, replies=grid.send_and_receive(queries(grid), timeout=0.5))
        release(context)


@case("a reply that came after the timeout can still be pulled", slow=True)
def late_reply_is_pulled(app: App) -> None:
    add_slow(app, 2.0)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        messages = queries(grid)
        replies = list(grid.send_and_receive(messages, timeout=1.0))
        answered = {reply.metadata.reply_to_message_id for reply in replies}
        late = [
            message.metadata.message_id for message in messages if message.metadata.message_id not in answered
        ]
        observe(context, in_time=replies, late=pull(grid, late))


@case("a timeout of zero sends, and waits for no reply")
def timeout_of_zero(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        messages = queries(grid)
        observe(context, replies=grid.send_and_receive(messages, timeout=0))
        observe(context, later=Unordered(pull(grid, [message.metadata.message_id for message in messages])))


@case("after the time to live of a message its reply is an error", differs=["source of an error"], slow=True)
def expired_message(app: App) -> None:
    add_slow(app, 4.0)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive(queries(grid, ttl=1.5), timeout=6.0)
        observe(context, replies=Unordered(replies))


@case("the default time to live is twelve hours; a reply has the rest of it")
def default_ttl(app: App) -> None:
    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        observe(
            context, ttl=float(message.metadata.ttl), age=0 <= time.time() - message.metadata.created_at < 60
        )
        return Message(message.content, reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        for options in ({}, {"ttl": 100.0}):
            for reply in grid.send_and_receive(queries(grid, **options)):
                limit = options.get("ttl", 43200.0)
                observe(context, rest=limit - 60 < reply.metadata.ttl <= limit + 1)


@case("a reply may have a time to live of its own")
def reply_ttl(app: App) -> None:
    app.client.query()(lambda message, context: Message(message.content, reply_to=message, ttl=50.0))

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        observe(context, ttls=[reply.metadata.ttl for reply in grid.send_and_receive(queries(grid))])


@case("pushed messages get ids, and are pulled once")
def push_and_pull(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        messages = queries(grid)
        ids = list(grid.push_messages(messages))
        observe(context, types=[type(id).__name__ for id in ids], count=len(set(ids)))
        observe(context, own_ids=[message.metadata.message_id for message in messages] == ids)
        replies = pull(grid, ids)
        observe(
            context,
            replies=Unordered(replies),
            matched={r.metadata.reply_to_message_id for r in replies} == set(ids),
        )


@case("a reply that has been pulled, or an unknown id, gives an error")
def pull_again(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        ids = list(grid.push_messages(queries(grid)))
        pull(grid, ids)
        observe(
            context, again=Unordered(grid.pull_messages(ids)), unknown=list(grid.pull_messages(["not an id"]))
        )


@case("a pull before the reply has arrived is empty")
def pull_too_early(app: App) -> None:
    add_held(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        ids = list(grid.push_messages(queries(grid)))
        observe(context, early=list(grid.pull_messages(ids)))
        release(context)
        observe(context, later=Unordered(pull(grid, ids)))


@case("a message to a node that does not exist gets no id and no reply")
def unknown_node(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        observe(context, pushed=list(grid.push_messages([Message(RecordDict(), 12345, "query")])))
        messages = [*queries(grid), Message(RecordDict(), 12345, "query")]
        observe(context, replies=Unordered(grid.send_and_receive(messages, timeout=20.0)))


@case("metadata tell type, group, source and destination")
def metadata(app: App) -> None:
    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        own = message.metadata.dst_node_id == context.node_id and message.metadata.run_id == context.run_id
        observe(context, message=message, own=own, has_id=bool(message.metadata.message_id))
        return Message(message.content, reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        content = RecordDict({"c": ConfigRecord({"x": 1})})
        for group in ("", "3", "warm up"):
            messages = queries(grid, content=content, group_id=group)
            observe(context, sent=Unordered(messages))
            replies = grid.send_and_receive(messages)
            observe(
                context,
                replies=Unordered(replies),
                run=all(r.metadata.run_id == context.run_id for r in replies),
            )
            observe(context, has_id=all(reply.metadata.message_id for reply in replies))


@case("one content may be changed between two sends")
def content_changed_between_sends(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        content = RecordDict({"c": ConfigRecord({"number": 0})})
        for number in range(3):
            content["c"]["number"] = number
            observe(context, replies=Unordered(grid.send_and_receive(queries(grid, content=content))))


@case("each message may have content of its own")
def content_of_each_node(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        known = {reply.metadata.src_node_id for reply in grid.send_and_receive(queries(grid))}
        messages = [
            Message(RecordDict({"c": ConfigRecord({"to": f"{index}"})}), node, "query")
            for index, node in enumerate(sorted(known))
        ]
        replies = grid.send_and_receive(messages)
        contents = {message.metadata.dst_node_id: message.content for message in messages}
        observe(context, right=[reply.content == contents[reply.metadata.src_node_id] for reply in replies])


@case("a node may get several messages at once")
def several_messages_to_a_node(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        messages = [
            Message(RecordDict({"c": ConfigRecord({"number": number})}), node, "query")
            for number in range(3)
            for node in grid.get_node_ids()
        ]
        observe(context, replies=Unordered(grid.send_and_receive(messages)))


@case("two threads may use the Grid at once")
def two_threads(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        def ask(number: int) -> Unordered:
            content = RecordDict({"c": ConfigRecord({"thread": number})})
            return Unordered(grid.send_and_receive(queries(grid, content=content)))

        with ThreadPoolExecutor(2) as pool:
            observe(context, replies=list(pool.map(ask, range(2))))


@case("polling get_node_ids for a while is allowed", plan={"recruit_s": 1.0}, slow=True)
def nodes_are_watched(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(4):
            observe(context, nodes=len(list(grid.get_node_ids())))
            time.sleep(0.7)
        observe(context, replies=Unordered(grid.send_and_receive(queries(grid))))


@case("create_message makes a message like its constructor")
def create_message(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        messages = [
            grid.create_message(RecordDict(), "query", node, "7", ttl=60.0) for node in grid.get_node_ids()
        ]
        observe(context, sent=Unordered(messages), replies=Unordered(grid.send_and_receive(messages)))


@case("the Grid knows its run")
def run_of_the_grid(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        observe(context, same=grid.run.run_id == context.run_id, type=type(grid.run).__name__)


@case("a ClientApp that raises gives an error with code 2; the others reply")
def client_raises(app: App) -> None:
    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        if partition(context) == 1:
            raise KeyError("no such column")
        return numbers(message, number=0)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive(queries(grid))
        observe(context, replies=Unordered(replies))
        for reply in replies:
            if reply.has_error():
                observe(context, names_reason="no such column" in str(reply.error.reason))
                try:
                    observe(context, content=reply.content)
                except ValueError as error:
                    observe(context, content=error)


@case("a ClientApp may reply with an error of its own")
def error_of_the_app(app: App) -> None:
    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        return Message(Error(40 + partition(context), "two lines:\n  the second"), reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive(queries(grid))
        observe(context, replies=Unordered(replies), reasons=[reply.error.reason for reply in replies])


@case("a message without a registered function gets an error")
def no_function(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        for kind in ("train", "query.other", "evaluate"):
            observe(context, kind=kind, replies=Unordered(grid.send_and_receive(queries(grid, kind))))


@case("an invalid message type is refused when the message is made")
def invalid_type(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        for kind in ("fit", "train.", "train.a-b", "train.a.b", ""):
            try:
                queries(grid, kind)
            except ValueError as error:
                observe(context, kind=kind, error=error)


@case("large arrays arrive unchanged")
def large_arrays(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        big = ArrayRecord({"big": Array(np.arange(300_000, dtype=np.float32).reshape(3, -1))})
        replies = grid.send_and_receive(queries(grid, content=RecordDict({"arrays": big})))
        observe(
            context,
            equal=[bool((r.content["arrays"]["big"].numpy() == big["big"].numpy()).all()) for r in replies],
        )
        observe(context, records=[r.content["arrays"] == big for r in replies])


@case("a thread may send while the main function polls")
def background_sender(app: App) -> None:
    add_number(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        replies: list[Message] = []
        thread = threading.Thread(target=lambda: replies.extend(grid.send_and_receive(queries(grid))))
        thread.start()
        while thread.is_alive():
            grid.get_node_ids()
            time.sleep(0.05)
        observe(context, replies=Unordered(replies))


@case("a reply may be sent on")
def forward_a_reply(app: App) -> None:
    add_echo(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        content = RecordDict({"arrays": arrays(), "metrics": MetricRecord({"n": 1})})
        for _ in range(2):
            replies = grid.send_and_receive(queries(grid, content=content))
            content = next(iter(replies)).content
        observe(context, content=content)
