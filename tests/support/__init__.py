"""Shared test support: fakes, harnesses, real servers, and waiting for a condition."""

from support.nats_server import NatsServer, OwnNatsServer, nats_server
from support.waiting import ConditionNotMet, eventually

__all__ = ["ConditionNotMet", "NatsServer", "OwnNatsServer", "eventually", "nats_server"]
