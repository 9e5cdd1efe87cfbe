"""Revoked and renewed credentials on a real nats-server."""

import asyncio
import shutil
from pathlib import Path

import pytest
from support.trusted_bus import FED, TRAINER, TrustedBus, rejected_connection

from fedbus.app.provision.federation import STORED_ROLES, Federation
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import AccessDenied
from fedbus.contracts.credentials import parse_user
from fedbus.contracts.permissions import Role
from fedbus.contracts.subjects import USERS


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
    federation.revoke_all_devices()  # writes the registry
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
