"""Credentials that a real nats-server accepts or refuses, and the reasons that users read."""

import asyncio
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support import eventually
from support.trusted_bus import FED, TRAINER, TrustedBus, rejected_connection

from fedbus.agents.server_manager.state_registrar import serve_registrar
from fedbus.app.failures import ExitCode, describe_error
from fedbus.app.provision import jwt_claims
from fedbus.app.provision.federation import Federation
from fedbus.app.provision.keys import Key, KeyType
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import AccessDenied, InvalidCredentialsFile, PermissionDenied
from fedbus.common import clock
from fedbus.contracts import subjects
from fedbus.contracts.client import ClientJoined, Heartbeat
from fedbus.contracts.credentials import decode_claims, extract_jwt
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.permissions import Role
from fedbus.contracts.subjects import USERS


async def test_a_new_client_connects_without_a_push(bus: TrustedBus) -> None:
    async with Bus.connect(bus.url, TRAINER, access=bus.access_for("c1")) as trainer:
        await trainer.publish(Heartbeat(task="mnist", client="c1", run="mnist-1"))


async def test_a_denied_publish_fails_at_once_with_the_reason(bus: TrustedBus) -> None:
    async with Bus.connect(bus.url, TRAINER, access=bus.access_for("c1")) as trainer:
        started = time.monotonic()
        with pytest.raises(PermissionDenied, match=r"publish on fedbus\.test\.client\.c2"):
            await trainer.publish(ClientJoined(task="mnist", client="c2", run="mnist-1"))
        assert time.monotonic() - started < 60, "it waited for a timeout"


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


async def test_credentials_from_the_future_hint_at_the_clock(bus: TrustedBus, tmp_path: Path) -> None:
    own = Key.generate(KeyType.USER)
    claims = decode_claims(extract_jwt(bus.federation.admit("c1").creds))
    signer = Key.generate(
        KeyType.ACCOUNT
    )  # the server refuses it anyway; the test checks the reason that the client reports
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


async def test_a_client_with_credentials_reconnects(bus: TrustedBus) -> None:
    async with Bus.connect(bus.url, TRAINER, access=bus.access_for("c1")) as trainer:
        await bus.server.stop()
        await eventually(lambda: not trainer.is_connected)
        await bus.server.start()
        await eventually(lambda: trainer.is_connected)
