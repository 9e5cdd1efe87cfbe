"""Each use of Flower's private API. A failure means that Flower has changed:
adapt `fedbus/learning/flower/private_api.py`."""

import inspect
import threading
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.client_manager import SimpleClientManager
from flwr.server.compat import app_utils
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedbus.learning.flower.private_api import (
    CLIENT_APP_RAISED,
    NODE_UNAVAILABLE,
    NUMPY,
    SERVER_NODE_ID,
    BorrowedArray,
    aggregate_metricrecords,
    build_message,
    empty_run,
    set_message_id,
    set_process_identity,
)
from fedbus.learning.flower.replies import GridClosed
from fedbus.learning.flower.run_grid import NO_FUNCTION


def test_a_server_message_takes_its_identity_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="TaskIdentity"):  # else the workaround is no longer needed
        Message(RecordDict(), 5, "train")

    set_process_identity(77)
    message = Message(RecordDict(), 5, "train")

    assert (message.metadata.run_id, message.metadata.src_node_id) == (77, SERVER_NODE_ID)


def test_a_message_id_has_no_setter_but_can_be_set() -> None:
    set_process_identity(77)
    message = Message(RecordDict(), 5, "train")
    with pytest.raises(AttributeError):  # else the workaround is no longer needed
        message.metadata.message_id = "m1"  # type: ignore[misc]
    set_message_id(message, "m1")
    assert message.metadata.message_id == "m1"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m1"


def test_a_received_message_needs_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    metadata = Metadata(1, "m1", 1, 5, "", "3", time.time(), 60.0, "train")
    message = build_message(metadata, content=RecordDict({"c": ConfigRecord({"a": 1})}))
    reply = Message(Error(CLIENT_APP_RAISED, "why"), reply_to=message)
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id, reply.metadata.group_id) == (5, 1, "3")
    assert reply.error.reason == "why"


def test_flowers_error_for_a_missing_function_has_the_expected_text() -> None:
    metadata = Metadata(1, "m1", 1, 5, "", "3", time.time(), 60.0, "evaluate")
    context = Context(1, 5, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(ValueError, match=NO_FUNCTION):
        ClientApp()(build_message(metadata, content=RecordDict()), context)


def test_a_run_for_legacy_apps_has_its_id() -> None:
    assert empty_run(42).run_id == 42


def test_flowers_constants_have_the_expected_values() -> None:
    assert (SERVER_NODE_ID, CLIENT_APP_RAISED, NODE_UNAVAILABLE) == (1, 2, 5)
    assert Array(np.zeros(1)).stype == NUMPY


def test_a_borrowed_array_behaves_like_an_array() -> None:
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    array = Array(values)
    borrowed = BorrowedArray(array.dtype, array.shape, array.stype, memoryview(bytearray(array.data)))
    assert borrowed.deflate() == array.deflate()
    assert borrowed.object_id == array.object_id
    assert [chunk for chunk, _ in borrowed.slice_array()] == [chunk for chunk, _ in array.slice_array()]
    assert (borrowed.numpy() == values).all()
    assert set(inspect.signature(Array).parameters) >= {"dtype", "shape", "stype", "data"}
    assert ArrayRecord({"w": borrowed})["w"] == array


def test_fedavg_has_the_parts_that_streaming_uses() -> None:
    assert FedAvg().train_metrics_aggr_fn is aggregate_metricrecords
    assert list(inspect.signature(FedAvg.aggregate_train).parameters) == ["self", "server_round", "replies"]
    assert list(inspect.signature(FedAvg._check_and_log_replies).parameters)[:3] == [
        "self",
        "replies",
        "is_train",
    ]


def test_start_has_the_parameters_that_the_hook_sets() -> None:
    assert set(inspect.signature(Strategy.start).parameters) >= {
        "initial_arrays",
        "num_rounds",
        "evaluate_fn",
    }


def test_the_grid_has_no_unknown_abstract_method() -> None:
    known = {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }
    assert set(Grid.__abstractmethods__) == known


def test_flowers_background_thread_ends_when_the_grid_is_closed() -> None:
    class Closed(Grid):
        run = empty_run(1)

        def get_node_ids(self) -> list[int]:
            raise GridClosed("over")

    Closed.__abstractmethods__ = frozenset()
    stop, ready = threading.Event(), threading.Event()
    stop.wait = lambda *_: False  # type: ignore[method-assign]
    app_utils._update_client_manager(Closed(), SimpleClientManager(), stop, ready)  # type: ignore[abstract]
    assert stop.is_set()
