"""The embedded S3: a real SeaweedFS, started, watched and stopped by fedbus.

    async with embedded_s3(directory) as s3:
        ...  # s3.store_url is a model repository; s3.environment opens it

How it is kept stands in `keeper`. Its only key is made at the first start and lies in the
directory, in a file for its owner alone; its one bucket is there by the time the block begins.
Who has no key reads nothing, unless the models are to be public: then anybody who reaches the
endpoint may read artifacts and manifests, and still neither list nor write.

What is left to others: an S3 of one's own, see `--store s3://…`; access from other machines.
"""

import json
import os
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
from fedbus.stores.errors import StoreDenied

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
"""Where the parts of SeaweedFS find each other."""
OPTIONS: Final = {
    "ip": HOST,  # else it takes the address of the host
    "ip.bind": HOST,
    "master.telemetry": "false",
    "webdav": "false",
    "admin.ui": "false",
    "s3.iam": "false",
    "s3.port.iceberg": "0",
    "s3.port.lance": "0",
    "s3.autoCreateBucket": "false",  # a mistaken name is an error
    "volume.preStopSeconds": "0",
}
SOCKET_DIRECTORY: Final = Path("/tmp")  # noqa: S108 (its choice, not ours)
MAX_SOCKET_PATH: Final = 100


class SeaweedMissing(ProgramMissing):
    def __init__(self) -> None:
        super().__init__(
            PROGRAM,
            "pip install 'fedbus[s3]', or give an S3 that runs: --store 's3://bucket/prefix?endpoint=…'",
        )


@dataclass
class EmbeddedS3(RunningProgram):
    """A SeaweedFS that answers, and will again if it dies."""

    internal_ports: dict[str, int]
    credentials: Path
    """Its key, as AWS writes them; for this user alone."""

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def store_url(self) -> str:
        return f"s3://{BUCKET}/{PREFIX}?endpoint={self.endpoint}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to open the repository: the name of a file, and no secret."""
        return {CREDENTIALS_FILE: str(self.credentials)}


@asynccontextmanager
async def embedded_s3(
    directory: Path, port: int | None = None, *, public_models: bool = False
) -> AsyncIterator[EmbeddedS3]:
    """A SeaweedFS in *directory*, on *port* or one that is free, for as long as the block runs.

    Raises an EmbeddedError: at the start, or out of the block when it keeps dying.
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
    """The SeaweedFS to run: the one installed with fedbus, else the one on PATH; raises WeedMissing."""
    found = find_program(PROGRAM)
    if found is None:
        raise SeaweedMissing
    return found


async def _create_bucket(running: EmbeddedS3, *, public_models: bool) -> None:
    from fedbus.stores.s3.bucket import Bucket, BucketAddress  # noqa: PLC0415 (needs the extra, and a second)
    from fedbus.stores.s3.public_access import set_public  # noqa: PLC0415

    bucket = Bucket(BucketAddress.parse(running.store_url), credentials=running.credentials)
    async with bucket.open():
        await bucket.make()
        await set_public(bucket, public=public_models)


def _remove_sockets(ports: list[int]) -> None:
    """Remove the sockets that it makes in /tmp, named by our ports, and leaves there (4.48)."""
    for port in ports:
        for left in SOCKET_DIRECTORY.glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


# --- SeaweedFS -----------------------------------------------------------------------------------


class _SeaweedProgram:
    """How SeaweedFS is started, and seen to answer."""

    name = "SeaweedFS"
    environment: Mapping[str, str] = MappingProxyType({})

    def __init__(self, program: Path, home: ProgramDirectory) -> None:
        self.home = home
        self._program = program
        self._data = home.directory / "data"
        self._ports = home.directory / "ports.json"
        self._identity = home.directory / "identity.json"
        self._credentials = home.directory / "credentials"

    def placed(self, port: int | None) -> EmbeddedS3:
        """All ports as before, where they are free: its parts know each other by them."""
        before = self._kept_ports()
        inner = {name: choose_port(None, before.get(name)) for name in INTERNAL_PORTS}
        while len(set(inner.values())) < len(inner):
            inner = {name: find_free_port() for name in INTERNAL_PORTS}
        _write_private(self._ports, json.dumps(inner))
        return EmbeddedS3(
            port=choose_port(port, self.home.kept_port), internal_ports=inner, credentials=self._credentials
        )

    def command(self, running: EmbeddedS3) -> tuple[str, ...]:
        self._data.mkdir(mode=0o700, exist_ok=True)
        (self._data / "mini.options").unlink(missing_ok=True)  # it would remember what it was told before
        self._write_identity()
        options = {
            "dir": self._data,
            "s3.config": self._identity,
            "s3.port": running.port,
            **OPTIONS,
            **running.internal_ports,
            **self._sockets(),
        }
        told = (f"-{name}={value}" for name, value in options.items())
        return (
            str(self._program),
            "-logtostderr",
            "mini",
            *told,
        )  # else it leaves files in the system's /tmp, too

    async def answers(self, running: EmbeddedS3) -> bool:
        greeting = await read_reply(
            running.port, f"GET / HTTP/1.0\r\nHost: {HOST}\r\n\r\n".encode(), end=b"\r\n\r\n"
        )
        if b"SeaweedFS" not in greeting:
            return False
        return await self._takes_our_key(running)

    async def _takes_our_key(self, running: EmbeddedS3) -> bool:
        """Whether it is ours: another's would not know our key."""
        from fedbus.stores.s3.bucket import Bucket, BucketAddress  # noqa: PLC0415 (needs the extra, and a second)

        address = BucketAddress.parse(running.store_url)
        try:
            await Bucket(address, patience_s=2.0, credentials=running.credentials).make()
        except StoreDenied:
            return False
        return True

    def _kept_ports(self) -> dict[str, int]:
        try:
            found = json.loads(self._ports.read_text())
        except (OSError, ValueError):
            return {}
        return {name: port for name, port in found.items() if isinstance(port, int) and is_port_free(port)}

    def _write_identity(self) -> None:
        """The one key there is, made at the first start; for SeaweedFS and, as AWS writes it, for its users."""
        if self._identity.exists() and self._credentials.exists():
            return
        key, secret = f"fedbus{secrets.token_hex(8)}", secrets.token_urlsafe(32)
        identity = {
            "name": "fedbus",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        _write_private(
            self._credentials, f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        )
        _write_private(self._identity, json.dumps({"identities": [identity]}))

    def _sockets(self) -> dict[str, Path]:
        """Its sockets in our directory, where the system takes so long a name; else in /tmp, as it is used to."""
        sockets = {f"{part}.localSocket": self.home.directory / f"{part}.sock" for part in ("s3", "filer")}
        return sockets if all(len(str(path)) < MAX_SOCKET_PATH for path in sockets.values()) else {}


def _write_private(path: Path, content: str) -> None:
    """A file for its owner alone, from its first moment, and whole or not there."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    part.replace(path)
