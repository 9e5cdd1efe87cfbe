"""The examples are ordinary Flower apps: they run unmodified in Flower's simulation, and learn."""

import asyncio
import gzip
import importlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from support import eventually
from support.ports import free_port

from fedbus.contracts.task.task import Task
from fedbus.learning.flower import task_code
from fedbus.learning.flower.private_api import Run, empty_run, set_message_id, set_process_identity
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import create_task, read_task, validate_task

ROOT = Path(__file__).parents[1]
MNIST = ROOT / "examples" / "mnist"
Config = dict[str, bool | int | float | str]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder with MNIST, or "": then the app uses scikit-learn's digits."""
    shared = ROOT.parent / "shared" / "data"
    folder = os.environ.get("FEDBUS_DATA_DIR") or (str(shared) if shared.is_dir() else "")
    monkeypatch.setenv("FEDBUS_DATA_DIR", folder)
    return folder


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The data module of the example."""
    monkeypatch.syspath_prepend(str(MNIST))
    return importlib.import_module("mnist_app.data")


class LocalGrid(Grid):
    """A Grid that calls one ClientApp for all nodes in this process."""

    def __init__(self, app: ClientApp, contexts: dict[int, Context]) -> None:
        self._app = app
        self._contexts = contexts
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self.absent: set[int] = set()

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return empty_run(1)

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self._contexts if node not in self.absent]

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        assert timeout is None or timeout > 0
        replies = []
        for message in messages:
            set_message_id(message, str(len(self.sent)))
            self.sent.append(message)
            replies.append(self._app(message, self._contexts[message.metadata.dst_node_id]))
        self.replies += replies
        return replies


def run_locally(
    task: Task, *, clients: int = 3, with_absent_client: bool = False, **config: Any
) -> LocalGrid:
    """Train *task* with all its parts in this process, and return the Grid with all messages."""
    run_config: Config = {
        **task.run_config,
        **{key.replace("_", "-"): value for key, value in config.items()},
    }
    set_process_identity(1)

    def context(node: int, node_config: Config) -> Context:
        return Context(1, node, node_config=node_config, state=RecordDict(), run_config=run_config)

    contexts = {
        node: context(node, {"partition-id": node - 1, "num-partitions": clients})
        for node in range(1, clients + 1)
    }
    grid = LocalGrid(task_code.load_client_app(Path(task.path), task.app["clientapp"]), contexts)
    if with_absent_client:
        grid.absent = {clients}
    task_code.load_server_app(Path(task.path), task.app["serverapp"])(grid, context(0, {}))
    return grid


def metrics_of(grid: LocalGrid, name: str) -> list[float]:
    """Return the metric *name* of every reply that has it, in order."""
    values: list[float] = []
    for reply in grid.replies:
        record = reply.content["metrics"]
        assert isinstance(record, MetricRecord)
        if name in record:
            value = record[name]
            assert isinstance(value, int | float)
            values.append(value)
    return values


# --- the benchmark's app -----------------------------------------------------------------------------


def test_the_app_of_the_round_benchmarks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With turns, it reads a pipe after each round, here a regular file."""
    monkeypatch.setenv("NOOP_STAMPS", str(tmp_path / "stamps"))
    monkeypatch.setenv("NOOP_TURNS", str(tmp_path / "turns"))
    (tmp_path / "turns").touch()
    task = read_task(ROOT / "benchmarks" / "noop_app", open_library)
    run_locally(task, clients=2, num_server_rounds=3)
    lines = (tmp_path / "stamps").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]


# --- the app --------------------------------------------------------------------------------------


def test_the_example_is_valid_and_does_not_import_fedbus() -> None:
    assert validate_task(MNIST, open_library) == []
    for source in (MNIST / "mnist_app").glob("*.py"):
        assert "fedbus." not in source.read_text()


def test_the_clients_learn(folder: str) -> None:
    grid = run_locally(read_task(MNIST, open_library), num_server_rounds=3, max_samples=4000)
    accuracies = metrics_of(grid, "eval_accuracy")
    assert accuracies[-1] > 0.88
    assert accuracies[-1] > accuracies[0]
    losses = metrics_of(grid, "train_loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam", "krum"])
def test_each_strategy_can_be_configured_and_learns(folder: str, strategy: str) -> None:
    grid = run_locally(
        read_task(MNIST, open_library), num_server_rounds=3, max_samples=1000, strategy=strategy
    )
    assert metrics_of(grid, "eval_accuracy")[-1] > 0.6
    configs = [message.content["config"] for message in grid.sent if message.metadata.message_type == "train"]
    for config in configs:
        assert isinstance(config, ConfigRecord)
        assert ("proximal-mu" in config) == (strategy == "fedprox")


def test_an_unknown_strategy_is_rejected(folder: str) -> None:
    with pytest.raises(ValueError, match="choose one of fedavg, fedprox, fedadam, krum"):
        run_locally(read_task(MNIST, open_library), strategy="fedmagic")


def test_fedprox_keeps_clients_near_the_global_model(folder: str) -> None:
    """A stronger proximal term lets a client learn less in one round."""

    def losses(mu: float) -> list[float]:
        settings: dict[str, Any] = {
            "strategy": "fedprox",
            "num_server_rounds": 1,
            "max_samples": 500,
            "proximal_mu": mu,
        }
        return metrics_of(run_locally(read_task(MNIST, open_library), **settings), "train_loss")

    weak, strong = losses(0.001), losses(10.0)
    assert np.mean(strong) > np.mean(weak)


def test_two_of_three_clients_can_train(folder: str) -> None:
    grid = run_locally(
        read_task(MNIST, open_library), num_server_rounds=1, max_samples=100, with_absent_client=True
    )
    assert len(metrics_of(grid, "train_loss")) == 2


def test_a_client_trains_on_the_captured_data_of_its_device(
    folder: str, data: ModuleType, tmp_path: Path
) -> None:
    inputs, labels = (part[:40] for part in data.samples(0, 3))
    np.savez(tmp_path / "captured.npz", inputs=inputs, labels=labels)
    task = read_task(MNIST, open_library)
    app = task_code.load_client_app(MNIST, task.app["clientapp"])
    context = Context(
        1,
        1,
        node_config={"partition-id": 0, "num-partitions": 3, "captured-data": str(tmp_path / "captured.npz")},
        state=RecordDict(),
        run_config={**task.run_config, "max-samples": 100},
    )
    grid = run_locally(task, num_server_rounds=1, max_samples=100)
    reply = app(grid.sent[0], context)
    record = reply.content["metrics"]
    assert isinstance(record, MetricRecord)
    assert record["num-examples"] == 140
    (tmp_path / "captured.npz").unlink()
    record = app(grid.sent[0], context).content["metrics"]
    assert isinstance(record, MetricRecord)
    assert record["num-examples"] == 100


# --- data --------------------------------------------------------------------------------------------


def test_mnist_is_used_if_it_is_available(folder: str, data: ModuleType) -> None:
    if not folder:
        pytest.skip("MNIST is not on this machine")
    loaded = data.load(folder)
    assert loaded.source == "MNIST"
    assert (len(loaded.train[1]), len(loaded.test[1])) == (60_000, 10_000)
    assert np.bincount(loaded.test[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_the_fallback_digits_have_the_shape_of_mnist(data: ModuleType, tmp_path: Path) -> None:
    loaded = data.load(str(tmp_path))
    assert loaded.source == "scikit-learn digits"
    inputs, labels = data.partition(0, 3, data=str(tmp_path))
    assert inputs.shape == (len(labels), 784)
    assert (inputs.min(), inputs.max(), inputs.dtype) == (0.0, 1.0, np.float32)


def test_a_corrupt_file_is_named(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    for name in data.FILES:
        (tmp_path / "mnist" / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x0d\x01 not bytes"))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not a valid idx file"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_every_sample_is_live_or_in_exactly_one_partition(
    data: ModuleType, tmp_path: Path, alpha: float
) -> None:
    total = len(data.load(str(tmp_path)).train[1])
    live, _ = data._split(total)
    indices = np.concatenate([*data._partition_indices(str(tmp_path), 5, alpha), live])
    assert sorted(indices.tolist()) == list(range(total))


def test_a_partition_is_reproducible(data: ModuleType, tmp_path: Path) -> None:
    first = data.partition(2, 5, data=str(tmp_path), alpha=0.5)
    data._partition_indices.cache_clear()
    second = data.partition(2, 5, data=str(tmp_path), alpha=0.5)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_a_smaller_alpha_gives_more_label_skew(data: ModuleType, tmp_path: Path) -> None:
    def share_of_commonest(alpha: float) -> float:
        parts = [data.partition(n, 4, data=str(tmp_path), alpha=alpha)[1] for n in range(4)]
        return float(np.mean([np.bincount(labels).max() / len(labels) for labels in parts]))

    assert share_of_commonest(0.1) > share_of_commonest(1.0) > share_of_commonest(0.0)


# --- Flower's simulation --------------------------------------------------------------------------------


def configure(home: Path, port: int) -> None:
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )


@asynccontextmanager
async def superlink(home: Path) -> AsyncIterator[dict[str, str]]:
    """Run Flower's SuperLink for simulations. Yields the environment in which ``flwr run`` finds it as ``local``."""
    port = free_port()
    configure(home, port)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    arguments = (
        *(
            "--insecure",
            "--simulation",
            "--isolation",
            "subprocess",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ),
        *("--control-api-address", f"127.0.0.1:{free_port()}", "--disable-runtime-dependency-installation"),
    )
    with (home / "superlink.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *("flower-superlink", *arguments), env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            await eventually(lambda: is_listening(port), within_s=60)
            yield environment
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            await process.wait()


async def is_listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def flwr_run(app: Path, environment: dict[str, str], *config: str) -> str:
    """Run ``flwr run`` to its end, and return its output."""
    process = await asyncio.create_subprocess_exec(
        *("flwr", "run", str(app), "local", "--stream", "--run-config", " ".join(config)),
        *("--federation-config", "num-supernodes=3 client-resources-num-cpus=1"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


def assert_all_succeeded(output: str) -> None:
    assert "aggregate_train: Received 3 results and 0 failures" in output
    assert "aggregate_evaluate: Received 3 results and 0 failures" in output
    assert "ServerApp-side Evaluate Metrics" in output


@pytest.mark.slow
async def test_the_example_runs_in_flowers_simulation(folder: str, tmp_path: Path) -> None:
    async with superlink(tmp_path / "flwr") as environment:
        assert_all_succeeded(await flwr_run(MNIST, environment, "num-server-rounds=1", "max-samples=200"))


@pytest.mark.slow
async def test_a_new_task_runs_in_flowers_simulation(tmp_path: Path) -> None:
    create_task(tmp_path / "moons", "moons")
    async with superlink(tmp_path / "flwr") as environment:
        assert_all_succeeded(await flwr_run(tmp_path / "moons", environment, "num-server-rounds=1"))


def test_a_new_task_learns(tmp_path: Path) -> None:
    create_task(tmp_path / "fresh", "fresh")
    grid = run_locally(read_task(tmp_path / "fresh", open_library), num_server_rounds=8)
    assert metrics_of(grid, "eval_accuracy")[-1] > 0.9  # two classes; the initial weights are random
