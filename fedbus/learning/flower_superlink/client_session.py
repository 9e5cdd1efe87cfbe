"""The client side of a run over a SuperLink: it runs a SuperNode, which starts a process for each message."""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fedbus.contracts.run import Scalar
from fedbus.contracts.task.superlink import LOOPBACK
from fedbus.learning.flower_superlink.bundle import to_toml
from fedbus.learning.flower_superlink.certificate import make_node_key
from fedbus.learning.flower_superlink.client_app import BAD_TASK_EXIT_CODE, task_environment
from fedbus.learning.flower_superlink.flower_process import (
    FlowerProcess,
    find_free_port,
    flower_environment,
)
from fedbus.learning.flower_superlink.messages import KEY_KIND, WATCH_KIND, NodeKey, WatchRequest
from fedbus.learning.library import BadTask, ClientJob, ClientResponse, ErrorCode, IncomingMessage, ReplyError

RECONNECT_S: Final = 20.0
"""The limit for which a SuperNode tries to reach the SuperLink, at its start and later, in seconds."""
PROGRAMS: Final = ("flower-superexec", "flwr-clientapp")
"""The programs that a SuperNode starts."""
CONNECTED: Final = "SuperNode ID:"
"""The output of a SuperNode that has connected."""
GIVES_UP: Final = "Giving up reconnection"
"""Its output when it has not reached the SuperLink for `RECONNECT_S`. If it was connected before, it tries again."""
CONNECTION_FAILED: Final = "Failed to initialize the connection"
"""Its output when it ends because it never was connected."""


class SuperNodeClient:
    """The client side of one run on one device. Raises BadTask if the ClientApp cannot be loaded."""

    def __init__(self, job: ClientJob) -> None:
        self._job = job
        self._environment = task_environment(job.path, job.task.app["clientapp"], job.task.table.compression)
        self._directory = tempfile.TemporaryDirectory(prefix="fedbus-supernode-")
        self._path = Path(self._directory.name)
        self._node: FlowerProcess | None = None
        self._request: WatchRequest | None = None
        """The last request; the running SuperNode is for its SuperLink."""
        try:
            self._check_client_app()
        except BaseException:
            self._directory.cleanup()
            raise

    def handle(self, message: IncomingMessage) -> ClientResponse:
        match message.kind:
            case kind if kind == KEY_KIND:
                self._stop_node()
                key = NodeKey(public_key=make_node_key(self._path / "node.key"))
                return ClientResponse(payload=key.pack())
            case kind if kind == WATCH_KIND:
                return self._watch(WatchRequest.unpack(message.data), message.node_config)
            case kind:
                return _make_error(
                    f"unknown message of kind {kind!r}; both sides need the same version of fedbus"
                )

    def close(self) -> None:
        """End the SuperNode with all processes that it started."""
        self._stop_node()
        self._directory.cleanup()

    def _watch(self, request: WatchRequest, node_config: Mapping[str, Scalar]) -> ClientResponse:
        node = self._node
        if node is None or request != self._request:
            self._stop_node()
            node = self._node = self._start_node(request, node_config)
            self._request = request
        if not node.wait(request.wait_s):
            return ClientResponse(train_s=0.0)
        self._node = None
        return _make_error(self._describe_end(node, request.address))

    def _start_node(self, request: WatchRequest, node_config: Mapping[str, Scalar]) -> FlowerProcess:
        certificate, config = self._path / "superlink.pem", self._path / "node.toml"
        certificate.write_text(request.certificate, encoding="ascii")
        config.write_text(to_toml(node_config), encoding="utf-8")
        options = {
            "--superlink": request.address,
            "--root-certificates": str(certificate),
            "--auth-supernode-private-key": str(self._path / "node.key"),
            "--node-config": str(config),
            "--host": LOOPBACK,
            "--port": str(find_free_port(LOOPBACK)),
            "--max-wait-time": str(RECONNECT_S),
        }
        arguments = [part for option in options.items() for part in option]
        return FlowerProcess(
            "supernode",
            arguments,
            directory=self._path,
            environment=self._environment,
            markers=(CONNECTION_FAILED,),
            end_markers=(CONNECTED, GIVES_UP),
        ).start()

    def _stop_node(self) -> None:
        if self._node is not None:
            self._node.stop()
        self._node = None

    def _describe_end(self, node: FlowerProcess, address: str) -> str:
        if {CONNECTED, GIVES_UP} <= node.printed:
            return f"the SuperNode has not reached the SuperLink at {address} for {RECONNECT_S:g} s"
        if CONNECTION_FAILED in node.printed:
            return (
                f"the SuperNode cannot connect to the SuperLink at {address} ({node.describe_exit()}). "
                "Set `address` in [tool.fedbus.superlink] to a host that this device reaches, and open `port` to it"
            )
        return f"the SuperNode ended: {node.describe_exit()}"

    def _check_client_app(self) -> None:
        """Import the ClientApp in another process, so that its libraries do not stay in the memory of this one.

        It may take as long as a run waits for a client that imports the app. It ends with this process.
        """
        path = flower_environment(self._path)["PATH"]
        missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
        if missing:
            raise BadTask(
                f"Flower's program {missing[0]!r} is not next to {sys.executable} and not on the PATH. "
                "Install flwr in the same environment as fedbus"
            )
        limit_s = self._job.plan.recruit_s + self._job.plan.round_s
        problem = self._path / "problem.txt"
        check = FlowerProcess(
            "check", [str(problem)], directory=self._path, environment=self._environment, stop_s=0.0
        )
        with check:
            if not check.wait(limit_s):
                raise BadTask(
                    f"the import of the ClientApp did not end in time (limit {limit_s:g} s, recruit-s and round-s)"
                )
        if check.exit_code == BAD_TASK_EXIT_CODE:
            raise BadTask(problem.read_text(encoding="utf-8"))
        if check.exit_code != 0:
            raise BadTask(f"the import of the ClientApp ended: {check.describe_exit()}")


def _make_error(reason: str) -> ClientResponse:
    return ClientResponse(error=ReplyError(ErrorCode.UNKNOWN, reason, kind="SuperNode"))
