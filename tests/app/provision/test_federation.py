"""Members of a federation: keys, kits and claims, and how a real nats-server applies them."""

import asyncio
import os
import re
import shutil
import stat
import tarfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck as Health
from hypothesis import given, settings
from hypothesis import strategies as st
from support import eventually
from support.ports import free_port
from support.trusted_bus import FED, ConfiguredNatsServer, TrustedBus, trusted_bus

from fedbus.agents.server_manager.state_registrar import serve_registrar
from fedbus.app.failures import CliError, ExitCode, describe_error
from fedbus.app.provision import jwt_claims
from fedbus.app.provision.federation import STORED_ROLES, Federation
from fedbus.app.provision.keys import Key, KeyType, check_public_key
from fedbus.app.provision.kit import complete_kit
from fedbus.app.provision.nats_config import ServerLocation
from fedbus.app.settings import InvalidSetting, Settings, apply_kit
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import AccessDenied, InvalidCredentialsFile, PermissionDenied
from fedbus.common import clock
from fedbus.contracts import subjects
from fedbus.contracts.client import ClientJoined, Heartbeat
from fedbus.contracts.credentials import decode_claims, extract_jwt, parse_user
from fedbus.contracts.identifiers import ID_PATTERN, BadId, FederationId, check_id
from fedbus.contracts.permissions import Role
from fedbus.contracts.subjects import USERS

TRAINER = Identity(FED, "trainer", "c1")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("federation") / "trust"
    return Federation.create(folder, FED, hosts=["localhost"], port=4222)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[TrustedBus]:
    async with trusted_bus(tmp_path) as bus:
        yield bus


async def rejected_connection(
    bus: TrustedBus, access: BusAccess, identity: Identity = TRAINER
) -> AccessDenied:
    with pytest.raises(AccessDenied) as caught:
        async with Bus.connect(bus.url, identity, access=access):
            pass
    assert describe_error(caught.value)[1] is ExitCode.DENIED
    return caught.value


# --- names ---------------------------------------------------------------------------------------------

invalid_names = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "*",
            ">",
            ".",
            "..",
            "c1.*",
            "c1.>",
            "c1 ",
            " c1",
            "c1\n",
            "C1",
            "c_1",
            "é",
            "{{name()}}",
            "server",
            "",
        ]
    ),
    st.from_regex(r"[a-z0-9-]{0,10}[*>. \t\r\n/\\{}$A-Z_][a-z0-9*>. -]{0,10}", fullmatch=True),
    st.builds(
        lambda text, size: (text * size)[:size],
        st.from_regex(r"[a-z0-9-]{1,4}", fullmatch=True),
        st.integers(64, 80),
    ),
    st.from_regex(r"-[a-z0-9-]{0,10}", fullmatch=True),
).filter(lambda name: not _is_valid_name(name))


def _is_valid_name(name: str) -> bool:
    return re.fullmatch(ID_PATTERN[1:-1], name) is not None and name not in ("server", "people")


@settings(max_examples=1000, deadline=None, suppress_health_check=list(Health))
@given(name=invalid_names)
def test_an_invalid_client_name_is_refused(federation: Federation, name: str) -> None:
    with pytest.raises((BadId, CliError)):
        federation.admit(name)
    assert name not in federation.registry.clients


def test_a_line_break_is_not_part_of_a_name() -> None:
    with pytest.raises(BadId):
        check_id("client", "c1\n")


# --- files -------------------------------------------------------------------------------------------------


def test_secret_files_have_mode_600(federation: Federation, tmp_path: Path) -> None:
    federation.admit("secretive").write(tmp_path / "kit")
    secret = [
        *federation.folder.rglob("*.nk"),
        *federation.folder.rglob("*.key"),
        *federation.folder.rglob("*.creds"),
        *(tmp_path / "kit").rglob("*.creds"),
    ]
    assert len(secret) > 20
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


def test_no_secret_is_in_a_repr_or_a_public_file(federation: Federation) -> None:
    key = Key.generate(KeyType.USER)
    assert key._seed not in repr(key)
    for path in (federation.nats_folder / "nats.conf", federation.folder / "federation.json"):
        text = path.read_text()
        for seed in federation.folder.rglob("*.nk"):
            assert seed.read_text().strip() not in text


def test_a_kit_has_all_that_a_device_needs(federation: Federation, tmp_path: Path) -> None:
    (federation.folder / "allowed_signers").write_text("who ssh-ed25519 AAAA\n")
    federation.admit("kitted").write(tmp_path / "kit")
    environment = apply_kit({"FEDBUS_KIT": str(tmp_path / "kit")})
    settings_of_kit = Settings.from_environment(environment)

    assert (settings_of_kit.nats_url, settings_of_kit.federation, settings_of_kit.client) == (
        "tls://localhost:4222",
        "test",
        "kitted",
    )
    assert settings_of_kit.access == BusAccess(tmp_path / "kit" / "client.creds", tmp_path / "kit" / "ca.pem")
    assert environment["AWS_CA_BUNDLE"] == environment["FEDBUS_CA"]
    assert Path(environment["FEDBUS_ALLOWED_SIGNERS"]).read_text() == "who ssh-ed25519 AAAA\n"
    assert parse_user(settings_of_kit.access.creds.read_text()).name == "kitted"  # type: ignore[union-attr]


def test_a_kit_does_not_override_the_environment(federation: Federation, tmp_path: Path) -> None:
    federation.admit("overruled").write(tmp_path / "kit")
    environment = {"FEDBUS_KIT": str(tmp_path / "kit"), "FEDBUS_NATS_URL": "tls://leaf:4222"}
    assert apply_kit(environment)["FEDBUS_NATS_URL"] == "tls://leaf:4222"


def test_a_folder_without_settings_is_not_a_kit(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="is not a kit"):
        apply_kit({"FEDBUS_KIT": str(tmp_path)})


def test_a_kit_can_be_a_tar_file(federation: Federation, tmp_path: Path) -> None:
    federation.admit("packed").write(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "packed.tar") as tar:
        modes = {entry.name: entry.mode for entry in tar.getmembers()}
    assert modes["packed/client.creds"] == 0o600
    assert {"packed/ca.pem", "packed/settings.env"} <= modes.keys()
    assert stat.S_IMODE((tmp_path / "packed.tar").stat().st_mode) & 0o077 == 0


def test_a_device_s_own_key_never_leaves_it(federation: Federation, tmp_path: Path) -> None:
    own = Key.generate(KeyType.USER)
    federation.admit("own-key", public_key=own.public).write(tmp_path / "kit")
    kit = tmp_path / "kit" / "client.creds"
    assert "SEED" not in kit.read_text()

    assert complete_kit(tmp_path / "kit", own) == "own-key"
    assert "SEED" in kit.read_text()
    with pytest.raises(CliError, match="the kit is for the key"):
        complete_kit(tmp_path / "kit", Key.generate(KeyType.USER))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "U",
        "UAAA",
        "A" * 56,
        Key.generate(KeyType.ACCOUNT).public,
        Key.generate(KeyType.USER).public[:-1] + "1",
    ],
    ids=["nothing", "one letter", "short", "no checksum", "an account's", "a typing error"],
)
def test_an_invalid_public_key_is_refused(text: str) -> None:
    with pytest.raises(CliError, match="is not the public key of a user"):
        check_public_key(text)


def test_a_private_seed_is_refused_with_a_warning(tmp_path: Path) -> None:
    Key.generate(KeyType.USER).save(tmp_path / "device.nk")
    with pytest.raises(CliError, match="this is the private seed"):
        check_public_key((tmp_path / "device.nk").read_text().strip())


def test_a_second_federation_in_one_folder_is_refused(federation: Federation) -> None:
    with pytest.raises(CliError, match="already has a federation"):
        Federation.create(federation.folder, FED, hosts=["localhost"], port=4222)


def test_a_member_cannot_be_added_again(federation: Federation) -> None:
    federation.admit("once")
    with pytest.raises(CliError, match="rotate once"):
        federation.admit("once")


def test_user_claims_have_no_permissions(federation: Federation) -> None:
    """The signing key has them, so they cannot be forged in a kit."""
    claims = decode_claims(extract_jwt(federation.admit("plain").creds))
    assert set(claims["nats"]) == {"type", "version", "issuer_account", "tags"}
    assert claims["nats"]["tags"] == ["federation:test", "role:device"], "tags that give no permission"


# --- the running server -----------------------------------------------------------------------------------


async def test_a_new_client_connects_without_a_push(bus: TrustedBus) -> None:
    async with Bus.connect(bus.url, TRAINER, access=bus.access_for("c1")) as trainer:
        await trainer.publish(Heartbeat(task="mnist", client="c1", run="mnist-1"))


async def test_a_revoked_client_is_disconnected_for_good(
    bus: TrustedBus, capfd: pytest.CaptureFixture[str]
) -> None:
    access = bus.access_for("c1")
    async with Bus.connect(bus.url, TRAINER, access=access) as trainer:
        bus.federation.revoke("c1")
        await bus.push()
        with pytest.raises(AccessDenied, match=r"revoked"):
            async with asyncio.timeout(20):
                await trainer.wait_closed()
    assert "Connection rejected" in capfd.readouterr().out
    error = await rejected_connection(bus, access)
    assert "revoked, forged or from another federation" in str(error)


async def test_a_new_key_readmits_a_revoked_client(bus: TrustedBus, tmp_path: Path) -> None:
    old = bus.access_for("c1")
    bus.federation.reissue("c1").write(tmp_path / "new")
    await bus.push()
    new = BusAccess(tmp_path / "new" / "client.creds", bus.federation.ca_path)
    await rejected_connection(bus, old)
    async with Bus.connect(bus.url, TRAINER, access=new):
        pass


async def test_a_new_signing_key_revokes_all_devices(bus: TrustedBus) -> None:
    old, server = bus.access_for("c1"), bus.access_for(Role.SERVER)
    bus.federation.revoke_all_devices()
    await bus.push()
    await rejected_connection(bus, old)
    async with Bus.connect(bus.url, Identity(FED, "server-manager"), access=server):
        pass


async def test_revocations_survive_a_restart_of_the_server(bus: TrustedBus) -> None:
    access = bus.access_for("c1")
    bus.federation.revoke("c1")
    await bus.server.stop()
    bus.federation.write_server_files(bus.location)
    await bus.server.start()
    await rejected_connection(bus, access)


async def test_a_denied_publish_fails_at_once_with_the_reason(bus: TrustedBus) -> None:
    async with Bus.connect(bus.url, TRAINER, access=bus.access_for("c1")) as trainer:
        started = time.monotonic()
        with pytest.raises(PermissionDenied, match=r"publish on fedbus\.test\.client\.c2"):
            await trainer.publish(ClientJoined(task="mnist", client="c2", run="mnist-1"))
        assert time.monotonic() - started < 60, "it waited for a timeout"


# --- invalid kits -----------------------------------------------------------------------------------------


async def test_an_expired_kit_is_reported_as_expired(bus: TrustedBus, tmp_path: Path) -> None:
    bus.federation.admit("c1", days=-1).write(tmp_path / "kit")
    error = await rejected_connection(
        bus, BusAccess(tmp_path / "kit" / "client.creds", bus.federation.ca_path)
    )
    assert "the credentials of c1 expired on" in str(error)


async def test_credentials_that_expire_in_use_end_the_agent(bus: TrustedBus, tmp_path: Path) -> None:
    bus.federation.admit("c1", days=3 / 86400).write(tmp_path / "kit")
    access = BusAccess(tmp_path / "kit" / "client.creds", bus.federation.ca_path)
    async with Bus.connect(bus.url, TRAINER, access=access) as trainer:
        with pytest.raises(AccessDenied, match="expired"):
            async with asyncio.timeout(30):
                await trainer.wait_closed()


async def test_a_forged_kit_is_refused(bus: TrustedBus, tmp_path: Path) -> None:
    """The JWT is signed with another key, but names the account as issuer."""
    own = Key.generate(KeyType.USER)
    claims = decode_claims(extract_jwt(bus.federation.admit("c1").creds))
    forged = jwt_claims.user_jwt(
        Key.generate(KeyType.ACCOUNT), claims["nats"]["issuer_account"], own.public, "c1"
    )
    (tmp_path / "forged.creds").write_text(own.render_credentials(forged))
    error = await rejected_connection(bus, BusAccess(tmp_path / "forged.creds", bus.federation.ca_path))
    assert "forged" in str(error)


async def test_a_stolen_jwt_without_its_key_is_refused(bus: TrustedBus, tmp_path: Path) -> None:
    jwt = extract_jwt(bus.federation.admit("c1").creds)
    (tmp_path / "stolen.creds").write_text(Key.generate(KeyType.USER).render_credentials(jwt))
    await rejected_connection(bus, BusAccess(tmp_path / "stolen.creds", bus.federation.ca_path))


async def test_a_kit_of_another_federation_fails_tls_verification(bus: TrustedBus, tmp_path: Path) -> None:
    other = Federation.create(tmp_path / "other", FederationId("other"), hosts=["localhost"], port=1)
    other.admit("c1").write(tmp_path / "kit")
    access = BusAccess(tmp_path / "kit" / "client.creds", tmp_path / "kit" / "ca.pem")
    error = await rejected_connection(bus, access, replace(TRAINER, fed=FederationId("other")))
    assert "its certificate is not signed by the CA in FEDBUS_CA" in str(error)
    assert "another federation" in str(error)
    with_our_ca = replace(access, ca=bus.federation.ca_path)
    error = await rejected_connection(bus, with_our_ca, replace(TRAINER, fed=FederationId("other")))
    assert "from another federation" in str(error)


@pytest.mark.parametrize(
    ("who", "identity", "message"),
    [
        ("c1", Identity(FED, "trainer", "c2"), "client c1 of federation test, but this is client c2 of"),
        (
            "c1",
            Identity(FederationId("other"), "trainer", "c1"),
            "of federation other: set FEDBUS_KIT or FEDBUS_CREDS to its own, or use FEDBUS_FEDERATION=test",
        ),
        ("c1", Identity(FED, "cli", USERS), "or use FEDBUS_CLIENT=c1"),
        (Role.SERVER, TRAINER, "of server of federation test, but this is client c1"),
        (Role.SERVER, Identity(FederationId("dev"), "registrar"), "or use FEDBUS_FEDERATION=test"),
    ],
)
async def test_mismatched_credentials_are_refused_before_connecting(
    bus: TrustedBus, who: Role | str, identity: Identity, message: str
) -> None:
    with pytest.raises(InvalidCredentialsFile, match="these are the credentials of") as caught:
        async with Bus.connect("tls://localhost:1", identity, access=bus.access_for(who)):
            pass
    line, code = describe_error(caught.value)
    assert (message in line, code) == (True, ExitCode.DENIED), line


# --- revoke and renew -------------------------------------------------------------------------------------


async def test_the_credentials_of_one_user_can_be_revoked(bus: TrustedBus, tmp_path: Path) -> None:
    person = Identity(FED, "cli", USERS)
    for name in ("ana", "ben"):
        bus.federation.admit_person(name).write(tmp_path / name)
    bus.federation.admit_person("eve", Role.OBSERVER).write(tmp_path / "eve")
    ana, ben = (
        BusAccess(tmp_path / name / "client.creds", bus.federation.ca_path) for name in ("ana", "ben")
    )
    async with Bus.connect(bus.url, person, access=ana) as ana_bus:
        bus.federation.revoke("ana")
        await bus.push()
        with pytest.raises(AccessDenied, match="revoked"):
            async with asyncio.timeout(20):
                await ana_bus.wait_closed()
    async with Bus.connect(bus.url, person, access=ben):
        pass
    assert {name: one.role for name, one in bus.federation.registry.people.items()} == {
        "ana": "user",
        "ben": "user",
        "eve": "observer",
    }


@pytest.mark.parametrize("role", STORED_ROLES)
async def test_renewed_role_credentials_revoke_the_old_ones(
    bus: TrustedBus, tmp_path: Path, role: Role
) -> None:
    shutil.copy(bus.federation.creds_path(role), tmp_path / "old.creds")
    old = BusAccess(tmp_path / "old.creds", bus.federation.ca_path)
    bus.federation.renew_role(role)
    await bus.push()
    identity = Identity(FED, "cli", USERS)
    await rejected_connection(bus, old, identity)
    async with Bus.connect(bus.url, identity, access=bus.access_for(role)):
        pass


async def test_revoke_includes_kept_old_keys(bus: TrustedBus, tmp_path: Path) -> None:
    shutil.copy(bus.federation.creds_path(Role.SERVER), tmp_path / "old.creds")
    old, identity = BusAccess(tmp_path / "old.creds", bus.federation.ca_path), Identity(FED, "registrar")
    bus.federation.renew_role(Role.SERVER, keep_old=True)
    await bus.push()
    for good in (old, bus.access_for(Role.SERVER)):
        async with Bus.connect(bus.url, identity, access=good):
            pass
    bus.federation.revoke("server")
    await bus.push()
    for bad in (old, bus.access_for(Role.SERVER)):
        await rejected_connection(bus, bad, identity)


def test_roles_missing_in_an_old_registry_can_be_revoked(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path / "trust", FED, hosts=["localhost"], port=4222)
    federation.registry.roles.clear()
    federation.revoke_all_devices()  # writes the record
    Federation.open(federation.folder).revoke("gateway")
    key = parse_user(federation.creds_path(Role.GATEWAY).read_text()).sub
    assert key in Federation.open(federation.folder).registry.revocations


async def test_a_renewed_kit_trusts_the_old_and_the_new_ca(bus: TrustedBus) -> None:
    access = bus.access_for("c1")
    bus.federation.renew_server_certificate(new_authority=True)
    renewed = BusAccess(access.creds, bus.federation.ca_path)
    async with Bus.connect(bus.url, TRAINER, access=renewed):  # the server still has the old one
        pass
    await bus.server.stop()
    bus.federation.write_server_files(bus.location)
    await bus.server.start()
    async with Bus.connect(bus.url, TRAINER, access=renewed):
        pass
    assert "not signed by the CA in FEDBUS_CA" in str(await rejected_connection(bus, access))


# --- sites -------------------------------------------------------------------------------------------------


def write_lab_site(
    federation: Federation, folder: Path, port: int = 4222, clients: tuple[str, ...] = ("c1",)
) -> None:
    place = ServerLocation(folder, port, listen="127.0.0.1")
    federation.write_site("lab", clients, ["mnist"], folder, place, hosts=["localhost"], days=30)


def test_a_site_needs_known_clients_and_can_be_renewed(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path / "trust", FED, hosts=["localhost"], port=4222)
    with pytest.raises(CliError, match="client c1 is not a member"):
        write_lab_site(federation, tmp_path / "lab")
    federation.admit("c1")
    write_lab_site(federation, tmp_path / "lab")
    first = federation.registry.sites["lab"].public_key
    with pytest.raises(
        CliError, match=r"site lab is already a member\. For a new key, run fedbus provision rotate lab"
    ):
        write_lab_site(federation, tmp_path / "lab")
    with pytest.raises(CliError, match="lab is already the name of a site"):
        federation.admit("lab")

    federation.renew_site("lab", tmp_path / "lab")
    assert set(federation.registry.clients) == {"c1"}
    assert federation.registry.sites["lab"].status == "in"
    assert federation.registry.sites["lab"].public_key != first
    assert first in federation.registry.revocations


async def test_a_leaf_node_applies_revocations_also_after_downtime(bus: TrustedBus, tmp_path: Path) -> None:
    port = free_port()
    first, second = bus.access_for("c1"), bus.access_for("c2")
    write_lab_site(bus.federation, tmp_path / "lab", port, ("c1", "c2"))
    leaf, url = ConfiguredNatsServer(tmp_path / "lab" / "leaf.conf", port), f"tls://localhost:{port}"
    await leaf.start()
    try:
        await eventually(lambda: "System account connected" in leaf.log.read_text())
        async with Bus.connect(url, TRAINER, access=first) as trainer:
            bus.federation.revoke("c1")
            await bus.push()
            with pytest.raises(AccessDenied, match="revoked"):
                async with asyncio.timeout(20):
                    await trainer.wait_closed()
        await leaf.stop()
        bus.federation.revoke("c2")
        await bus.push()
        await leaf.start()

        async def is_out() -> bool:
            # The leaf node looks up the claims only after seconds, and each attempt costs CPU time for TLS.
            await asyncio.sleep(0.2)
            try:
                async with Bus.connect(url, replace(TRAINER, owner="c2"), access=second):
                    return False
            except AccessDenied:
                return True

        await eventually(is_out, within_s=60)
    finally:
        await leaf.stop()


async def test_the_system_key_of_a_leaf_node_permits_nothing_else(bus: TrustedBus, tmp_path: Path) -> None:
    bus.access_for("c1")
    write_lab_site(bus.federation, tmp_path / "lab")
    access = BusAccess(tmp_path / "lab" / "system.creds", bus.federation.ca_path)
    async with bus.connect(access) as (client, complaints):
        for subject in (
            "$SYS.REQ.CLAIMS.UPDATE",
            "$SYS.REQ.CLAIMS.DELETE",
            "$SYS.REQ.SERVER.PING",
            "elsewhere",
        ):
            await client.publish(subject, b"{}")
        for subject in (">", "$SYS.>", "$SYS.ACCOUNT.>", "_INBOX.>"):
            await client.subscribe(subject)
        await client.flush()
        await eventually(lambda: len(complaints) >= 8)
    bus.federation.revoke("lab")
    await bus.push()
    with pytest.raises(Exception, match=r"(?i)authorization"):
        async with bus.connect(access):
            pass


async def test_credentials_from_the_future_hint_at_the_clock(bus: TrustedBus, tmp_path: Path) -> None:
    own = Key.generate(KeyType.USER)
    claims = decode_claims(extract_jwt(bus.federation.admit("c1").creds))
    signer = Key.generate(KeyType.ACCOUNT)  # the server refuses it anyway; what we say of it is what is asked
    jwt = jwt_claims.user_jwt(
        signer, claims["nats"]["issuer_account"], own.public, "c1", issued=int(time.time()) + 86400
    )
    (tmp_path / "future.creds").write_text(own.render_credentials(jwt))
    error = await rejected_connection(bus, BusAccess(tmp_path / "future.creds", bus.federation.ca_path))
    assert "Set its clock" in str(error)


async def test_a_host_missing_in_the_certificate_is_reported(bus: TrustedBus) -> None:
    url = f"tls://127.0.0.1:{bus.port}"
    with pytest.raises(AccessDenied, match="is for other names than this address"):
        async with Bus.connect(url, TRAINER, access=bus.access_for("c1")):
            pass


@pytest.mark.parametrize(
    "content",
    ["", "nothing of the kind", "-----BEGIN NATS USER JWT-----\na.b.c\n------END NATS USER JWT------\n"],
)
async def test_corrupt_credentials_are_reported(bus: TrustedBus, tmp_path: Path, content: str) -> None:
    (tmp_path / "damaged.creds").write_text(content)
    with pytest.raises(InvalidCredentialsFile, match=r"damaged\.creds is invalid") as caught:
        async with Bus.connect(
            bus.url, TRAINER, access=BusAccess(tmp_path / "damaged.creds", bus.federation.ca_path)
        ):
            pass
    assert describe_error(caught.value)[1] is ExitCode.DENIED


async def test_a_missing_credentials_file_is_reported(bus: TrustedBus, tmp_path: Path) -> None:
    with pytest.raises(InvalidCredentialsFile, match="FEDBUS_CREDS"):
        async with Bus.connect(bus.url, TRAINER, access=BusAccess(tmp_path / "none", bus.federation.ca_path)):
            pass


@pytest.mark.parametrize("of_client", [True, False])
async def test_a_wrong_clock_is_logged_once(
    bus: TrustedBus, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], of_client: bool
) -> None:
    identity = TRAINER if of_client else Identity(FED, "workflow-scheduler")
    access = bus.access_for("c1" if of_client else Role.WORKFLOW_SCHEDULER)
    async with (
        Bus.connect(bus.url, Identity(FED, "registrar"), access=bus.access_for(Role.SERVER)) as server,
        serve_registrar(server, "mnist"),
        Bus.connect(bus.url, identity, access=access) as agent,
    ):
        await server.create_streams()
        monkeypatch.setattr("fedbus.bus.bus.clock", SlowClock)
        for _ in range(2):
            async with agent.advertise_service(task="mnist", version="1.0.0"):
                await agent.last_on_subject(subjects.lifecycle(FED, "client", "c1.mnist"))
    output = capfd.readouterr().out
    assert output.count("Clock skew against the NATS server") == 1
    assert "-600" in output


class SlowClock:
    """The clock of the agent, 10 minutes behind that of the server, which answers with `time_s`."""

    time_s = staticmethod(clock.time_s)

    @staticmethod
    def now() -> datetime:
        return clock.now() - timedelta(minutes=10)


# --- reconnecting ----------------------------------------------------------------------------------------


async def test_a_client_with_credentials_reconnects(bus: TrustedBus) -> None:
    async with Bus.connect(bus.url, TRAINER, access=bus.access_for("c1")) as trainer:
        await bus.server.stop()
        await eventually(lambda: not trainer.is_connected)
        await bus.server.start()
        await eventually(lambda: trainer.is_connected)


def test_no_variable_of_a_test_remains() -> None:
    assert "FEDBUS_KIT" not in os.environ
