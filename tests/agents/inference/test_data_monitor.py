"""The data monitor: it checks captured data on the device and publishes only counts and statistics."""

import asyncio
import sqlite3
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from nats import connect as nats_connect
from support import NatsServer
from support.federation import TASK, FederationHarness

from fedbus.agents.flower_client.captured_training_data import WrittenRows, write_training_rows
from fedbus.agents.inference.data_monitor import NO_REFERENCE, SCIPY_MISSING, DataMonitor
from fedbus.agents.inference.engine import InferenceEngine
from fedbus.app.composition.agents import inference
from fedbus.contracts.catalogue import CLIENT_CONSUMERS
from fedbus.contracts.client import InferReady, InferStart
from fedbus.contracts.envelope import pack
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.message import Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.serving import (
    CapturePaused,
    CaptureResumed,
    DataChecked,
    DataCounted,
    DriftDetected,
    LiveAccuracy,
)
from fedbus.contracts.task.serving import CaptureTable, ChecksTable
from fedbus.contracts.task.task import Task
from fedbus.domain import drift
from fedbus.learning import weights
from fedbus.learning.task_code import BadTask
from fedbus.stores.captured.reader import is_held_out
from fedbus.stores.captured.store import CapturedData

C1 = client_id("c1")
CHECKS = ChecksTable.model_validate({"min-rows": 100, "max-rows": 400})
CAPTURE = CaptureTable()
REF = ModelRef(version=1, sha256="0" * 64, size_bytes=1, architecture="0" * 64)
Array = np.ndarray[Any, Any]


class SignPredictor:
    """Predicts whether the sum of a sample is above zero."""

    input_shape = (3,)
    input_dtype = np.dtype(np.float32)
    classes: int | None = None

    def predict(self, inputs: Array) -> Array:
        return np.asarray((inputs.sum(axis=1) > 0).astype(np.int64))


def samples(count: int, *, around: float = 0.0, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(around, 1, (count, 3)).astype(np.float32)


class RecordedMessages(list[Message]):
    """The published messages."""

    def of_kind(self, kind: type[Any]) -> list[Any]:
        return [message for message in self if isinstance(message, kind)]


@pytest.fixture
async def captured(tmp_path: Path) -> AsyncIterator[CapturedData]:
    captured = CapturedData(tmp_path / "captured.db")
    yield captured
    await captured.close()


@pytest.fixture
async def engine() -> AsyncIterator[InferenceEngine]:
    engine = InferenceEngine()
    engine.serve(await engine.load_model(REF, SignPredictor))
    yield engine
    await engine.stop()


def make_monitor(
    captured: CapturedData, engine: InferenceEngine, published: RecordedMessages, **more: Any
) -> DataMonitor:
    reference = samples(1000, seed=1)
    return DataMonitor(
        captured,
        engine,
        more.pop("checks", CHECKS),
        CAPTURE,
        published.append,
        task=TASK,
        client=C1,
        reference=lambda: (reference, SignPredictor().predict(reference)),
        **more,
    )


def capture(captured: CapturedData, inputs: Array, *, labelled: bool = False) -> None:
    for sample, answer in zip(inputs, SignPredictor().predict(inputs), strict=True):
        assert captured.add(sample, answer, int(answer) if labelled else None, model_version=1)


async def run_check(monitor: DataMonitor) -> None:
    await monitor.check_new_rows(await asyncio.to_thread(monitor._load_reference))


async def test_data_like_the_reference_pass_all_checks(
    captured: CapturedData, engine: InferenceEngine
) -> None:
    published = RecordedMessages()
    capture(captured, samples(300, seed=2), labelled=True)
    await run_check(make_monitor(captured, engine, published))
    (checked,) = published.of_kind(DataChecked)
    assert not published.of_kind(DriftDetected)
    assert not checked.drifting
    assert checked.rows == 300
    assert {one.check: one.ok for one in checked.findings if one.check != "range"} == {
        "schema": True,
        "balance": True,
        "labels": True,
    }
    assert sum(checked.classes.values()) == 300
    assert all(sum(one.counts) == 300 and one.psi < 0.25 for one in checked.inputs)
    assert sum(checked.predictions.counts) == 300
    assert checked.serving == 1
    assert checked.live == (LiveAccuracy(version=1, labelled=300, right=300),)


async def test_drift_is_published_once_until_it_ends(captured: CapturedData, engine: InferenceEngine) -> None:
    published, table = RecordedMessages(), ChecksTable.model_validate({"min-rows": 100, "max-rows": 200})
    monitor = make_monitor(captured, engine, published, checks=table)
    reference = await asyncio.to_thread(monitor._load_reference)
    capture(captured, samples(200, around=3.0))
    await monitor.check_new_rows(reference)
    await monitor.check_new_rows(reference)  # no new rows: no check
    assert len(published.of_kind(DataChecked)) == 1
    capture(captured, samples(50, around=3.0, seed=5))
    await monitor.check_new_rows(reference)
    assert len(published.of_kind(DataChecked)) == 2
    drifts = published.of_kind(DriftDetected)
    assert sorted(one.of for one in drifts) == ["inputs", "predictions"]
    of_inputs = next(one for one in drifts if one.of == "inputs")
    assert of_inputs.score > 0.25
    assert of_inputs.p < 0.01
    assert of_inputs.features == 3
    capture(captured, samples(200, seed=3))
    await monitor.check_new_rows(reference)
    assert not published.of_kind(DataChecked)[-1].drifting
    capture(captured, samples(200, around=3.0, seed=4))
    await monitor.check_new_rows(reference)
    assert len(published.of_kind(DriftDetected)) == 4


async def test_drift_is_detected_in_a_full_store(tmp_path: Path, engine: InferenceEngine) -> None:
    captured = CapturedData(tmp_path / "captured.db", max_rows=300)
    published, table = RecordedMessages(), ChecksTable.model_validate({"min-rows": 100, "max-rows": 200})
    monitor = make_monitor(captured, engine, published, checks=table)
    reference = await asyncio.to_thread(monitor._load_reference)
    for seed, around in ((2, 0.0), (3, 3.0)):
        capture(captured, samples(600, around=around, seed=seed), labelled=True)
        await monitor.publish_counts()
        await monitor.check_new_rows(reference)
    first, second = published.of_kind(DataCounted)
    assert first.labelled + first.holdout == second.labelled + second.holdout == 300
    assert (first.labelled_ever, second.labelled_ever) == (600, 1200)
    assert first.database == second.database
    assert [one.drifting for one in published.of_kind(DataChecked)] == [False, True]
    await captured.close()


async def test_few_rows_are_checked_without_drift(captured: CapturedData, engine: InferenceEngine) -> None:
    published = RecordedMessages()
    capture(captured, samples(20, around=9.0))
    await run_check(make_monitor(captured, engine, published))
    (checked,) = published.of_kind(DataChecked)
    assert (checked.inputs, checked.predictions, checked.drifting) == ((), None, False)
    assert not next(one for one in checked.findings if one.check == "range").ok


async def test_counts_are_published_when_they_change(captured: CapturedData, engine: InferenceEngine) -> None:
    published = RecordedMessages()
    monitor = make_monitor(captured, engine, published)
    capture(captured, samples(10), labelled=True)
    await monitor.publish_counts()
    await monitor.publish_counts()
    capture(captured, samples(5))
    await monitor.publish_counts()
    first, second = published.of_kind(DataCounted)
    assert (first.labelled + first.holdout, first.unlabelled) == (10, 0)
    assert (second.labelled, second.holdout) == (first.labelled, first.holdout)
    assert 0 < second.unlabelled <= 5
    assert (second.labelled_ever, second.unlabelled_ever) == (10, 5)


async def test_a_device_without_scipy_reports_that_drift_is_unknown(
    captured: CapturedData, engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "is_scipy_available", lambda: False)
    published = RecordedMessages()
    capture(captured, samples(200, around=9.0))
    await run_check(make_monitor(captured, engine, published))
    (checked,) = published.of_kind(DataChecked)
    assert checked.drift_unknown == SCIPY_MISSING
    assert not checked.drifting


async def test_a_device_without_a_reference_checks_the_table(
    captured: CapturedData, engine: InferenceEngine
) -> None:
    published = RecordedMessages()
    capture(captured, samples(150))
    table = ChecksTable.model_validate({"maximum": 0.5, "max-unlabelled-share": 0.5})
    await run_check(
        DataMonitor(captured, engine, table, CAPTURE, published.append, task=TASK, client=C1)  # no reference
    )
    (checked,) = published.of_kind(DataChecked)
    assert {one.check: one.ok for one in checked.findings} == {
        "schema": True,
        "range": False,
        "labels": False,
    }
    assert checked.drift_unknown == NO_REFERENCE


# --- the whole agent ------------------------------------------------------------------------------------


def with_tables(task: Task, **tables: dict[str, Any]) -> Task:
    changed = task.table.model_validate({**task.table.model_dump(), **tables})
    return task.model_copy(update={"table": changed})


async def test_no_sample_leaves_the_device(nats: NatsServer, fed: FederationHarness) -> None:
    """No message on the bus contains a value of a sample, in any encoding."""
    fed.config = replace(
        fed.config, task=with_tables(fed.config.task, checks={"every-s": 0.2, "min-rows": 20, "classes": 4})
    )
    for agent in CLIENT_CONSUMERS:
        await fed.bus.create_client_consumer(agent, task=TASK, client="c1")
    traffic: list[bytes] = []

    async def record(message: Any) -> None:
        traffic.append(message.data + repr(message.headers).encode())

    observer = await nats_connect(nats.url, connect_timeout=30)
    await observer.subscribe(">", cb=record)
    secret = [0.123456789, 0.98765432, 0.55554444]
    device = fed.client_config("c1")
    async with fed.run_agent(lambda stop: inference(device, stop)), aiohttp.ClientSession() as session:
        await fed.wait_for_state("inference", "empty")
        path = fed.config.home / "v1.safetensors"
        arrays = {"weight": np.ones((4, 3), np.float32), "bias": np.zeros(4, np.float32)}
        model = ModelRef(**weights.save(arrays, path).model_dump(), version=1)
        start = InferStart(task=TASK, client="c1", model=model, path=str(path))
        await fed.publish(start, sender="client-manager")
        ready = await fed.wait_for_message(InferReady)
        traffic.clear()  # the messages of the test itself
        for n in range(60):
            body = {"inputs": [secret], "labels": [n % 4]}
            async with session.post(f"{ready.endpoint}/predict", json=body) as response:
                assert response.status == 200
        await fed.wait_for_message(DataCounted)
        checked = await fed.wait_for_message(DataChecked)
        await fed.wait_until(
            lambda: any(one.inputs and one.rows == 60 for one in fed.messages_of(DataChecked)),
            "a distribution",
        )
    await observer.close()
    assert checked.rows
    content = b"".join(traffic)
    assert b"data_checked" in content
    assert fed.messages_of(DataChecked)[-1].classes == {"0": 15, "1": 15, "2": 15, "3": 15}
    for value in secret:
        for encoded in encodings_of(value):
            assert encoded not in content


class PricePredictor:
    """Predicts a price: a regression."""

    input_shape = (3,)
    input_dtype = np.dtype(np.float32)
    classes = None

    def predict(self, inputs: Array) -> Array:
        return np.asarray(inputs.sum(axis=1) * 1000 + 50_000, np.float32)


@pytest.mark.parametrize("prices", [[48_999, 52_000.0, 61_234], [18, 43, 99]], ids=["large", "small"])
async def test_no_label_of_a_regression_leaves_the_device(
    captured: CapturedData, engine: InferenceEngine, prices: list[float]
) -> None:
    published = RecordedMessages()
    engine.serve(await engine.load_model(REF.model_copy(update={"version": 2}), PricePredictor))
    inputs = samples(300)
    for n, (sample, answer) in enumerate(zip(inputs, PricePredictor().predict(inputs), strict=True)):
        captured.add(sample, answer, prices[n % 3], model_version=2)
    reference = inputs, np.array([int(price) for price in prices] * 100)
    table = ChecksTable.model_validate({"min-class-share": 0.9})
    monitor = DataMonitor(
        captured,
        engine,
        table,
        CAPTURE,
        published.append,
        task=TASK,
        client=C1,
        reference=lambda: reference,
    )
    await monitor.publish_counts()
    await run_check(monitor)
    (checked,) = published.of_kind(DataChecked)
    assert (checked.classes, checked.live) == ({}, ())
    assert checked.predictions is not None
    texts = [finding.what for finding in checked.findings] + [shift.feature for shift in checked.inputs]
    assert not any(str(int(price)) in text for text in texts for price in prices)
    if min(prices) > 1000:  # small prices could be equal to a count
        content = b"".join(map(pack, published))
        assert not any(encoded in content for price in prices for encoded in encodings_of(price))


def encodings_of(value: float) -> list[bytes]:
    single = float(np.float32(value))
    return [
        *(struct.pack(f"{order}{size}", value) for order in "<>" for size in "fd"),
        *(struct.pack(f"{order}d", single) for order in "<>"),
        str(value)[:8].encode(),
        *([str(int(value)).encode(), struct.pack(">I", int(value))] if value == int(value) else []),
    ]


async def test_capture_pauses_and_resumes_while_predictions_continue(
    fed: FederationHarness,
) -> None:
    """The table is renamed for a while; the tests of the store cover a full disk."""
    fed.config = replace(fed.config, task=with_tables(fed.config.task, capture={"retry-s": 0.05}))
    for agent in CLIENT_CONSUMERS:
        await fed.bus.create_client_consumer(agent, task=TASK, client="c1")
    device = fed.client_config("c1")
    async with fed.run_agent(lambda stop: inference(device, stop)), aiohttp.ClientSession() as session:
        await fed.wait_for_state("inference", "empty")
        path = fed.config.home / "v1.safetensors"
        arrays = {"weight": np.ones((4, 3), np.float32), "bias": np.zeros(4, np.float32)}
        model = ModelRef(**weights.save(arrays, path).model_dump(), version=1)
        await fed.publish(
            InferStart(task=TASK, client="c1", model=model, path=str(path)), sender="client-manager"
        )
        url = (await fed.wait_for_message(InferReady)).endpoint

        async def predict() -> int | None:
            async with session.post(f"{url}/predict", json={"inputs": [[1, 2, 3]]}) as response:
                assert response.status == 200
                row: int | None = (await response.json())["ids"][0]
                return row

        assert await predict() is not None
        execute_sql(device.captured_path(), "ALTER TABLE captured RENAME TO elsewhere")
        while not fed.messages_of(CapturePaused):
            await predict()
        while await predict() is not None:  # a dropped row has no id
            pass
        execute_sql(device.captured_path(), "ALTER TABLE elsewhere RENAME TO captured")
        while not fed.messages_of(CaptureResumed):
            await predict()
        assert await predict() is not None
        assert fed.messages_of(CaptureResumed)[0].dropped > 0
        assert "predictions go on" in fed.messages_of(CapturePaused)[0].reason


def execute_sql(database: Path, statement: str) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute(statement)
    connection.close()


# --- training data ------------------------------------------------------------------------------------------

CODE = """
import numpy as np

def all_rows(inputs, outputs, labels):
    return inputs, np.array([output if label is None else label for output, label in zip(outputs, labels)])

def too_few_labels(inputs, outputs, labels):
    return inputs, labels[1:]

def broken(inputs, outputs, labels):
    raise RuntimeError("no such\\ncolumn")
"""


@pytest.fixture
async def database(captured: CapturedData, tmp_path: Path) -> Path:
    """Sixty captured rows, half of them labelled."""
    capture(captured, samples(30))
    capture(captured, samples(30, seed=1), labelled=True)
    await captured.flush()
    return tmp_path / "captured.db"


def task_with(fed_task: Task, function: str | None, module: str) -> Task:
    capture = {} if function is None else {"training-data": f"{module}:{function}"}
    return with_tables(fed_task, capture=capture)


@pytest.fixture
def task(tmp_path: Path, request: pytest.FixtureRequest) -> Task:
    (tmp_path / f"{module_of(request)}.py").write_text(CODE)
    reference = f"{module_of(request)}:app"
    table = {"task": "t", "model": reference}
    about = {
        "table": table,
        "app": {"serverapp": reference, "clientapp": reference},
        "code_version": "sha256:0",
    }
    return Task.model_validate({**about, "path": str(tmp_path)})


def module_of(request: pytest.FixtureRequest) -> str:
    return "code_" + "".join(c if c.isalnum() else "_" for c in request.node.name)


async def test_training_uses_the_labelled_rows_outside_the_holdout(
    database: Path, task: Task, tmp_path: Path
) -> None:
    rows = [row for row in range(31, 61) if not is_held_out(row, CAPTURE.holdout_share)]
    assert write_training_rows(task, database, tmp_path / "d.npz") == WrittenRows(len(rows))
    with np.load(tmp_path / "d.npz") as data:
        assert data["inputs"].tolist() == [samples(30, seed=1)[row - 31].tolist() for row in rows]


async def test_a_task_can_convert_captured_rows_to_training_data(
    database: Path, task: Task, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    configured = task_with(task, "all_rows", module_of(request))
    rows = [row for row in range(1, 61) if not is_held_out(row, CAPTURE.holdout_share)]
    assert write_training_rows(configured, database, tmp_path / "d.npz") == WrittenRows(len(rows))


@pytest.mark.parametrize("function", [None, "all_rows"])
async def test_invalid_rows_are_left_out_of_training_and_counted(
    captured: CapturedData,
    task: Task,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    function: str | None,
) -> None:
    valid, out_of_range = np.zeros(3, np.float32), np.full(3, 7, np.float32)
    for sample, label in ((valid, 0), (valid, 99), (out_of_range, 1), (valid, 1), (valid, 0.5)):
        assert captured.add(sample, np.int64(0), label, model_version=1)
    await captured.flush()
    configured = with_tables(
        task,
        capture={"holdout-share": 0.0}
        | ({"training-data": f"{module_of(request)}:{function}"} if function else {}),
        checks={"classes": 2, "maximum": 5.0},
    )
    assert write_training_rows(configured, captured.path, tmp_path / "d.npz") == WrittenRows(
        2, skipped_rows=3
    )
    with np.load(tmp_path / "d.npz") as data:
        assert data["inputs"].tolist() == [[0, 0, 0]] * 2
        assert data["labels"].tolist() == [0, 1]


async def test_without_valid_rows_training_has_no_captured_data(
    captured: CapturedData, task: Task, tmp_path: Path
) -> None:
    captured.add(np.zeros(3, np.float32), np.int64(0), 99, model_version=1)
    await captured.flush()
    (tmp_path / "d.npz").write_bytes(b"from an earlier round")
    configured = with_tables(task, capture={"holdout-share": 0.0}, serving={"input-shape": [2]})
    assert write_training_rows(configured, captured.path, tmp_path / "d.npz") == WrittenRows(
        0, skipped_rows=1
    )
    assert not (tmp_path / "d.npz").exists()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("too_few_labels", "Return one label for each input"),
        ("broken", "did not return training data: RuntimeError: no such column"),
        ("missing", "has no 'missing'"),
    ],
)
async def test_an_invalid_training_data_function_is_reported(
    database: Path, task: Task, tmp_path: Path, request: pytest.FixtureRequest, function: str, reason: str
) -> None:
    with pytest.raises(BadTask, match=reason):
        write_training_rows(task_with(task, function, module_of(request)), database, tmp_path / "d.npz")
