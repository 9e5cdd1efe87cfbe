"""Compressed updates of Flower apps: mods, the configuration, decoding before strategies, and hostile replies."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.clientapp.typing import Mod
from learning.flower.memory_bus import MemoryFederation, open_memory_federation

from fedbus.contracts.run import RoundResult
from fedbus.learning.compression import BadEncoding, Int8
from fedbus.learning.flower import record_codec
from fedbus.learning.flower.compressed_records import (
    RESIDUAL_PREFIX,
    CompressedArray,
    decode_updates,
    has_compressed_arrays,
    server_decodes_updates,
)
from fedbus.learning.flower.mods import bf16, int8, top_k
from fedbus.learning.flower.private_api import SECAGG_CONFIGS, SERVER_NODE_ID, build_message
from fedbus.learning.flower.sent_messages import SentMessages
from fedbus.learning.library import ClientResponse, ClientSession, IncomingMessage
from fedbus.learning.payload import Payload
from fedbus.learning.weights import Arrays

RANDOM = np.random.default_rng(1)
WEIGHTS: Arrays = {"w": RANDOM.normal(size=(64, 32)).astype(np.float32), "b": RANDOM.normal(size=32)}

CLIENT = """
    import numpy as np
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from fedbus.learning.flower import mods

    app = ClientApp(mods=[{mods}])

    @app.train()
    def train(message, context):
        random = np.random.default_rng(context.node_config["seed"])
        arrays = {{
            name: Array((array.numpy() + random.normal(size=array.shape)).astype(array.dtype))
            for name, array in message.content["arrays"].items()
        }}
        metrics = MetricRecord({{"num-examples": 1, "states": len(context.state)}})
        return Message(RecordDict({{"arrays": ArrayRecord(arrays), "metrics": metrics}}), reply_to=message)
"""
SERVER = """
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import *

    app = ServerApp()

    @app.main()
    def main(grid, context):
        initial = {{"w": Array(np.zeros((64, 32), np.float32)), "b": Array(np.zeros(32, np.float64))}}
        strategy = {strategy}(fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord(initial), num_rounds=context.run_config["num-server-rounds"])
"""
LEGACY_CLIENT = """
    import numpy as np
    from flwr.client import NumPyClient
    from flwr.clientapp import ClientApp
    from fedbus.learning.flower import mods

    class Client(NumPyClient):
        def __init__(self, seed):
            self.seed = seed

        def fit(self, parameters, config):
            random = np.random.default_rng(self.seed)
            return [(p + random.normal(size=p.shape)).astype(p.dtype) for p in parameters], 1, {{}}

    app = ClientApp(lambda context: Client(context.node_config["seed"]).to_client(), mods=[{mods}])
"""
LEGACY_SERVER = """
    import numpy as np
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.serverapp import ServerApp

    def make(context):
        initial = ndarrays_to_parameters([np.zeros((64, 32), np.float32), np.zeros(32)])
        strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=initial)
        rounds = context.run_config["num-server-rounds"]
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))

    app = ServerApp(server_fn=make)
"""


@dataclass
class Measured:
    """A session that records the sizes of its replies, and may change them."""

    session: ClientSession
    sizes: list[int] = field(default_factory=list)
    change: Callable[[RecordDict], None] | None = None

    def handle(self, message: IncomingMessage) -> ClientResponse:
        response = self.session.handle(message)
        if response.payload is not None:
            self.sizes.append(response.payload.size_bytes)
            if self.change is not None:
                content = record_codec.decode(response.payload.to_bytes())
                self.change(content)
                encoded = record_codec.encode(content)
                return ClientResponse(payload=Payload.pack(encoded.buffers, as_blob=True))
        return response

    def close(self) -> None:
        self.session.close()


@dataclass
class Run:
    final: Arrays
    results: list[RoundResult]
    sizes: list[int]


async def train(
    path: Path,
    mods: str = "",
    *,
    strategy: str = "FedAvg",
    legacy: bool = False,
    change: Callable[[RecordDict], None] | None = None,
    **table: Any,
) -> Run:
    """Train for three rounds on two clients. *change* changes the replies of the second one."""
    path.mkdir(exist_ok=True)  # noqa: ASYNC240 - a local directory
    server = dedent(LEGACY_SERVER if legacy else SERVER.format(strategy=strategy))
    client = (LEGACY_CLIENT if legacy else CLIENT).format(mods=mods)
    async with open_memory_federation(path, server=server, client=client, rounds=3) as federation:
        sizes: list[int] = []
        for seed in (1, 2):
            device = add_client(federation, seed, table)
            device.session = Measured(device.session, sizes, change if seed == 2 else None)
        final = await federation.run(WEIGHTS, **table)
    return Run(final, federation.results[1:], sizes)


def add_client(federation: MemoryFederation, seed: int, table: dict[str, Any]) -> Any:
    task = federation.task
    federation.task = lambda *args, **options: task(*args, **{**table, **options})  # type: ignore[method-assign]  # the task with other tables
    try:
        return federation.add(f"c{seed}", seed=seed)
    finally:
        federation.task = task  # type: ignore[method-assign]  # the task with other tables


# --- a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mods", "ratio", "tolerance"),
    [("mods.bf16()", 0.55, 0.03), ("mods.int8()", 0.35, 0.03), ("mods.top_k(0.5)", 1.1, 1.5)],
)
async def test_a_mod_makes_replies_smaller_at_a_bounded_error(
    tmp_path: Path, mods: str, ratio: float, tolerance: float
) -> None:
    plain = await train(tmp_path / "plain")
    compressed = await train(tmp_path / "compressed", mods)
    assert max(compressed.sizes) < ratio * min(plain.sizes)
    assert all(result.participants == {"c1": 1, "c2": 1} for result in compressed.results)
    for name, array in plain.final.items():
        assert compressed.final[name].dtype == array.dtype
        np.testing.assert_allclose(compressed.final[name], array, atol=tolerance)


async def test_the_configuration_compresses_an_app_without_mods(tmp_path: Path) -> None:
    by_mod = await train(tmp_path / "mod", "mods.int8()")
    by_table = await train(tmp_path / "table", compression="int8")
    both = await train(tmp_path / "both", "mods.int8()", compression="int8")
    for run in (by_table, both):
        assert run.sizes == by_mod.sizes
        np.testing.assert_allclose(run.final["w"], by_mod.final["w"], rtol=1e-6)


@pytest.mark.parametrize("strategy", ["FedMedian", "FedAdam", "Krum"])
async def test_strategies_get_plain_arrays(tmp_path: Path, strategy: str) -> None:
    run = await train(tmp_path, "mods.int8()", strategy=strategy)
    assert [result.failures for result in run.results] == [{}, {}, {}]
    assert np.isfinite(run.final["w"]).all()
    assert not np.array_equal(run.final["w"], WEIGHTS["w"])


async def test_streaming_and_stock_aggregation_agree(tmp_path: Path) -> None:
    streaming = await train(tmp_path / "streaming", "mods.int8()")
    stock = await train(tmp_path / "stock", "mods.int8()", aggregation="stock")
    np.testing.assert_allclose(streaming.final["w"], stock.final["w"], rtol=1e-5)


async def test_a_legacy_app_trains_with_compressed_updates(tmp_path: Path) -> None:
    plain = await train(tmp_path / "plain", legacy=True)
    compressed = await train(tmp_path / "compressed", "mods.int8()", legacy=True)
    assert max(compressed.sizes) < 0.35 * min(plain.sizes)
    for name, array in plain.final.items():
        np.testing.assert_allclose(compressed.final[name], array, atol=0.03)


async def test_the_error_stays_in_the_state_of_the_client(tmp_path: Path) -> None:
    with_feedback = await train(tmp_path / "with", "mods.int8()")
    assert [result.figures["c1"]["train_states"] for result in with_feedback.results] == [0, 1, 1]
    without = await train(tmp_path / "without", "mods.int8(error_feedback=False)")
    assert [result.figures["c1"]["train_states"] for result in without.results] == [0, 0, 0]
    exact = await train(tmp_path / "exact")
    errors = [np.abs(run.final["w"] - exact.final["w"]).max() for run in (with_feedback, without)]
    assert errors[0] < errors[1]  # each client makes the same update in each round, so that its errors add up


# --- hostile replies ------------------------------------------------------------------------


def replace_array(**changes: Any) -> Callable[[RecordDict], None]:
    """Return a change of ``w`` in a reply: other fields of the array."""

    def change(content: RecordDict) -> None:
        array = content.array_records["arrays"]["w"]
        fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
        content.array_records["arrays"]["w"] = Array(**{**fields, **changes})

    return change


def add_record(content: RecordDict) -> None:
    content["more"] = ArrayRecord({"x": content.array_records["arrays"]["w"]})


def rename_array(content: RecordDict) -> None:
    content.array_records["arrays"]["x"] = content.array_records["arrays"]["w"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            replace_array(shape=(10**6, 10**6)),
            r"'w' is float32\[1000000, 1000000\] instead of float32\[64, 32\]",
        ),
        (replace_array(dtype="float64"), r"'w' is float64\[64, 32\] instead of float32\[64, 32\]"),
        (replace_array(data=b"\0" * 10), r"'w': 10 bytes instead of 2052"),
        (replace_array(data=b"\0\0\xc0\x7f" + bytes(2048)), r"'w': the scale nan"),
        (replace_array(stype="fedbus.zip"), r"'w': the encoding 'zip' is unknown"),
        (replace_array(stype="fedbus.top-k", data=b"\xff" * 8), r"'w': the index 4294967295 is out of range"),
        (rename_array, r"array 'x' is compressed, but the message has no such array"),
    ],
)
async def test_a_hostile_update_is_the_failure_of_its_client(
    tmp_path: Path, change: Callable[[RecordDict], None], reason: str
) -> None:
    run = await train(tmp_path, "mods.int8()", change=change)
    for result in run.results:
        assert result.participants == {"c1": 1}
        assert re.search(rf"invalid reply: .*{reason}", result.failures["c2"])


def test_a_compressed_record_without_a_counterpart_is_refused() -> None:
    sent = {"a": ArrayRecord(), "b": ArrayRecord()}
    array = Array("float32", (1,), "fedbus.int8", bytes(5))
    with pytest.raises(BadEncoding, match="record 'c' is compressed, but the message has no record"):
        decode_updates(RecordDict({"c": ArrayRecord({"x": array})}), sent)


# --- one message ----------------------------------------------------------------------------


def make_message(content: RecordDict, kind: str = "train") -> Message:
    metadata = Metadata(1, "m1", SERVER_NODE_ID, 5, "", "1", 0.0, 60.0, kind)
    return build_message(metadata, content=content)


def make_context() -> Context:
    return Context(1, 5, node_config={}, state=RecordDict(), run_config={})


def call(
    *mods: Mod,
    content: RecordDict | None = None,
    context: Context | None = None,
    reply: Callable[[RecordDict], RecordDict] | None = None,
    kind: str = "train",
) -> RecordDict:
    """Return the reply of a ClientApp that adds 1.25 to its arrays, or does what *reply* does."""
    app = ClientApp(mods=list(mods))

    def add(content: RecordDict) -> RecordDict:
        records = {
            name: ArrayRecord(
                {key: Array((array.numpy() + 1.25).astype(array.dtype)) for key, array in record.items()}
            )
            for name, record in content.array_records.items()
        }
        return RecordDict({**records, "metrics": MetricRecord({"num-examples": 1})})

    def handle(message: Message, _: Context) -> Message:
        return Message((reply or add)(message.content), reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    if content is None:
        content = RecordDict({"arrays": ArrayRecord({"w": Array(np.arange(4, dtype=np.float32))})})
    answer = app(make_message(content, kind), context or make_context())
    assert not answer.has_error(), answer.error
    return answer.content


def test_without_fedbus_the_arrays_are_plain_and_have_the_loss() -> None:
    update = np.array([1, 2, 3, 1000], np.float32)
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(4, np.float32))})})
    reply = lambda _: RecordDict({"arrays": ArrayRecord({"w": Array(update)})})  # noqa: E731
    with server_decodes_updates():
        on_wire = call(int8(), content=content, reply=reply)
    plain = call(int8(), content=content, reply=reply)
    assert has_compressed_arrays(on_wire)
    decode_updates(on_wire, content.array_records)
    assert on_wire == plain
    np.testing.assert_allclose(plain.array_records["arrays"]["w"].numpy(), [0, 0, 0, 1000], atol=8)


def test_evaluation_and_other_dtypes_stay_as_they_are() -> None:
    arrays = {
        "n": Array(np.arange(3)),
        "c": Array(np.ones(2, np.complex64)),
        "empty": Array(np.zeros((0, 2))),
    }
    content = RecordDict({"arrays": ArrayRecord(arrays)})
    with server_decodes_updates():
        assert not has_compressed_arrays(call(int8(), content=content))
        assert not has_compressed_arrays(call(int8(), kind="evaluate"))
        assert has_compressed_arrays(call(int8()))


def test_arrays_of_another_shape_stay_as_they_are() -> None:
    with server_decodes_updates():
        reply = call(
            int8(),
            reply=lambda _: RecordDict({"a": ArrayRecord({"w": Array(np.ones(9)), "v": Array(np.ones(4))})}),
        )
    assert not has_compressed_arrays(reply)


def test_an_app_that_changes_its_message_in_place_is_compressed_correctly() -> None:
    def change(content: RecordDict) -> RecordDict:
        content.array_records["arrays"]["w"] = Array(content.array_records["arrays"]["w"].numpy() + 1)
        return content

    with server_decodes_updates():
        reply = call(top_k(0.5), reply=change)
    (array,) = reply.array_records["arrays"].values()
    assert (
        array.data == np.array([0, 1], "<u4").tobytes() + np.ones(2, "<f4").tobytes() or len(array.data) == 16
    )


def test_each_record_refers_to_that_of_its_name() -> None:
    first, second = np.zeros(4, np.float32), np.full(4, 100, np.float32)
    content = RecordDict({"a": ArrayRecord({"w": Array(first)}), "b": ArrayRecord({"w": Array(second)})})
    context = make_context()
    with server_decodes_updates():
        reply = call(bf16(), content=content, context=context)
    decode_updates(reply, content.array_records)
    np.testing.assert_array_equal(reply.array_records["a"]["w"].numpy(), first + 1.25)
    np.testing.assert_array_equal(reply.array_records["b"]["w"].numpy(), second + 1.25)
    assert not context.state  # bf16 has no error feedback


def test_the_state_has_the_error_of_each_record() -> None:
    context = make_context()
    call(int8(), context=context)
    assert list(context.state) == [RESIDUAL_PREFIX + "arrays"]


def test_a_mod_that_runs_after_the_compression_gets_an_explanation() -> None:
    def doubles(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        reply.content.array_records["arrays"].to_numpy_ndarrays()
        return reply

    with (
        server_decodes_updates(),
        pytest.raises(TypeError, match=r"compressed \(int8\)\. Put the mod .* first in `mods`"),
    ):
        call(doubles, int8())
    with server_decodes_updates():
        call(int8(), doubles)


def test_compression_with_client_side_clipping_is_refused() -> None:
    content = RecordDict(
        {"arrays": ArrayRecord({"w": Array(np.ones(2))}), "config": ConfigRecord({"clipping_norm": 1.0})}
    )
    with pytest.raises(
        ValueError, match=r"clipping on the client.*DifferentialPrivacyServerSideFixedClipping"
    ):
        call(int8(), fixedclipping_mod, content=content)


def test_compression_with_secure_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"secure aggregation.*Remove the compression"):
        call(int8(), content=RecordDict({SECAGG_CONFIGS: ConfigRecord({"stage": "setup"})}))


def test_an_update_with_nan_names_the_array() -> None:
    with pytest.raises(BadEncoding, match="cannot compress 'w': the update has a NaN"):
        call(
            int8(),
            reply=lambda _: RecordDict({"a": ArrayRecord({"w": Array(np.full(4, np.nan, np.float32))})}),
        )


def test_a_compressed_array_can_be_copied_and_is_not_readable() -> None:
    import copy  # noqa: PLC0415
    import pickle  # noqa: PLC0415

    array = CompressedArray("float32", (1,), "fedbus.int8", bytes(5))
    for same in (copy.deepcopy(array), pickle.loads(pickle.dumps(array))):
        assert same == array
        with pytest.raises(TypeError, match="compressed"):
            same.numpy()


# --- late replies ---------------------------------------------------------------------------


def reply_of(values: np.ndarray) -> RecordDict:
    return RecordDict(
        {"a": ArrayRecord({"w": Array("float32", values.shape, "fedbus.int8", bytes(Int8().encode(values)))})}
    )


def sent_messages(count: int) -> list[Message]:
    return [
        make_message(RecordDict({"a": ArrayRecord({"w": Array(np.ones(100, np.float32))})}))
        for _ in range(count)
    ]


def test_a_late_update_is_decoded_while_its_weights_are_in_memory() -> None:
    sent = SentMessages(max_kept_bytes=1200)  # two arrays of 528 bytes
    kept = [sent.keep(message) for message in sent.wrap(sent_messages(3))]
    with pytest.raises(BadEncoding, match=r"came too late.*\(limit 1200 bytes\)"):
        sent.decode(reply_of(np.ones(100, np.float32)), kept[0])
    for message in kept[1:]:
        content = reply_of(np.ones(100, np.float32))
        sent.decode(content, message)
        np.testing.assert_allclose(content.array_records["a"]["w"].numpy(), 2)


def test_messages_with_replies_do_not_count_against_the_limit() -> None:
    sent = SentMessages(max_kept_bytes=1200)
    for _ in range(5):
        (message,) = sent.wrap(sent_messages(1))
        sent.decode(reply_of(np.ones(100, np.float32)), sent.keep(message))
        del message


def test_weights_are_not_kept_if_clients_do_not_compress() -> None:
    sent = SentMessages()
    first, second = sent.wrap(sent_messages(2))
    assert first.content.arrays is not None
    sent.decode(RecordDict({"a": ArrayRecord({"w": Array(np.ones(100, np.float32))})}), first)
    assert sent.keep(second).content.arrays is None
