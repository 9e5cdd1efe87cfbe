"""Sites: their keys, and leaf nodes that apply revocations."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from support import eventually
from support.ports import free_port
from support.trusted_bus import FED, TRAINER, ConfiguredNatsServer, TrustedBus

from fedbus.app.failures import CliError
from fedbus.app.provision.federation import Federation
from fedbus.app.provision.nats_config import ServerLocation
from fedbus.bus.bus import Bus
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import AccessDenied


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
