"""The SuperLink of one run: its keys, its process, and its run."""

import secrets
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fedbus.contracts.task.superlink import LOOPBACK, SuperLinkTable
from fedbus.learning.flower_superlink.certificate import make_server_certificate, write_private
from fedbus.learning.flower_superlink.flower_process import FlowerProcess, family_of, find_free_port
from fedbus.learning.flower_superlink.private_api import HttpGrid, SuperLinkClient
from fedbus.learning.library import TrainingFailed

START_S: Final = 60.0
"""The limit of the time until a SuperLink accepts connections."""
STOP_S: Final = 1.0
"""The limit of the time for a clean shutdown, in which a SuperLink only waits for the connections of SuperNodes."""
CONNECT_PAUSE_S: Final = 0.2
MAX_NODE_NAME_CHARS: Final = 63


class SuperLinkEnded(RuntimeError):
    """The SuperLink ended during the run. The run is recovered, as after any loss of its server side."""


class SuperLink:
    """The SuperLink of a run for the duration of a block. *directory* is for its files.

    Raises:
        TrainingFailed: at the start of the block, if it cannot listen.

    """

    def __init__(self, table: SuperLinkTable, directory: Path) -> None:
        self._table = table
        self._directory = directory
        self._certificate = directory / "superlink.pem"
        self._port = table.port or find_free_port(table.bind_address)
        self._process: FlowerProcess | None = None
        self._client: SuperLinkClient | None = None
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """The address that devices use."""
        return f"{_in_url(self._table.address)}:{self._port}"

    @property
    def certificate(self) -> str:
        return self._certificate.read_text(encoding="ascii")

    def check_running(self) -> None:
        """Raise SuperLinkEnded if the process has ended."""
        if self._process is None or not self._process.is_running:
            how = self._process.describe_exit() if self._process else "not started"
            raise SuperLinkEnded(f"the SuperLink at {self.address} ended: {how}")

    def register_node(self, public_key: str, name: str) -> int:
        """Allow a SuperNode to connect, and return its node id. Raises SuperLinkError."""
        with self._lock:
            return self._api.register_node(public_key.encode(), name[:MAX_NODE_NAME_CHARS])

    def unregister_node(self, node_id: int) -> None:
        """Remove a SuperNode that has ended. Raises SuperLinkError."""
        with self._lock:
            self._api.unregister_node(node_id)

    def start_run(self, bundle: bytes) -> HttpGrid:
        """Start a run of the app bundle, and return its Grid. Raises SuperLinkError."""
        return self._api.start_run(bundle)

    def finish_run(self) -> None:
        """Report the end of the ServerApp. Raises SuperLinkError."""
        self._api.finish_run()

    def __enter__(self) -> Self:
        self._check_port()
        key, secret_file, secret = (
            self._directory / "superlink.key",
            self._directory / "secret",
            secrets.token_bytes(),
        )
        make_server_certificate([self._table.address, LOOPBACK, "localhost"], self._certificate, key)
        write_private(secret_file, secret)
        options = {
            "--host": self._table.bind_address,
            "--port": str(self._port),
            "--isolation": "process",
            "--ssl-certfile": str(self._certificate),
            "--ssl-keyfile": str(key),
            "--ssl-ca-certfile": str(self._certificate),
            "--superexec-auth-secret-file": str(secret_file),
        }
        arguments = ["--enable-supernode-auth", *(part for option in options.items() for part in option)]
        self._process = FlowerProcess(
            "superlink", arguments, directory=self._directory, stop_s=STOP_S
        ).start()
        try:
            self._wait_until_listening()
            self._client = SuperLinkClient(
                self._local_address, certificate=self._certificate.read_bytes(), secret=secret
            )
        except BaseException:
            self._process.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client:
            self._client.close()  # first, since the SuperLink waits for open connections
        if self._process:
            self._process.stop()

    @property
    def _api(self) -> SuperLinkClient:
        assert self._client is not None, "the SuperLink was not started"
        return self._client

    @property
    def _local_host(self) -> str:
        bind = self._table.bind
        return bind if bind and bind not in {"0.0.0.0", "::"} else LOOPBACK  # noqa: S104 - a comparison

    @property
    def _local_address(self) -> str:
        return f"{_in_url(self._local_host)}:{self._port}"

    def _check_port(self) -> None:
        """Raise TrainingFailed if the address cannot be bound, which uvicorn reports less clearly."""
        try:
            with socket.create_server(
                (self._table.bind_address, self._port), family=family_of(self._table.bind_address)
            ):
                pass
        except OSError as error:
            raise TrainingFailed(
                f"the SuperLink cannot listen on {_in_url(self._table.bind_address)}:{self._port}: {error.strerror}. "
                "Correct `port` or `bind` in [tool.fedbus.superlink], or end the program that uses the port"
            ) from None

    def _wait_until_listening(self) -> None:
        assert self._process is not None
        for _ in range(int(START_S / CONNECT_PAUSE_S)):
            with socket.socket(family_of(self._local_host)) as probe:
                if probe.connect_ex((self._local_host, self._port)) == 0:
                    return
            if self._process.wait(CONNECT_PAUSE_S):
                raise TrainingFailed(f"the SuperLink did not start: {self._process.describe_exit()}")
        raise TrainingFailed(f"the SuperLink did not start within {START_S:g} s")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
