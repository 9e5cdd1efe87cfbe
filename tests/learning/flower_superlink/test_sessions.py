"""A run over Flower's own SuperLink and SuperNodes, from the server's session to the clients'."""

import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import AF_INET
from textwrap import dedent
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from learning.flower_superlink.session_messenger import SessionMessenger
from support.processes import descendants_of

from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.task.compression import CompressionTable
from fedbus.contracts.task.superlink import LOOPBACK, SuperLinkTable, is_loopback
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning.flower_superlink.client_session import SuperNodeClient
from fedbus.learning.flower_superlink.server_session import SuperLinkServer
from fedbus.learning.flower_superlink.superlink import SuperLink, SuperLinkEnded
from fedbus.learning.library import BadTask, ClientJob, NotEnoughClients, ServerJob, TrainingFailed
from fedbus.learning.weights import Arrays

SERVER = """
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    app = ServerApp()
    @app.main()
    def main(grid, context):
        strategy = FedAvg(min_available_nodes=2, min_train_nodes=2, min_evaluate_nodes=2)
        initial = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=2)
"""
CLIENT = """
    import numpy as np, os, signal
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    app = ClientApp()
    @app.train()
    def train(message, context):
        state = context.state.get("calls") or ConfigRecord({"n": 0})
        context.state["calls"] = ConfigRecord({"n": state["n"] + 1})
        if context.node_config["step"] == 0:
            raise ValueError("no data")
        array = message.content["arrays"]["w"].numpy() + context.node_config["step"] * context.run_config["scale"]
        metrics = MetricRecord({"num-examples": 10, "loss": 1.0, "calls": state["n"] + 1})
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(array)}), "metrics": metrics}), reply_to=message)
    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 5, "loss": 2.0})}), reply_to=message)
"""


class SuperLinkFederation:
    """A server session in a thread, and client sessions."""

    def __init__(
        self,
        path: Path,
        *,
        plan: RunPlan,
        superlink: SuperLinkTable,
        client: str = CLIENT,
        compression: str = "none",
    ) -> None:
        (path / "my_server.py").write_text(dedent(SERVER))
        (path / "my_client.py").write_text(dedent(client))
        self.task = Task(
            table=TaskTable(
                task="demo",
                library="flower-superlink",
                superlink=superlink,
                compression=CompressionTable.model_validate(compression),
            ),
            app={"serverapp": "my_server:app", "clientapp": "my_client:app"},
            run_config={"scale": 0.5, "num-server-rounds": 2},
            code_version="c1",
            path=str(path),
        )
        self.messenger = SessionMessenger(plan)
        self.results: list[RoundResult] = []
        self.sessions: list[SuperNodeClient] = []
        self.outcome: Arrays | BaseException | None = None

    def add(self, client: str, **node_config: float | str) -> SuperNodeClient:
        session = SuperNodeClient(
            ClientJob(task=self.task, client=client, run="r1", plan=self.messenger.plan)
        )
        self.sessions.append(session)
        self.messenger.join(client, session, **node_config)
        return session

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        return thread

    def run(self) -> Arrays:
        self.start().join(240)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    def _run(self) -> None:
        model = {"w": np.ones(3, np.float32)}
        job = ServerJob(task=self.task, run="r1", plan=self.messenger.plan, model=model)
        try:
            self.outcome = SuperLinkServer(job).run(
                self.messenger, lambda result, _: self.results.append(result)
            )
        except BaseException as error:  # noqa: BLE001 - the test's thread reads it
            self.outcome = error


@contextmanager
def open_federation(
    path: Path,
    *,
    rounds: int = 2,
    quorum: int = 2,
    recruit_s: float = 60.0,
    round_s: float = 60.0,
    client: str = CLIENT,
    compression: str = "none",
    **table: Any,
) -> Iterator[SuperLinkFederation]:
    plan = RunPlan(rounds=rounds, quorum=quorum, recruit_s=recruit_s, round_s=round_s)
    federation = SuperLinkFederation(
        path, plan=plan, superlink=SuperLinkTable(**table), client=client, compression=compression
    )
    before = set(psutil.Process().children(recursive=True))
    try:
        yield federation
    finally:
        federation.messenger.close()
        for session in federation.sessions:
            session.close()
        _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=60)
        assert not alive, "a process of Flower is left"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.05")
    monkeypatch.setattr("fedbus.learning.flower_superlink.grid.PULL_PAUSE_S", 0.2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_trains_over_a_superlink(tmp_path: Path) -> None:
    with open_federation(tmp_path, address=own_address()) as federation:
        federation.add("c1", step=1)
        federation.add("c2", step=3)
        final = federation.run()

    np.testing.assert_allclose(final["w"], 3.0)  # twice the mean of 0.5 and 1.5, from ones
    assert [result.round for result in federation.results] == [0, 1, 2]
    last = federation.results[-1]
    assert last.participants == {"c1": 10, "c2": 10}
    assert last.figures["c1"]["eval_loss"] == 2.0
    assert last.metrics["train_calls"] == 2.0, "the state of the ClientApp is kept between rounds"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("by_mod", [True, False])
def test_updates_are_compressed_over_a_superlink(tmp_path: Path, by_mod: bool) -> None:
    mods = "from fedbus.learning.flower.mods import top_k\n    app = ClientApp(mods=[top_k()])"
    client = CLIENT.replace("app = ClientApp()", mods) if by_mod else CLIENT
    with open_federation(tmp_path, client=client, compression="none" if by_mod else "top-k") as federation:
        federation.add("c1", step=1)
        federation.add("c2", step=3)
        final = federation.run()

    assert all(not result.failures for result in federation.results)
    # top-k sends one value of three in each round: the other two stay in the residual
    assert sorted(final["w"]) != pytest.approx([3.0, 3.0, 3.0])
    assert final["w"].sum() > 3.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_failing_client_app_is_a_failure_of_its_client(tmp_path: Path) -> None:
    with open_federation(tmp_path, rounds=1) as federation:
        federation.add("c1", step=1)
        federation.add("c2", step=0)
        final = federation.run()

    np.testing.assert_allclose(final["w"], 1.5)
    assert federation.results[-1].participants == {"c1": 10}
    assert "ClientApp raised ValueError: no data (my_client.py:" in federation.results[-1].failures["c2"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_supernode_that_is_killed_is_started_again(tmp_path: Path) -> None:
    client = CLIENT.replace(
        'raise ValueError("no data")',
        "os.killpg(os.getpgrp(), signal.SIGKILL)",  # SuperNode, SuperExec, and itself
    )
    with open_federation(tmp_path, client=client) as federation:
        federation.add("c1", step=1)
        federation.add("c2", step=0)
        federation.run()

    assert [result.failures.keys() for result in federation.results[1:]] == [{"c2"}, {"c2"}]
    assert "the SuperNode ended: killed by SIGKILL" in federation.results[1].failures["c2"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_superlink_that_dies_ends_the_session_for_recovery(tmp_path: Path) -> None:
    client = CLIENT.replace('raise ValueError("no data")', "import time; time.sleep(60)")
    with open_federation(tmp_path, client=client) as federation:
        federation.add("c1", step=0)
        federation.add("c2", step=0)
        thread = federation.start()
        wait_for(lambda: find_programs("flwr-clientapp"))
        for process in find_programs("superlink"):
            process.send_signal(signal.SIGKILL)
        thread.join(60)

    assert isinstance(federation.outcome, SuperLinkEnded)
    assert "ended: killed by SIGKILL" in str(federation.outcome)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_supernode_ends_after_its_superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.learning.flower_superlink.client_session.RECONNECT_S", 2.0)
    with open_federation(tmp_path, rounds=1, quorum=1) as federation:
        federation.add("c1", step=1)
        federation.add("c2", step=1)
        federation.run()
        wait_for(lambda: not find_programs("supernode"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_address_that_devices_cannot_reach_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.learning.flower_superlink.client_session.RECONNECT_S", 1.0)
    with open_federation(tmp_path, address="127.0.0.9", bind="127.0.0.1", quorum=1) as federation:
        federation.add("c1", step=1)
        with pytest.raises(NotEnoughClients) as error:
            federation.run()
    assert "c1 (the SuperNode cannot connect to the SuperLink at 127.0.0.9:" in str(error.value)
    assert "Set `address` in [tool.fedbus.superlink]" in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_other_machines_cannot_start_runs(tmp_path: Path) -> None:
    table = SuperLinkTable(address=own_address())
    if table.bind_address == LOOPBACK:
        pytest.skip("this machine has no address besides those of the loopback interface")
    with SuperLink(table, tmp_path) as link:
        context = ssl.create_default_context(cadata=link.certificate)
        url = f"https://{link.address}/v1/control/start-run"
        with pytest.raises(HTTPError, match="403"):
            urlopen(Request(url, data=b"", method="POST"), context=context)


def test_a_port_in_use_is_one_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            open_federation(tmp_path, port=port) as federation,
            pytest.raises(
                TrainingFailed, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"
            ),
        ):
            federation.run()


def test_a_client_app_that_cannot_be_imported_is_named_at_once(tmp_path: Path) -> None:
    with (
        open_federation(tmp_path, client="import no_such_package") as federation,
        pytest.raises(BadTask, match=r"'no_such_package', which is not installed"),
    ):
        federation.add("c1", step=1)


SLOW_IMPORT = """
    import subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("a loaded library", flush=True)
    time.sleep(600)
"""


def test_an_import_without_end_has_the_limit_of_a_run(tmp_path: Path) -> None:
    """Its processes end, too: `open_federation` checks it."""
    with open_federation(tmp_path, recruit_s=1.0, round_s=2.0, client=SLOW_IMPORT) as federation:
        start = time.monotonic()
        with pytest.raises(BadTask, match=r"import of the ClientApp did not end in time \(limit 3 s, "):
            federation.add("c1", step=1)
        assert 3 <= time.monotonic() - start < 20


def test_an_import_that_is_killed_names_the_signal(tmp_path: Path) -> None:
    client = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with (
        open_federation(tmp_path, client=client) as federation,
        pytest.raises(BadTask, match="import of the ClientApp ended: killed by SIGKILL"),
    ):
        federation.add("c1", step=1)


IMPORTER = """
    import sys
    from fedbus.contracts.task.task import Task
    from fedbus.learning.flower_superlink.client_session import SuperNodeClient
    from fedbus.learning.library import ClientJob
    SuperNodeClient(ClientJob(task=Task.model_validate_json(sys.argv[1]), client="c1", run="r1"))
"""


def test_an_import_ends_with_a_killed_parent(tmp_path: Path) -> None:
    with open_federation(tmp_path, client=SLOW_IMPORT) as federation:
        command = [sys.executable, "-c", dedent(IMPORTER), federation.task.model_dump_json()]
        with subprocess.Popen(command) as parent:
            wait_for(lambda: len(descendants_of(parent.pid)) >= 2)
            children = descendants_of(parent.pid)
            parent.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_missing_programs_of_flower_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with (
        open_federation(tmp_path) as federation,
        pytest.raises(BadTask, match=r"program 'flower-superexec' is not next to .* Install flwr"),
    ):
        federation.add("c1", step=1)


PARENT = """
    import sys, time
    from pathlib import Path
    from fedbus.contracts.task.superlink import SuperLinkTable
    from fedbus.contracts.task.task import Task
    from fedbus.learning.flower_superlink.client_session import SuperNodeClient
    from fedbus.learning.flower_superlink.messages import KEY_KIND, WATCH_KIND, KeyRequest, NodeKey, WatchRequest
    from fedbus.learning.flower_superlink.superlink import SuperLink
    from fedbus.learning.library import ClientJob, IncomingMessage
    task, directory = Task.model_validate_json(sys.argv[1]), Path(sys.argv[2])
    with SuperLink(SuperLinkTable(), directory) as link:
        client = SuperNodeClient(ClientJob(task=task, client="c1", run="r1"))
        request = IncomingMessage(message_id="1", kind=KEY_KIND, data=KeyRequest().pack().to_bytes())
        link.register_node(NodeKey.unpack(client.handle(request).payload.to_bytes()).public_key, "c1")
        watch = WatchRequest(address=link.address, certificate=link.certificate, wait_s=60)
        client.handle(IncomingMessage(message_id="2", kind=WATCH_KIND, data=watch.pack().to_bytes()))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_process_outlives_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a SuperLink and a SuperNode is killed; the files of the run are removed, too."""
    scratch, link_files = tmp_path / "scratch", tmp_path / "link"
    for directory in (scratch, link_files):
        directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with open_federation(tmp_path) as federation:
        arguments = (federation.task.model_dump_json(), str(link_files))
        with subprocess.Popen([sys.executable, "-c", dedent(PARENT), *arguments]) as parent:
            wait_for(lambda: find_programs("flower-superexec"))
            assert list(scratch.iterdir())
            children = descendants_of(parent.pid)
            parent.kill()
    assert len(children) >= 3
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert not link_files.exists()
    assert not list(scratch.iterdir())


def own_address() -> str:
    """Return an address of this machine by which other machines may reach it; else that of the loopback interface."""
    addresses = [
        one.address for family in psutil.net_if_addrs().values() for one in family if one.family == AF_INET
    ]
    return next((address for address in addresses if not is_loopback(address)), LOOPBACK)


def find_programs(name: str) -> list[psutil.Process]:
    """Return the descendants of this process with *name* in their command."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(part.endswith(name) for part in process.cmdline()):
                found.append(process)
    return found


def wait_for(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
