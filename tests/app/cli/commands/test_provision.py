"""`fedbus provision`, `context` and `doctor` as separate processes, with a real nats-server."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
from support import NatsServer
from support.cli import CliResult, clean_environment, run_fedbus
from support.federation import tiny_task
from support.ports import free_port
from support.trusted_bus import FED, ConfiguredNatsServer, TrustedBus, trusted_bus

from fedbus.agents.server_manager.state_registrar import serve_registrar
from fedbus.app.diagnostics.doctor import run_checks
from fedbus.app.diagnostics.services import check_agents
from fedbus.app.failures import ExitCode
from fedbus.app.finding import DoctorFinding, Severity
from fedbus.app.provision.certificates import make_authority, make_server_certificate, read_certificate
from fedbus.app.provision.credential_checks import (
    check_authority,
    check_credentials,
    check_server_certificate,
)
from fedbus.app.provision.federation import Federation
from fedbus.app.provision.nats_config import ServerLocation
from fedbus.app.settings import Settings, apply_kit
from fedbus.bus.bus import Bus, Identity, ServiceInfo
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.permissions import SERVER_ROLES, Role


def utc_now() -> datetime:
    return datetime.now(UTC)


class ProvisionCli:
    """Runs `fedbus …` in a separate process with its own working directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = clean_environment() | {
            "COLUMNS": "200",
            "XDG_CONFIG_HOME": str(directory / "config"),
        }

    def __call__(self, *words: str, **environment: str) -> CliResult:
        return run_fedbus(*words, environment=self.environment | environment, directory=self.directory)


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Reset the logging that `run_checks` configures in this process."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def fedbus(tmp_path: Path) -> ProvisionCli:
    return ProvisionCli(tmp_path)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[TrustedBus]:
    async with trusted_bus(tmp_path) as bus:
        yield bus


async def test_a_client_is_created_and_revoked(fedbus: ProvisionCli, tmp_path: Path) -> None:
    port = free_port()
    made = fedbus(
        "provision", "init", "--host", "localhost", "--port", str(port), FEDBUS_FEDERATION="hospitals"
    )
    assert made.code == 0, made.err
    assert "nats-server -c" in made.out
    trust = tmp_path / ".fedbus" / "trust"
    server = ConfiguredNatsServer(_listen_locally(trust, port), port)
    await server.start()
    try:
        created = fedbus("provision", "client", "ward-7")
        assert created.code == 0, created.err
        assert "SU" not in created.out
        kit = {"FEDBUS_KIT": str(tmp_path / "kits" / "ward-7")}
        well = fedbus("doctor", "--json", **kit)
        found = {one["what"]: one for one in well.facts}
        assert [found[what]["health"] for what in ("credentials", "authority", "certificate", "bus")] == [
            "well"
        ] * 4
        assert "valid until" in found["credentials"]["found"]

        assert "ward-7" in fedbus("provision", "list").out
        out = fedbus("provision", "revoke", "ward-7")
        assert (out.code, out.out) == (0, "the credentials of ward-7 are revoked\n"), out.err
        ill = fedbus("doctor", "--json", **kit)
        assert ill.code == ExitCode.FAILED
        found = {one["what"]: one for one in ill.facts}
        assert "revoked" in found["bus"]["found"]
        refused = fedbus("clients", "ls", **kit)
        assert refused.code == ExitCode.DENIED
        assert "rejected the connection" in refused.err
    finally:
        await server.stop()


def _listen_locally(trust: Path, port: int) -> Path:
    federation = Federation.open(trust)
    place = ServerLocation(federation.nats_folder, port, listen="127.0.0.1", monitor_port=free_port())
    return federation.write_server_files(place)


def test_a_device_creates_its_key_and_sends_the_public_part(fedbus: ProvisionCli, tmp_path: Path) -> None:
    fedbus("provision", "init")
    public = fedbus("provision", "key").out.strip()
    assert public.startswith("U")
    created = fedbus("provision", "client", "c1", "--public-key", public)
    assert "complete" in created.out
    done = fedbus("provision", "complete", "kits/c1", "--key", "device.nk")
    assert done.code == 0, done.err
    assert (
        check_credentials(tmp_path / "kits/c1/client.creds", utc_now() + timedelta(minutes=1)).health
        is Severity.OK
    )


@pytest.mark.parametrize("name", ["*", ">", "a.b", "C1", "server", "people", "c1 c2", "-c", ""])
def test_an_invalid_name_is_one_line_and_no_kit(fedbus: ProvisionCli, tmp_path: Path, name: str) -> None:
    Federation.create(tmp_path / ".fedbus" / "trust", FederationId("dev"), hosts=["localhost"], port=4222)
    refused = fedbus("provision", "client", "--", name)
    assert refused.code == ExitCode.USAGE
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "kits").exists()


def test_without_a_federation_each_command_explains_it(fedbus: ProvisionCli) -> None:
    for words in (("client", "c1"), ("list",), ("revoke", "c1"), ("rotate", "--tls"), ("push",)):
        refused = fedbus("provision", *words)
        assert refused.code == ExitCode.NOT_FOUND
        assert "Create one with fedbus provision init" in refused.err


def test_a_change_is_saved_if_nats_server_is_unreachable(fedbus: ProvisionCli) -> None:
    fedbus("provision", "init", "--port", str(free_port()))
    fedbus("provision", "client", "c1")
    out = fedbus("provision", "revoke", "c1")
    assert out.code == ExitCode.UNREACHABLE
    assert "the change is saved, but nats-server does not have it yet" in out.err
    assert "revoked" in fedbus("provision", "list").out


def test_rotate_tls_renews_the_server_certificate(fedbus: ProvisionCli, tmp_path: Path) -> None:
    fedbus("provision", "init")
    certificate = tmp_path / ".fedbus" / "trust" / "nats" / "tls" / "server.pem"
    before = read_certificate(certificate).serial_number
    assert fedbus("provision", "rotate", "--tls").code == 0
    assert read_certificate(certificate).serial_number != before


@pytest.mark.parametrize(
    "words",
    [
        ("--host", "*"),
        ("--host", "bad host"),
        ("--host", "\u00fcnicode"),
        ("--host", "bus.lab:4222"),
        ("--host", ""),
        ("--url", "foo"),
        ("--url", "tls://"),
        ("--url", "tls://bus lab:4222"),
        ("--url", "tls://bus.lab:0"),
    ],
)
def test_an_invalid_address_is_one_line_and_no_federation(
    fedbus: ProvisionCli, tmp_path: Path, words: tuple[str, str]
) -> None:
    refused = fedbus("provision", "init", *words)
    assert (refused.code, refused.err.count("\n")) == (ExitCode.USAGE, 1), refused.err
    assert words[0] in refused.err
    assert not (tmp_path / ".fedbus").exists()


async def test_a_user_and_a_role_are_listed_rotated_and_revoked(
    fedbus: ProvisionCli, bus: TrustedBus
) -> None:
    trust = ("--trust", str(bus.federation.folder))
    created = fedbus("provision", "user", "ana", *trust)
    assert "in the folder of the copy: FEDBUS_KIT=ana fedbus clients ls" in created.out, created.err
    assert fedbus("doctor", FEDBUS_KIT="kits/ana").code == 0
    assert "ana is already the name of a person" in fedbus("provision", "client", "ana", *trust).err
    for name, text in (
        ("ana", "the kit of ana is kits/ana"),
        ("server", "the new credentials of server are"),
    ):
        renewed = fedbus("provision", "rotate", name, *trust)
        assert (renewed.code, text in renewed.out) == (0, True), renewed
    assert fedbus("doctor", FEDBUS_KIT="kits/ana").code == 0
    assert fedbus("provision", "revoke", "ana", *trust).out == "the credentials of ana are revoked\n"
    assert fedbus("clients", "ls", FEDBUS_KIT="kits/ana").code == ExitCode.DENIED
    listed = {one["name"]: one for one in fedbus("provision", "list", "--json", *trust).facts}
    assert (listed["ana"]["kind"], listed["ana"]["standing"]) == ("person", "revoked")
    assert (listed["server"]["kind"], listed["server"]["standing"]) == ("role", "in")
    assert listed["server"]["expires"]


async def test_revoking_a_client_names_its_site(fedbus: ProvisionCli, bus: TrustedBus) -> None:
    trust = ("--trust", str(bus.federation.folder))
    fedbus("provision", "client", "c1", *trust)
    made = fedbus(
        "provision", "site", "lab", "--client", "c1", "--task", "mnist", "--host", "nats.lab", *trust
    )
    assert "FEDBUS_NATS_URL=tls://nats.lab:4222 fedbus client up c1" in made.out, made.err
    assert "private key" in made.out
    out = fedbus("provision", "revoke", "c1", *trust)
    assert "site lab has client c1: its leaf node gets the change" in out.out
    renewed = fedbus("provision", "rotate", "lab", *trust)
    assert "the folder of site lab is sites/lab" in renewed.out, renewed.err
    unknown = fedbus("provision", "site", "other", "--client", "nosuch", "--task", "mnist", *trust)
    assert (unknown.code, "client nosuch is not a member" in unknown.err) == (ExitCode.NOT_FOUND, True)


async def test_push_uses_another_url_than_the_kits(fedbus: ProvisionCli, bus: TrustedBus) -> None:
    """As with `kubectl port-forward`: the host name in the certificate does not change."""
    bus.federation.registry.url = "tls://nats:1"
    bus.federation.set_server_path(bus.federation.nats_folder)
    trust = ("--trust", str(bus.federation.folder))
    assert "--url" in fedbus("provision", "push", *trust).err
    pushed = fedbus("provision", "push", "--url", f"tls://127.0.0.1:{bus.port}", *trust)
    assert (pushed.code, pushed.out) == (0, "nats-server has the current credentials\n"), pushed.err


# --- doctor -------------------------------------------------------------------------------------------------


async def test_doctor_recognises_the_kit_of_another_federation(bus: TrustedBus, tmp_path: Path) -> None:
    other = Federation.create(tmp_path / "other", FederationId("other"), hosts=["localhost"], port=bus.port)
    other.admit("c1").write(tmp_path / "kit")
    settings = Settings.from_environment(apply_kit({"FEDBUS_KIT": str(tmp_path / "kit")}))
    found = {one.what: one for one in await _check_credentials(settings)}
    assert found["credentials"].health is Severity.OK
    assert (
        found["certificate"].found
        == "server certificate was issued by 'fedbus test', but FEDBUS_CA is 'fedbus other'"
    )
    assert "the kit of that federation" in found["certificate"].advice


async def _check_credentials(settings: Settings) -> list[DoctorFinding]:
    return list(await asyncio.to_thread(run_checks, settings))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("doctor") / "trust"
    return Federation.create(folder, FederationId("dev"), hosts=["bus.lab"], port=4222)


@pytest.mark.parametrize(
    ("after", "health", "words"),
    [
        (timedelta(minutes=1), Severity.OK, "valid until"),
        (timedelta(days=350), Severity.WARNING, "soon"),
        (timedelta(days=366), Severity.ERROR, "expired on"),
        (timedelta(days=-1), Severity.ERROR, "in the future of this clock"),
    ],
)
def test_doctor_checks_the_dates_of_credentials(
    federation: Federation, after: timedelta, health: Severity, words: str
) -> None:
    finding = check_credentials(federation.creds_path(Role.USER), utc_now() + after)
    assert (finding.health, words in finding.found) == (health, True), finding
    assert bool(finding.advice) == (health is not Severity.OK)


@pytest.mark.parametrize(("fed", "client"), [("other", ""), ("dev", "c1")])
def test_credentials_of_another_federation_are_reported(
    federation: Federation, fed: str, client: str
) -> None:
    finding = check_credentials(
        federation.creds_path(Role.USER), utc_now() + timedelta(minutes=1), fed=fed, client=client
    )
    assert (finding.health, "these are the credentials of user" in finding.found) == (Severity.ERROR, True)


def test_an_invalid_ca_or_certificate_is_reported(federation: Federation, tmp_path: Path) -> None:
    make_authority("dev", tmp_path / "ca.pem", tmp_path / "ca.key")
    make_server_certificate(
        tmp_path / "ca.pem",
        tmp_path / "ca.key",
        ["bus.lab"],
        tmp_path / "server.pem",
        tmp_path / "server.key",
    )
    ca, shown = (
        read_certificate(federation.ca_path),
        read_certificate(federation.folder / "tls" / "server.pem"),
    )
    renewed = read_certificate(tmp_path / "server.pem")

    assert check_server_certificate(shown, ca, "bus.lab", utc_now()).health is Severity.OK
    assert "not valid for other.lab" in check_server_certificate(shown, ca, "other.lab", utc_now()).found
    assert "the CA was renewed" in check_server_certificate(renewed, ca, "bus.lab", utc_now()).advice
    assert (
        "in the future" in check_server_certificate(shown, ca, "bus.lab", utc_now() - timedelta(days=2)).found
    )
    assert "expired" in check_server_certificate(shown, ca, "bus.lab", utc_now() + timedelta(days=400)).found
    assert "in the future" in check_authority(federation.ca_path, utc_now() - timedelta(days=2)).found
    assert check_authority(tmp_path / "none.pem", utc_now()).health is Severity.ERROR


def test_readable_credentials_are_a_remark(federation: Federation, tmp_path: Path) -> None:
    shutil.copy(federation.creds_path(Role.USER), tmp_path / "open.creds")
    (tmp_path / "open.creds").chmod(0o644)
    finding = check_credentials(tmp_path / "open.creds", utc_now() + timedelta(minutes=1))
    assert (finding.health, finding.advice) == (Severity.WARNING, f"chmod 600 {tmp_path / 'open.creds'}")


def test_a_forged_signature_is_reported(federation: Federation, tmp_path: Path) -> None:
    text = federation.creds_path(Role.OBSERVER).read_text()
    end = text.index("\n------END NATS USER JWT") - 4
    changed = "AAAA" if text[end : end + 4] != "AAAA" else "BBBB"
    (tmp_path / "forged.creds").write_text(text[:end] + changed + text[end + 4 :])
    forged = check_credentials(tmp_path / "forged.creds", utc_now() + timedelta(minutes=1))
    assert (forged.health, "corrupt or forged" in forged.found) == (Severity.ERROR, True)


async def test_an_unavailable_store_or_code_repository_is_reported(
    fedbus: ProvisionCli, bus: TrustedBus
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    result = fedbus(
        "doctor",
        "--json",
        FEDBUS_NATS_URL=bus.url,
        FEDBUS_CREDS=str(bus.federation.creds_path(Role.USER)),
        FEDBUS_CA=str(bus.federation.ca_path),
        FEDBUS_FEDERATION="test",
        FEDBUS_STORE=f"s3://models/x?endpoint=http://{dead}",
        FEDBUS_TASK=f"git+https://{dead}/x.git@main",
    )
    found = {one["what"]: one for one in result.facts}
    assert result.code == ExitCode.FAILED
    for what in ("models", "code"):
        assert (found[what]["health"], dead in found[what]["found"]) == ("ill", True)
        assert found[what]["advice"]
    assert found["server's agents"]["found"] == "none is running"


@pytest.mark.parametrize("role", [*SERVER_ROLES, Role.SERVER, Role.GATEWAY, Role.USER, Role.OBSERVER])
async def test_each_role_may_run_the_stream_checks_of_doctor(
    fedbus: ProvisionCli, bus: TrustedBus, role: Role
) -> None:
    manager = Identity(FED, "server-manager")
    async with Bus.connect(bus.url, manager, access=bus.access_for(Role.SERVER_MANAGER)) as server:
        await server.create_streams()
    result = fedbus(
        "doctor",
        "--json",
        FEDBUS_NATS_URL=bus.url,
        FEDBUS_CREDS=str(bus.federation.creds_path(role)),
        FEDBUS_CA=str(bus.federation.ca_path),
        FEDBUS_FEDERATION="test",
    )
    found = {one["what"]: one["health"] for one in result.facts}
    assert (found["JetStream"], found["clock"], result.err) == ("well", "well", "")


def test_server_agents_without_a_reply_are_reported() -> None:
    some = [
        ServiceInfo(f"fedbus-{name}", "server", "mnist")
        for name in ("registrar", "server-manager", "gateway")
    ]
    server, devices, dashboard = check_agents([*some, ServiceInfo("fedbus-client-manager", "c1", "mnist")])
    assert server.is_error
    assert server.found == "no answer from workflow-scheduler, flower-server, training-monitor"
    assert (devices.found, dashboard.found) == ("1 running", "running")


async def test_doctor_reports_a_clock_skew_on_a_device(
    bus: TrustedBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server clock is ten minutes ahead, which is the same skew for the device."""
    task = tiny_task(tmp_path)
    bus.access_for("c1")
    async with (
        Bus.connect(bus.url, Identity(FED, "registrar"), access=bus.access_for(Role.SERVER)) as server,
        serve_registrar(server, task.id),
    ):
        await server.create_streams()
        environment = {"FEDBUS_KIT": str(tmp_path / "kits" / "c1"), "FEDBUS_TASK": str(task.path)}
        settings = Settings.from_environment(apply_kit(environment))
        well = {one.what: one for one in await _check_credentials(settings)}
        monkeypatch.setattr("fedbus.common.clock.time_s", lambda: time.time() + 600)
        ill = {one.what: one for one in await _check_credentials(settings)}
    assert well["clock"].health is Severity.OK
    assert ill["clock"].found == "600 s behind the bus (limit 3 s)"


# --- the nats program ---------------------------------------------------------------------------------------


def test_context_writes_the_format_of_the_nats_cli(fedbus: ProvisionCli, tmp_path: Path) -> None:
    environment = {
        "FEDBUS_NATS_URL": "tls://bus.lab:4222",
        "FEDBUS_CREDS": str(tmp_path / "user.creds"),
        "FEDBUS_CA": str(tmp_path / "ca.pem"),
    }
    result = fedbus("context", "lab", "--select", **environment)
    assert result.code == 0, result.err
    path = tmp_path / "config" / "nats" / "context" / "lab.json"
    assert json.loads(path.read_text()) == {
        "description": "federation dev, by fedbus",
        "url": "tls://bus.lab:4222",
        "creds": str(tmp_path / "user.creds"),
        "ca": str(tmp_path / "ca.pem"),
        "inbox_prefix": "_INBOX.people.nats",
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "config" / "nats" / "context.txt").read_text() == "lab"


def test_a_context_without_credentials_has_the_url_only(fedbus: ProvisionCli, nats: NatsServer) -> None:
    result = fedbus("context", "--stdout", FEDBUS_NATS_URL=nats.url)
    context = result.facts
    assert (context["url"], context["creds"], context["ca"]) == (nats.url, "", "")


@pytest.mark.parametrize("name", ["../etc", "a/b", "", " "])
def test_a_context_name_cannot_be_a_path(fedbus: ProvisionCli, tmp_path: Path, name: str) -> None:
    result = fedbus("context", name or "..")
    assert result.code == ExitCode.USAGE
    assert not (tmp_path / "config").exists()
