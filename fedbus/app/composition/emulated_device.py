"""A real device under a profile: a proxy between it and nats-server, and delays in its training processes.

    device = emulate_device(url, "c1", load_profile("mobile"))
    async with device.run_proxy():
        await run_together(agents_of(device.apply_to(config)), stop)

The proxy outlives the agents, which publish their last events when they stop.

The proxy passes TLS through, so it cannot see messages: latency, bandwidth, retransmissions and interruptions are
applied to the bytes. Delays after training, the speed of the device and replies that are lost for ever are applied
in the training process.
"""

import re
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import structlog

from fedbus.agents.common.process_orders import TrainerConditions, WorkConditions
from fedbus.app.composition.agents import ClientConfig
from fedbus.simulation.fault_proxy.proxy import fault_proxy
from fedbus.simulation.profiles.assignment import NO_GROUP, group_of_device
from fedbus.simulation.profiles.conditions import DeviceConditions
from fedbus.simulation.profiles.errors import ProfileError
from fedbus.simulation.profiles.schema import Group, Profile, TrainingTime

HOST: Final = "127.0.0.1"
DEFAULT_PORTS: Final = {"nats": 4222, "tls": 4222, "ws": 80, "wss": 443}
DRAWN_MESSAGES: Final = 500
"""The messages of a run with values of their own; further ones use these values again."""

MAX_LATENCY_S: Final = 1.0
"""The start of a connection takes several round trips within 5 s."""

log = structlog.get_logger("fedbus.emulated_device")


@dataclass(frozen=True)
class EmulatedDevice:
    """The conditions of a device, and the proxy that its agents connect to."""

    client: str
    group: str
    conditions: DeviceConditions
    server: tuple[str, int]
    listener: socket.socket
    started_at: float
    """Time 0 of the profile, in seconds of the epoch."""

    @asynccontextmanager
    async def run_proxy(self) -> AsyncIterator[None]:
        """Run the proxy until the block ends."""
        latency = self.conditions.group.latency
        if latency is not None and latency.mean_s > MAX_LATENCY_S:
            log.warning(
                "Latency of the profile may prevent connections to NATS",
                latency_s=latency.mean_s,
                limit_s=MAX_LATENCY_S,
            )
        async with fault_proxy(
            self.conditions, self.server, self.listener, started_at=self.started_at
        ) as proxy:
            log.info(
                "Applying a profile",
                client=self.client,
                group=self.group or "none",
                connected=proxy.is_connected,
            )
            yield

    def apply_to(self, config: ClientConfig) -> ClientConfig:
        """Return *config* with the proxy instead of nats-server, and with the delays of training."""
        agent_config = config.agent_config
        url = urlsplit(agent_config.nats_url)
        user, at, _ = url.netloc.rpartition("@")
        netloc = f"{user}{at}{HOST}:{self.listener.getsockname()[1]}"
        return replace(
            config,
            agent_config=replace(
                agent_config,
                nats_url=urlunsplit(url._replace(netloc=netloc)),
                access=replace(agent_config.access, proxied_host=self.server[0]),
            ),
            conditions=self.trainer_conditions,
        )

    def trainer_conditions(self, run: str) -> TrainerConditions:
        """Draw the conditions of a run. Its first run has those of a simulation with the same seed."""
        first = (_run_number(run) - 1) * DRAWN_MESSAGES
        numbers = range(first, first + DRAWN_MESSAGES)
        conditions = self.conditions
        return TrainerConditions(
            training=_work_conditions(conditions, "train", numbers),
            evaluation=_work_conditions(conditions, "evaluate", numbers),
            delays_s=tuple(conditions.delay_s(number) for number in numbers),
            lost_messages=tuple(conditions.is_dropped("download", number) for number in numbers),
            lost_replies=tuple(conditions.is_dropped("upload", number) for number in numbers),
        )


def emulate_device(
    nats_url: str,
    client: str,
    profile: Profile,
    *,
    group: str | None = None,
    seed: int | None = None,
    started_at: float | None = None,
) -> EmulatedDevice:
    """Prepare a device: choose its group, and bind the port of its proxy.

    *group* is the name of its group, "" for none; None chooses it by the client's name or by chance.

    Raises:
        ProfileError: there is no such group, or *nats_url* is not that of one server.

    """
    chosen_seed = profile.seed if seed is None else seed
    name = group_of_device(profile, client, chosen_seed) if group is None else group
    if name != NO_GROUP and name not in profile.groups:
        raise ProfileError(f"the profile has no group {name!r}. Its groups are: {', '.join(profile.groups)}")
    chosen = Group() if name == NO_GROUP else profile.groups[name]
    url = urlsplit(nats_url)
    if "," in nats_url or url.hostname is None:
        raise ProfileError(f"{nats_url!r} is not the URL of one nats-server, which a profile needs")
    begin = time.time() if started_at is None else started_at
    local = datetime.fromtimestamp(begin).astimezone()
    time_of_day_s = local.hour * 3600.0 + local.minute * 60 + local.second
    return EmulatedDevice(
        client,
        name,
        DeviceConditions(client, chosen, chosen_seed, time_of_day_s),
        (url.hostname, url.port or DEFAULT_PORTS[url.scheme]),
        socket.create_server((HOST, 0)),
        begin,
    )


def _work_conditions(conditions: DeviceConditions, kind: str, numbers: Sequence[int]) -> WorkConditions:
    training: TrainingTime | None = (
        conditions.group.training if kind == "train" else conditions.group.evaluation
    )
    if training is None:
        training = conditions.group.training
        return WorkConditions(slowdown=training.slowdown if training.is_measured else 1.0)
    if training.is_measured:
        return WorkConditions(slowdown=training.slowdown)
    if training.seconds_per_sample is not None:
        return WorkConditions(seconds_per_sample=training.slowdown * training.seconds_per_sample)
    return WorkConditions(seconds=tuple(conditions.work_s(number, kind, 0.0, 0) for number in numbers))


def _run_number(run: str) -> int:
    match = re.search(r"-(\d{1,9})$", run)
    return max(1, int(match[1])) if match else 1
