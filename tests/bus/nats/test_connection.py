"""The pauses between attempts to reconnect."""

from urllib.parse import urlparse

from nats.aio.client import Server

from fedbus.bus.nats.connection import MAX_RECONNECT_S, _ConnectionMonitor


async def test_the_pauses_stay_bounded_in_an_outage_of_days() -> None:
    monitor = _ConnectionMonitor("nats://127.0.0.1:4222", "test", {})
    servers = [Server(uri=urlparse("nats://127.0.0.1:4222"))]

    pauses = [monitor.next_server(servers, {})[1] for _ in range(5_000)]

    assert max(pauses) <= MAX_RECONNECT_S
    assert max(pauses[-100:]) > MAX_RECONNECT_S / 2
