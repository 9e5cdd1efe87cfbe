"""What tests lean on: waiting for a condition, and a real nats-server."""

from support.nats_server import NatsServer, nats_server
from support.waiting import eventually

__all__ = ["NatsServer", "eventually", "nats_server"]
