"""S3 and the dashboard over TLS, with certificates from `fedbus provision`."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from support.trusted_bus import TrustedBus
from typer.testing import CliRunner

from fedbus.app.cli.main import app
from fedbus.app.composition.dashboard import Dashboard
from fedbus.app.local.seaweedfs import embedded_s3
from fedbus.app.provision.certificates import make_authority, read_certificate
from fedbus.app.settings import InvalidSetting, Settings
from fedbus.contracts.permissions import Role
from fedbus.stores.errors import StoreUnavailable
from fedbus.stores.models.open import open_model_store


def served_certificate(bus: TrustedBus) -> tuple[Path, Path]:
    tls = bus.federation.nats_folder / "tls"
    return tls / "server.pem", tls / "server.key"


@asynccontextmanager
async def run_tls_proxy(port: int, certificate: Path, key: Path) -> AsyncIterator[int]:
    """Run a TLS proxy to *port* until the block ends, and yield its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(65536):
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_s3_over_tls_needs_the_ca_of_the_kit(
    bus: TrustedBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_authority("other", tmp_path / "other.pem", tmp_path / "other.key")
    async with embedded_s3(tmp_path / "s3") as s3, run_tls_proxy(s3.port, *served_certificate(bus)) as port:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        url = s3.store_url.replace(f"http://127.0.0.1:{s3.port}", f"https://localhost:{port}")
        assert "https" in url

        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "other.pem"))
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate|ssl"):
            await open_model_store(url, "mnist", patience_s=2).prepare()

        monkeypatch.setenv("AWS_CA_BUNDLE", str(bus.federation.ca_path))
        store = open_model_store(url, "mnist", patience_s=20)
        await store.prepare()
        assert await store.list_versions() == []


async def test_the_dashboard_uses_https_and_gateway_credentials(
    bus: TrustedBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    access = bus.access_for(Role.GATEWAY)
    settings = Settings.from_environment(
        {
            "FEDBUS_HOME": str(tmp_path / "home"),
            "FEDBUS_NATS_URL": bus.url,
            "FEDBUS_FEDERATION": "test",
            "FEDBUS_CREDS": str(access.creds),
            "FEDBUS_CA": str(access.ca),
        }
    )
    certificate, key = served_certificate(bus)
    dashboard = Dashboard(settings, allowed_hosts=["localhost"], certificate=certificate, key=key)
    stop = asyncio.Event()
    serving = asyncio.create_task(dashboard.serve(stop))
    try:
        async with asyncio.timeout(30):
            output = ""
            while "https://" not in output and not serving.done():
                await asyncio.sleep(0.05)
                output += capsys.readouterr().out
        url = next(line for line in output.splitlines() if "dashboard is on" in line).rpartition(" ")[2]
        async with (
            aiohttp.ClientSession() as session,
            session.get(url.replace("127.0.0.1", "localhost"), ssl=access.tls_context()) as page,
        ):
            assert page.status == 200
            assert "fedbus" in await page.text()
    finally:
        stop.set()
        await serving
    assert "Violation" not in bus.server.log.read_text()


def test_a_certificate_without_its_key_is_invalid(bus: TrustedBus, tmp_path: Path) -> None:
    settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path)})
    certificate, _ = served_certificate(bus)
    with pytest.raises(InvalidSetting, match="set both or none"):
        _ = Dashboard(settings, certificate=certificate).tls_context
    with pytest.raises(InvalidSetting, match="are not a certificate and its key"):
        _ = Dashboard(
            settings, certificate=certificate, key=bus.federation.folder / "tls" / "ca.key"
        ).tls_context


def test_another_server_has_a_certificate_for_its_names(bus: TrustedBus, tmp_path: Path) -> None:
    trust, out = str(bus.federation.folder), tmp_path / "s3"
    arguments = ["provision", "certificate", "--host", "s3", "--host", "127.0.0.1", "--out", str(out)]

    output = CliRunner().invoke(app, [*arguments, "--trust", trust])

    assert output.exit_code == 0, output.output
    certificate = read_certificate(out / "server.pem")
    certificate.verify_directly_issued_by(read_certificate(bus.federation.ca_path))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["s3"]
    assert (out / "server.key").stat().st_mode & 0o777 == 0o600
