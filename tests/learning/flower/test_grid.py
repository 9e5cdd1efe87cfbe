"""Unmodified Flower strategies and apps over the Grid and a bus in memory."""

import asyncio
import threading
import time
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import structlog
from flwr.app import ConfigRecord, Message, RecordDict
from learning.flower.memory_bus import (
    CLIENT_APP,
    QUERY_APP,
    RUN,
    TASK,
    MemoryFederation,
    initial_model,
    open_memory_federation,
    render_server_app,
)
from support import eventually

from fedbus.contracts.client import FailTrain, Heartbeat, RoundReply
from fedbus.contracts.round_messages import RoundMessage
from fedbus.learning.flower.array_records import to_record
from fedbus.learning.flower.node_ids import node_id
from fedbus.learning.flower.private_api import NODE_UNAVAILABLE, set_process_identity
from fedbus.learning.flower.replies import GridClosed, StreamedMessages
from fedbus.learning.library import NotEnoughClients
from fedbus.learning.messenger import MAX_PREFETCHED_REPLIES


async def test_fedavg_trains_and_reports_each_round(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, server=render_server_app(evaluate_fn="centralized")) as fed:
        fed.add("c1", step=1, samples=30)
        fed.add("c2", step=2, samples=10)

        final = await fed.run(initial_model())

    np.testing.assert_allclose(final["w"], np.full((4, 3), 2 * 1.25), rtol=1e-6)
    assert final["b"].dtype == np.float64
    assert [result.round for result in fed.results] == [0, 1, 2]
    assert [result.loss for result in fed.results] == [100.0, 99.0, 98.0]
    assert fed.results[1].participants == {"c1": 30, "c2": 10}
    assert fed.results[1].metrics["eval_loss"] == 10 - 1.25
    assert fed.results[2].metrics["train_seen"] == 2  # context.state lives as long as the run


async def test_a_round_reports_metrics_and_times_of_each_client(tmp_path: Path) -> None:
    client = CLIENT_APP.replace('"seen":', '"broken": float("nan"), "seen":').replace(
        'step = context.node_config["step"]',
        'step = context.node_config["step"]; import time; time.sleep(context.node_config["slow"])',
    )
    async with open_memory_federation(tmp_path, client=client, rounds=1) as fed:
        fed.add("c1", step=1, samples=30, slow=0.0)
        fed.add("c2", step=2, samples=10, slow=0.3)
        start = time.monotonic()
        await fed.run(initial_model())
        elapsed_s = time.monotonic() - start

    result = fed.results[1]
    busy_s = {client: result.train_s[client] + result.transfer_s[client] for client in ("c1", "c2")}
    assert list(result.figures) == sorted(busy_s, key=lambda client: -busy_s[client])  # the slowest first
    assert result.figures["c2"] == {
        "eval_accuracy": 0.0125,
        "eval_loss": 8.75,
        "eval_num-examples": 5,
        "train_loss": 0.5,
        "train_num-examples": 10,
        "train_seen": 1,
    }
    assert result.figures["c1"]["train_loss"] == 1.0
    assert result.train_s["c2"] >= 0.3
    assert all(result.transfer_s[client] >= 0 for client in busy_s)
    assert all(0 <= result.wait_s[client] <= elapsed_s - busy_s[client] for client in busy_s)
    assert fed.results[0].figures == {}


async def test_the_model_of_a_round_is_offered_once_and_released(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, rounds=1) as fed:
        for number in range(4):
            fed.add(f"c{number}", step=1, samples=1)
        await fed.run(initial_model())

    to_clients = [message for message in fed.bus.published if isinstance(message, RoundMessage)]
    assert len(to_clients) == 8
    assert len({message.content.blob for message in to_clients}) == 2  # one to train, one to evaluate
    assert fed.bus.blobs.released == 2
    assert {message.round for message in to_clients} == {1}
    assert fed.bus.blobs.max_concurrent_fetches <= MAX_PREFETCHED_REPLIES + 4


@pytest.mark.parametrize(
    "strategy",
    [
        "FedProx(proximal_mu=0.1)",
        "FedAdam(eta=0.1)",
        "FedAvgM(server_momentum=0.9)",
        "FedMedian()",
        "Krum(num_malicious_nodes=0)",
        "FedTrimmedAvg()",
        "QFedAvg(client_learning_rate=0.1, train_loss_key='loss')",
        "DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.01, 10.0, 3)",
        "DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.01, 10.0, 3)",
    ],
)
async def test_any_strategy_runs_unmodified(tmp_path: Path, strategy: str) -> None:
    async with open_memory_federation(tmp_path, server=render_server_app(strategy)) as fed:
        for number in range(3):
            fed.add(f"c{number}", step=1 + number, samples=10)
        final = await fed.run(initial_model())

    assert final["w"].shape == (4, 3)
    assert final["w"].dtype == np.float32
    assert np.isfinite(final["w"]).all()
    assert abs(final["w"]).max() > 0
    assert [result.round for result in fed.results] == [0, 1, 2]
    assert not any(result.failures for result in fed.results)


async def test_a_client_that_raises_fails_alone_with_a_reason(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, rounds=1) as fed:
        fed.add("c1", step=1, samples=1)
        fed.add("c2", step=1, samples=1)
        fed.add("c3")  # without the configuration that the app reads

        final = await fed.run(initial_model())

    assert fed.results[1].failures == {
        "c3": f"the ClientApp raised KeyError: 'step' ({fed.package}/client_app.py:10)"
    }
    assert set(fed.results[1].participants) == {"c1", "c2"}
    np.testing.assert_allclose(final["w"], 1.0)


async def test_a_round_continues_without_a_client_at_its_deadline(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, rounds=1, round_s=60, lost_after_s=3600) as fed:
        fed.add("c1", step=1, samples=1)
        fed.add("c2", step=1, samples=1).is_silent = True

        run = asyncio.create_task(fed.run(initial_model()))
        for _ in ("train", "evaluate"):
            await eventually(lambda: _waits_for(fed) == {"c2"})
            fed.advance_clock(60)
        await run

    assert fed.results[1].failures == {"c2": "no reply within 60 s"}
    assert fed.results[1].participants == {"c1": 1}


def _waits_for(fed: MemoryFederation) -> set[str]:
    """The clients whose replies the app waits for."""
    return {pending.sent.client for pending in fed.messenger._pending.values()}


async def test_a_client_that_leaves_ends_the_wait_for_its_reply(tmp_path: Path) -> None:
    async with open_memory_federation(
        tmp_path, rounds=1, server=render_server_app("FedAvg(min_evaluate_nodes=1, min_available_nodes=1)")
    ) as fed:
        fed.add("c1", step=1, samples=1)
        leaving = fed.add("c2", step=1, samples=1)
        leaving.is_silent = True

        run = asyncio.create_task(fed.run(initial_model()))
        await eventually(lambda: bool(leaving.received_messages))
        fed.messenger.deliver(FailTrain(task=TASK, client="c2", run=RUN, reason="the battery is low"))
        await run

    assert fed.results[1].failures == {"c2": "the battery is low"}


async def test_a_silent_client_is_absent_until_its_next_heartbeat(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, lost_after_s=60.0) as fed:
        fed.add("c1", step=1, samples=1)
        assert fed.grid.get_node_ids() == [node_id("c1")]
        fed.advance_clock(61.0)
        assert fed.grid.get_node_ids() == []
        fed.messenger.deliver(Heartbeat(task=TASK, client="c1", run=RUN))
        assert fed.grid.get_node_ids() == [node_id("c1")]


async def test_no_client_is_lost_while_nats_is_disconnected(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, lost_after_s=0.1) as fed:
        fed.bus.is_connected = False
        fed.add("c1", step=1, samples=1)
        tracker = fed.messenger._tracker
        await eventually(lambda: (tracker.next_deadline() or 0) > fed.messenger._now() + 0.05)
        await asyncio.sleep(0.3)
        assert fed.grid.get_node_ids() == [node_id("c1")]


async def test_a_corrupt_reply_is_the_failure_of_its_client(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, rounds=1) as fed:
        fed.add("c1", step=1, samples=1)
        device = fed.add("c2", step=2, samples=1)
        deliver = device.deliver

        def deliver_corrupt(reply: RoundReply) -> None:
            assert reply.content is not None
            blob = reply.content.blob
            if blob:
                fed.bus.blobs.contents[blob.sha256] = b"x" * blob.size_bytes
            deliver(reply)

        device.deliver = deliver_corrupt
        await fed.run(initial_model())

    assert "invalid reply: magic is b'xxxx'" in fed.results[1].failures["c2"]


async def test_too_few_clients_end_the_run_with_a_list_of_them(tmp_path: Path) -> None:
    server = render_server_app("FedAvg(min_available_nodes=3)")
    async with open_memory_federation(tmp_path, server=server, recruit_s=1.5) as fed:
        fed.add("c1", step=1, samples=1)
        fed.add("c2", step=1, samples=1)
        fed.messenger.deliver(FailTrain(task=TASK, client="c9", run=RUN, reason="no disk"))

        with pytest.raises(NotEnoughClients, match=r"limit 1.5 s\). Present: c1, c2. Failed: c9 \(no disk\)"):
            await fed.run(initial_model())


async def test_a_strategy_that_waits_continues_when_a_client_joins(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, rounds=1) as fed:
        fed.add("c1", step=1, samples=1)
        run = asyncio.create_task(fed.run(initial_model()))
        await asyncio.sleep(0.2)  # so that the strategy waits; otherwise this passes, too
        fed.add("c2", step=1, samples=1)
        await run

    assert set(fed.results[1].participants) == {"c1", "c2"}


@pytest.mark.parametrize("blocked", ["in its replies", "in a fetch", "waiting for nodes"])
async def test_closing_the_grid_ends_a_blocked_app_at_once(tmp_path: Path, blocked: str) -> None:
    async with open_memory_federation(tmp_path, recruit_s=3600, round_s=3600, lost_after_s=3600) as fed:
        silent = fed.add("c1", step=1, samples=1)
        silent.is_silent = True
        blobs = fed.bus.blobs
        blobs.stall_after = 1  # c2 gets the model
        if blocked != "waiting for nodes":
            fed.add("c2", step=1, samples=1).is_silent = blocked == "in its replies"
        run = asyncio.create_task(fed.run(initial_model()))
        if blocked == "in its replies":
            await eventually(lambda: bool(silent.received_messages))
        elif blocked == "in a fetch":
            await eventually(lambda: blobs.fetched == 1 and blobs.fetching == 1)
        else:
            await asyncio.sleep(1.5)  # so that it waits; otherwise this passes, too

        fed.messenger.close("the run was cancelled")
        with pytest.raises(GridClosed, match="the run was cancelled"):
            await run
        with pytest.raises(GridClosed):
            fed.grid.get_node_ids()


async def test_a_call_on_the_event_loop_is_rejected(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path) as fed:
        with pytest.raises(RuntimeError, match="on its own event loop"):
            fed.grid.pull_messages([])


def _queries(fed: MemoryFederation, count: int) -> list[Message]:
    set_process_identity(fed.grid.run.run_id)
    content = RecordDict({"config": ConfigRecord({"ask": "me"})})
    return [Message(content, node_id(f"c{number}"), "query") for number in range(count)]


async def test_pushed_messages_can_be_pulled_later(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, client=QUERY_APP) as fed:
        for number in range(3):
            fed.add(f"c{number}")
        messages = _queries(fed, 3)
        ids = list(await asyncio.to_thread(fed.grid.push_messages, messages))
        replies: list[Message] = []

        async def pull_all() -> bool:
            replies.extend(await asyncio.to_thread(fed.grid.pull_messages, ids))
            return len(replies) == 3

        await eventually(pull_all)

    assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)
    assert {reply.metadata.src_node_id for reply in replies} == {node_id(f"c{n}") for n in range(3)}
    assert all(reply.content["config"]["ask"] == "me" for reply in replies)
    assert fed.bus.blobs.offered == 0  # small and without arrays, so inline in the events


async def test_send_and_receive_returns_a_list(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, client=QUERY_APP) as fed:
        for number in range(3):
            fed.add(f"c{number}")

        def use() -> None:
            assert fed.grid.send_and_receive([]) == []
            replies = fed.grid.send_and_receive(_queries(fed, 3))
            assert type(replies) is list
            assert len(replies) == 3

        await asyncio.to_thread(use)


async def test_streamed_replies_come_once(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, client=QUERY_APP) as fed:
        for number in range(3):
            fed.add(f"c{number}")
        messages = StreamedMessages(_queries(fed, 3))
        replies = await asyncio.to_thread(fed.grid.send_and_receive, messages)
        assert len(await asyncio.to_thread(lambda: list(replies))) == 3
        assert list(replies) == []


async def test_a_message_to_a_node_that_left_gets_an_error_reply(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, client=QUERY_APP) as fed:
        fed.add("c0")
        fed.grid.get_node_ids()
        fed.messenger.deliver(FailTrain(task=TASK, client="c0", run=RUN, reason="the battery is low"))
        replies = await asyncio.to_thread(fed.grid.send_and_receive, _queries(fed, 1))

    assert [reply.error.code for reply in replies] == [NODE_UNAVAILABLE]
    assert replies[0].metadata.src_node_id == node_id("c0")
    assert "the battery is low" in str(replies[0].error.reason)


async def test_a_late_reply_does_not_keep_the_message(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, client=QUERY_APP) as fed:
        fed.add("c0").is_silent = True
        content = RecordDict({"arrays": to_record(initial_model())})
        set_process_identity(fed.grid.run.run_id)
        message = Message(content, node_id("c0"), "query")
        assert await asyncio.to_thread(fed.grid.send_and_receive, [message], timeout=0.1) == []
        assert fed.bus.blobs.released == 1
        (pending,) = fed.messenger._pending.values()
        assert not pending.message.payload.buffers
        assert fed.grid.tally(0).failures == {"c0": "no reply within 0.1 s"}


async def test_the_number_of_prefetched_replies_is_limited(tmp_path: Path) -> None:
    client = QUERY_APP.replace("Message(message.content", "Message(message.content.copy()")
    async with open_memory_federation(tmp_path, client=client) as fed:
        for number in range(12):
            fed.add(f"c{number}")
        set_process_identity(fed.grid.run.run_id)
        content = RecordDict({"arrays": to_record(initial_model())})
        messages = StreamedMessages(
            [Message(content, node_id(f"c{number}"), "query") for number in range(12)]
        )
        replies = await asyncio.to_thread(fed.grid.send_and_receive, messages)
        model_fetches = 12  # one for each device
        await eventually(lambda: fed.bus.blobs.fetched >= model_fetches + MAX_PREFETCHED_REPLIES)
        await asyncio.sleep(0.1)
        assert fed.bus.blobs.fetched == model_fetches + MAX_PREFETCHED_REPLIES

        await asyncio.to_thread(lambda: next(iter(replies)))
        await eventually(lambda: fed.bus.blobs.fetched == model_fetches + MAX_PREFETCHED_REPLIES + 1)
        assert len(await asyncio.to_thread(lambda: list(replies))) == 11


LEGACY_CLIENT = """
    import numpy as np
    from flwr.clientapp import ClientApp
    from flwr.client import NumPyClient

    class Client(NumPyClient):
        def __init__(self, step, samples):
            self.step, self.samples = step, samples

        def fit(self, parameters, config):
            return [p + np.asarray(self.step, p.dtype) for p in parameters], self.samples, {"train_loss": 0.5}

        def evaluate(self, parameters, config):
            return float(parameters[0].mean()), 5, {"accuracy": 0.25}

    app = ClientApp(
        client_fn=lambda context: Client(context.node_config["step"], context.node_config["samples"]).to_client()
    )
"""
LEGACY_SERVER = """
    from flwr.serverapp import ServerApp
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg

    def server_fn(context):
        strategy = FedAvg(evaluate_fn=lambda number, parameters, config: (7.0 - number, {"centralized_accuracy": 0.75}))
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=99))

    app = ServerApp(server_fn=server_fn)
"""


async def test_a_legacy_app_trains_the_stored_model(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, server=dedent(LEGACY_SERVER), client=LEGACY_CLIENT) as fed:
        fed.add("c1", step=1, samples=30)
        fed.add("c2", step=2, samples=10)
        start = {name: array + 100 for name, array in initial_model().items()}

        final = await fed.run(start)

    assert list(final) == ["w", "b"]
    np.testing.assert_allclose(final["w"], np.full((4, 3), 100 + 2 * 1.25), rtol=1e-6)
    assert [result.round for result in fed.results] == [0, 1, 2]
    assert [result.loss for result in fed.results] == [7.0, 6.0, 5.0]
    assert fed.results[1].metrics == {"accuracy": 0.75, "loss": 6.0, "eval_loss": 101.25}
    assert fed.results[2].participants == {"c1": 30, "c2": 10}


async def test_a_legacy_app_with_too_few_clients_stops_waiting(tmp_path: Path) -> None:
    async with open_memory_federation(
        tmp_path, server=dedent(LEGACY_SERVER), client=LEGACY_CLIENT, recruit_s=0.5
    ) as fed:
        fed.add("c1", step=1, samples=30)
        with pytest.raises(NotEnoughClients):
            await fed.run(initial_model())


SECAGG_SERVER = """
    from flwr.serverapp import ServerApp
    from flwr.server import LegacyContext, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

    app = ServerApp()

    @app.main()
    def main(grid, context):
        context = LegacyContext(context=context, config=ServerConfig(num_rounds=7), strategy=FedAvg())
        fit = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, max_weight=100)
        DefaultWorkflow(fit_workflow=fit)(grid, context)
"""


async def test_secure_aggregation_runs_unmodified(tmp_path: Path) -> None:
    client = LEGACY_CLIENT.replace(
        "import ClientApp", "import ClientApp\n    from flwr.client.mod import secaggplus_mod"
    )
    client = client.replace("\n    )\n", ",\n        mods=[secaggplus_mod],\n    )\n").replace(
        ".to_client()\n,", ".to_client(),\n"
    )
    async with open_memory_federation(tmp_path, server=dedent(SECAGG_SERVER), client=client, rounds=1) as fed:
        for number in range(3):
            fed.add(f"c{number}", step=1 + number, samples=10)
        final = await fed.run(initial_model())

    assert not any(result.failures for result in fed.results)
    np.testing.assert_allclose(final["w"], 2.0, atol=1e-3)
    assert [result.round for result in fed.results] == [0, 1]


OWN_LOOP = """
    from flwr.app import ArrayRecord, Array, Message, RecordDict, ConfigRecord
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid, context):
        arrays = context.state["fedbus.model"]
        content = RecordDict({"arrays": arrays, "config": ConfigRecord()})
        for number in range(context.run_config["num-server-rounds"]):
            messages = [Message(content, node, "train", group_id=str(number + 1)) for node in grid.get_node_ids()]
            replies = grid.send_and_receive(messages)
            content = RecordDict({"arrays": replies[0].content["arrays"], "config": ConfigRecord()})
        context.state["fedbus.result"] = content["arrays"]
"""


async def test_an_app_with_its_own_loop_uses_the_context_state(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, server=dedent(OWN_LOOP), rounds=3) as fed:
        fed.add("c1", step=2, samples=1)
        final = await fed.run(initial_model())

    np.testing.assert_allclose(final["w"], 6.0)


async def test_an_app_without_a_result_ends_without_a_model(tmp_path: Path) -> None:
    server = dedent(OWN_LOOP).replace('context.state["fedbus.result"] = ', "")
    async with open_memory_federation(tmp_path, server=server) as fed:
        fed.add("c1", step=2, samples=1)
        with structlog.testing.capture_logs() as logs:
            assert await fed.run(initial_model()) == {}

    assert "fedbus.result" in next(
        log["hint"] for log in logs if log["event"] == "ServerApp ended without a model"
    )


async def test_several_threads_may_use_the_grid_concurrently(tmp_path: Path) -> None:
    async with open_memory_federation(tmp_path, client=QUERY_APP) as fed:
        for number in range(4):
            fed.add(f"c{number}")
        messages = _queries(fed, 4)
        replies: list[Message] = []
        threads = [
            threading.Thread(
                target=lambda message=message: replies.extend(fed.grid.send_and_receive([message]))
            )
            for message in messages
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join, 5)

    assert len({reply.metadata.src_node_id for reply in replies}) == 4
