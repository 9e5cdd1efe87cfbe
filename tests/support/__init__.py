"""What tests lean on: waiting for a condition, and a real nats-server."""

from support.nats_server import NatsServer, OwnNatsServer, nats_server
from support.waiting import ConditionNotMet, eventually

__all__ = ["ConditionNotMet", "NatsServer", "OwnNatsServer", "eventually", "nats_server"]
