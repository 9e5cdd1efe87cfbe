"""The embedded S3: SeaweedFS as a supervised child process.

    async with embedded_s3(directory) as s3:
        ...  # s3.store_url is a model repository; s3.environment has its credentials

`supervisor` restarts it. The first start creates an access key in the directory, in a file with mode 600, and a
bucket. Access without a key is denied. With *public_models*, everyone who can connect to the endpoint may read
artifacts and manifests, but not list or write.

It listens on the loopback interface only. For access from other machines, use another S3: `--store s3://…`.
"""

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fedbus.app.local.supervisor import (
    HOST,
    ProgramDirectory,
    ProgramMissing,
    RunningProgram,
    choose_port,
    find_free_port,
    find_program,
    is_port_free,
    read_reply,
    supervised,
)
from fedbus.common.filesystem import atomic_write
from fedbus.stores.errors import StoreError

PROGRAM: Final = "weed"
BUCKET: Final = "fedbus"
PREFIX: Final = "models"
CREDENTIALS_FILE: Final = "FEDBUS_S3_CREDENTIALS"
INTERNAL_PORTS: Final = (
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
"""Ports between the components of SeaweedFS."""
OPTIONS: Final = {
    "ip": HOST,  # default: the address of the host
    "ip.bind": HOST,
    "master.telemetry": "false",
    "webdav": "false",
    "admin.ui": "false",
    "s3.iam": "false",
    "s3.port.iceberg": "0",
    "s3.port.lance": "0",
    "s3.autoCreateBucket": "false",  # so that a wrong bucket name is an error
    "volume.preStopSeconds": "0",
}
SOCKET_DIRECTORY: Final = Path("/tmp")  # noqa: S108 (its choice, not ours)
MAX_SOCKET_PATH: Final = 100


class SeaweedMissing(ProgramMissing):
    def __init__(self) -> None:
        super().__init__(
            PROGRAM,
            "Run pip install 'fedbus[s3]', or use a running S3: --store 's3://bucket/prefix?endpoint=…'",
        )


@dataclass
class EmbeddedS3(RunningProgram):
    """A running SeaweedFS, which is restarted if it dies."""

    internal_ports: dict[str, int]
    credentials: Path
    """AWS credentials file, mode 600."""

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def store_url(self) -> str:
        return f"s3://{BUCKET}/{PREFIX}?endpoint={self.endpoint}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a process needs to open the repository. They contain no secret."""
        return {CREDENTIALS_FILE: str(self.credentials)}


@asynccontextmanager
async def embedded_s3(
    directory: Path, port: int | None = None, *, public_models: bool = False
) -> AsyncIterator[EmbeddedS3]:
    """Run SeaweedFS in *directory*, on *port* or a free one, until the block ends.

    Raises:
        EmbeddedError: It does not start, or later crashes again and again.

    """
    used: list[int] = []
    try:
        async with supervised(
            _SeaweedProgram(find_seaweedfs(), ProgramDirectory(directory, "weed")), port
        ) as running:
            used += [running.port, *running.internal_ports.values()]
            await _create_bucket(running, public_models=public_models)
            yield running
    finally:
        _remove_sockets(used)


def find_seaweedfs() -> Path:
    """Find the SeaweedFS that was installed with fedbus, else the one on PATH.

    Raises:
        SeaweedMissing: There is none.

    """
    found = find_program(PROGRAM)
    if found is None:
        raise SeaweedMissing
    return found


async def _create_bucket(running: EmbeddedS3, *, public_models: bool) -> None:
    from fedbus.stores.s3.bucket import Bucket, BucketAddress  # noqa: PLC0415 (needs the extra, and a second)
    from fedbus.stores.s3.public_access import set_public  # noqa: PLC0415 (needs the extra)

    bucket = Bucket(BucketAddress.parse(running.store_url), credentials=running.credentials)
    async with bucket.open():
        await bucket.create_bucket()
        await set_public(bucket, public=public_models)


def _remove_sockets(ports: list[int]) -> None:
    """Remove the sockets that SeaweedFS (4.48) creates in /tmp, named by port, and does not remove."""
    for port in ports:
        for left in SOCKET_DIRECTORY.glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


# --- SeaweedFS -----------------------------------------------------------------------------------


class _SeaweedProgram:
    """The command of SeaweedFS, and its readiness check."""

    name = "SeaweedFS"
    environment: Mapping[str, str] = MappingProxyType({})

    def __init__(self, program: Path, home: ProgramDirectory) -> None:
        self.home = home
        self._program = program
        self._data = home.directory / "data"
        self._ports_file = home.directory / "ports.json"
        self._identity_file = home.directory / "identity.json"
        self._credentials_file = home.directory / "credentials"

    def allocate_ports(self, port: int | None) -> EmbeddedS3:
        """Reuse the ports of the last start if they are free: the components store them."""
        before = self._load_ports()
        inner = {name: choose_port(None, before.get(name)) for name in INTERNAL_PORTS}
        while len(set(inner.values())) < len(inner):
            inner = {name: find_free_port() for name in INTERNAL_PORTS}
        atomic_write(self._ports_file, json.dumps(inner))
        return EmbeddedS3(
            port=choose_port(port, self.home.saved_port),
            internal_ports=inner,
            credentials=self._credentials_file,
        )

    def build_command(self, running: EmbeddedS3) -> tuple[str, ...]:
        self._data.mkdir(mode=0o700, exist_ok=True)
        (self._data / "mini.options").unlink(missing_ok=True)  # it has the options of the last start
        self._write_identity()
        options = {
            "dir": self._data,
            "s3.config": self._identity_file,
            "s3.port": running.port,
            **OPTIONS,
            **running.internal_ports,
            **self._socket_options(),
        }
        arguments = (f"-{name}={value}" for name, value in options.items())
        return (
            str(self._program),
            "-logtostderr",  # default: log files in /tmp
            "mini",
            *arguments,
        )

    async def is_ready(self, running: EmbeddedS3) -> bool:
        greeting = await read_reply(
            running.port, f"GET / HTTP/1.0\r\nHost: {HOST}\r\n\r\n".encode(), end=b"\r\n\r\n"
        )
        if b"SeaweedFS" not in greeting:
            return False
        return await self._accepts_own_key(running)

    async def _accepts_own_key(self, running: EmbeddedS3) -> bool:
        """Return whether it accepts our key: another SeaweedFS, or a part of one, may have taken the port."""
        from fedbus.stores.s3.bucket import Bucket, BucketAddress  # noqa: PLC0415 (needs the extra, and a second)

        address = BucketAddress.parse(running.store_url)
        try:
            await Bucket(address, patience_s=2.0, credentials=running.credentials).create_bucket()
        except StoreError:
            return False
        return True

    def _load_ports(self) -> dict[str, int]:
        try:
            found = json.loads(self._ports_file.read_text())
        except (OSError, ValueError):
            return {}
        return {name: port for name, port in found.items() if isinstance(port, int) and is_port_free(port)}

    def _write_identity(self) -> None:
        """At the first start, create the access key: for SeaweedFS, and as an AWS credentials file."""
        if self._identity_file.exists() and self._credentials_file.exists():
            return
        key, secret = f"fedbus{secrets.token_hex(8)}", secrets.token_urlsafe(32)
        identity = {
            "name": "fedbus",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        atomic_write(
            self._credentials_file,
            f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n",
        )
        atomic_write(self._identity_file, json.dumps({"identities": [identity]}))

    def _socket_options(self) -> dict[str, Path]:
        """Put the sockets into our directory if the paths are short enough for a Unix socket, else into /tmp."""
        sockets = {f"{part}.localSocket": self.home.directory / f"{part}.sock" for part in ("s3", "filer")}
        return sockets if all(len(str(path)) < MAX_SOCKET_PATH for path in sockets.values()) else {}
