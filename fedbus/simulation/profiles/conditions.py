"""The conditions of each client under a profile: how long an exchange takes, and when a client is connected.

    conditions = Conditions(profile, clients, seed=1)
    arrival = conditions.exchange(
        "client-0003", 0, sent_at=12.0, download_bytes=250_000, upload_bytes=250_000, train_s=0.8
    )
    arrival.at  # the virtual time of the reply

    sent   received      trains        delay     reply sent        reply arrives
    |------|.............|-------------|---------|-----------------|
    download   queue          train       delay        upload            (+ offline: the client is not connected)

Everything is a pure function of profile, seed, client and the number of the message: the order of calls, the process
and the number of workers have no influence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeAlias

from fedbus.contracts.round_messages import is_training
from fedbus.simulation.profiles.assignment import NO_GROUP, assign_groups, unlimited_group
from fedbus.simulation.profiles.draws import draw_uniform, exponential_quantile
from fedbus.simulation.profiles.durations import AnyDuration
from fedbus.simulation.profiles.schedules import (
    AllOf,
    AlwaysOn,
    ConnectionSchedule,
    PeriodicSchedule,
    RandomSchedule,
)
from fedbus.simulation.profiles.schema import DAY_S, AnyDelay, Availability, Group, Profile

Direction: TypeAlias = Literal["download", "upload"]
BITS_OF_A_MEGABIT: Final = 1_000_000
MAX_RETRANSMISSIONS: Final = 15
"""As ``tcp_retries2`` of Linux: a message that is lost so often in a row arrives with the next connection."""
MAX_INTERRUPTIONS: Final = 100_000
"""A transfer that is interrupted more often never ends."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """The reply to one message. The parts are seconds; their sum is the time from sending to arrival."""

    at: float
    """Infinity if the message or its reply is lost, or the client never connects again."""
    free_at: float
    """The time at which the client can begin with its next message."""
    download_s: float = 0.0
    queue_s: float = 0.0
    """The client was busy with an earlier message."""
    train_s: float = 0.0
    """The time in the task's code, on the device."""
    delay_s: float = 0.0
    upload_s: float = 0.0
    offline_s: float = 0.0
    """The transfers waited for the connection."""

    @property
    def is_lost(self) -> bool:
        return math.isinf(self.at)


class Conditions:
    """The conditions of *clients* under *profile*.

    *seed* replaces that of the profile. *groups* has the group of each client if it is known; else `assign_groups`
    decides. *time_of_day_s* is the time of the day at time 0; None is that of the profile.

    Raises:
        ProfileError: the groups of the profile do not fit the clients.

    """

    def __init__(
        self,
        profile: Profile,
        clients: Sequence[str],
        *,
        seed: int | None = None,
        groups: Mapping[str, str] | None = None,
        time_of_day_s: float | None = None,
    ) -> None:
        self.profile = profile
        self.seed = profile.seed if seed is None else seed
        self.groups = dict(groups) if groups is not None else assign_groups(profile, clients, self.seed)
        """The name of the group of each client; "" is none."""
        self._time_of_day_s = profile.day_starts_at if time_of_day_s is None else time_of_day_s
        self._devices: dict[str, DeviceConditions] = {}

    def device(self, client: str) -> "DeviceConditions":
        """Return the conditions of one client."""
        device = self._devices.get(client)
        if device is None:
            name = self.groups[client]
            group = unlimited_group() if name == NO_GROUP else self.profile.groups[name]
            device = self._devices[client] = DeviceConditions(client, group, self.seed, self._time_of_day_s)
        return device

    def exchange(
        self,
        client: str,
        message: int,
        *,
        sent_at: float,
        kind: str = "train",
        download_bytes: int = 0,
        upload_bytes: int = 0,
        train_s: float = 0.0,
        samples: int = 0,
        free_at: float = 0.0,
    ) -> Arrival:
        """Return when the reply to a message arrives.

        Args:
            client: the name of the client.
            message: the number of the message among those to this client, from 0: the caller counts.
            sent_at: when the server sends the message.
            kind: the kind of the message; ``train…`` trains.
            download_bytes: the size of the message.
            upload_bytes: the size of the reply.
            train_s: the measured time in the task's code. A profile with fixed times ignores it.
            samples: the number of samples that the client trained on.
            free_at: when the client is done with its previous message (`Arrival.free_at`).

        """
        device = self.device(client)
        download = device.transfer("download", message, sent_at, download_bytes)
        if math.isinf(download.at):
            return Arrival(at=math.inf, free_at=free_at)
        start = max(download.at, free_at)
        worked_s = device.work_s(message, kind, train_s, samples)
        delay_s = device.delay_s(message) if is_training(kind) else 0.0
        free = start + worked_s + delay_s
        upload = device.transfer("upload", message, free, upload_bytes)
        return Arrival(
            at=upload.at,
            free_at=free,
            download_s=download.active_s,
            queue_s=start - download.at,
            train_s=worked_s,
            delay_s=delay_s,
            upload_s=upload.active_s,
            offline_s=download.offline_s + upload.offline_s,
        )

    def earliest_arrival(
        self,
        client: str,
        message: int,
        *,
        sent_at: float,
        kind: str = "train",
        download_bytes: int = 0,
        free_at: float = 0.0,
    ) -> float:
        """Return a lower bound of the arrival of a reply that is not computed yet; infinity if it never comes."""
        return self.exchange(
            client, message, sent_at=sent_at, kind=kind, download_bytes=download_bytes, free_at=free_at
        ).at

    def receives(self, client: str, message: int) -> bool:
        """Return whether the client gets the message at all. Its reply may be lost nevertheless."""
        return not self.device(client).is_dropped("download", message)

    def is_connected(self, client: str, at: float) -> bool:
        """Return whether the client is available, and its connection is not interrupted."""
        return self.device(client).connection.is_on(at)

    def is_available(self, client: str, at: float) -> bool:
        """Return whether the client takes part, apart from interruptions of its connection."""
        return self.device(client).availability.is_on(at)

    def next_change(self, client: str, at: float) -> float:
        """Return the first time after *at* at which `is_connected` changes; infinity if there is none."""
        return self.device(client).connection.next_change(at)

    def next_availability_change(self, client: str, at: float) -> float:
        """Return the first time after *at* at which `is_available` changes; infinity if there is none."""
        return self.device(client).availability.next_change(at)


@dataclass(frozen=True)
class Transfer:
    """A message on its way in one direction."""

    at: float
    """When it arrives; infinity if never."""
    active_s: float = 0.0
    offline_s: float = 0.0


class DeviceConditions:
    """The conditions of one client."""

    def __init__(self, client: str, group: Group, seed: int, time_of_day_s: float = 0.0) -> None:
        self.client = client
        self.group = group
        self._seed = seed
        self._time_of_day_s = time_of_day_s

    # --- work -----------------------------------------------------------------------------------

    def work_s(self, message: int, kind: str, measured_s: float, samples: int) -> float:
        """Return the time in the task's code on this device."""
        training = self.group.training
        if not is_training(kind):
            if self.group.evaluation is None:
                return measured_s * training.slowdown if training.is_measured else 0.0
            training = self.group.evaluation
        if training.seconds is not None:
            return training.slowdown * training.seconds.quantile(self._draw(f"work {kind}", message))
        if training.seconds_per_sample is not None:
            return training.slowdown * training.seconds_per_sample * samples
        return training.slowdown * measured_s

    def delay_s(self, message: int) -> float:
        """Return the delay after the training of *message*."""
        return self._sample(self.group.delay, "delay", message)

    # --- transfer -------------------------------------------------------------------------------

    def transfer(self, direction: Direction, message: int, start: float, size: int) -> Transfer:
        """Return when a message of *size* bytes arrives that is sent at *start*."""
        if self.is_dropped(direction, message):
            return Transfer(math.inf)
        needed_s = self.latency_s(direction, message) + self.retransmission_s(direction, message)
        return self._wait_for_connection(start, needed_s + size / self.rate_bytes_s(direction))

    def rate_bytes_s(self, direction: Direction) -> float:
        """Return the bandwidth in bytes per second; infinity without a limit."""
        limits = self.group.bandwidth
        megabits = limits.down_mbit_s if direction == "download" else limits.up_mbit_s
        return math.inf if megabits is None else megabits * BITS_OF_A_MEGABIT / 8

    def latency_s(self, direction: Direction, message: int) -> float:
        return self._sample(self.group.latency, f"latency {direction}", message)

    def is_dropped(self, direction: Direction, message: int) -> bool:
        """Return whether the message is lost for ever."""
        loss = self.group.loss
        return (
            loss is not None
            and loss.then == "drop"
            and self._draw(f"loss {direction}", message) < loss.probability
        )

    def retransmission_s(self, direction: Direction, message: int) -> float:
        """Return the time until the message gets through: r · (2ⁿ - 1) after n losses in a row."""
        loss = self.group.loss
        if loss is None or loss.then != "retransmit" or loss.probability == 0:
            return 0.0
        position = self._draw(f"loss {direction}", message)
        losses = min(int(math.log(position) / math.log(loss.probability)), MAX_RETRANSMISSIONS)
        return loss.retransmit_s * (2.0**losses - 1)

    def _wait_for_connection(self, start: float, needed_s: float) -> Transfer:
        """Return when a transfer that needs *needed_s* of connected time ends. It continues after an interruption."""
        connection, at, left_s = self.connection, start, needed_s
        if isinstance(connection, AlwaysOn):
            return Transfer(start + needed_s, needed_s)
        for _ in range(MAX_INTERRUPTIONS):
            change = connection.next_change(at)
            if connection.is_on(at):
                if at + left_s <= change:
                    return Transfer(at + left_s, needed_s, max(0.0, at + left_s - start - needed_s))
                left_s -= change - at
            if math.isinf(change):
                break
            at = change
        return Transfer(math.inf)

    # --- connection -----------------------------------------------------------------------------

    @cached_property
    def connection(self) -> ConnectionSchedule:
        """On while the client is available and its connection is not interrupted."""
        interruptions = self.group.disconnections
        if interruptions is None:
            return self.availability
        every_s, length = interruptions.every_s, interruptions.duration

        def duration(number: int, is_on: bool) -> float:  # noqa: FBT001 - the signature of `RandomSchedule`
            position = self._draw("disconnection", number)
            return every_s * exponential_quantile(position) if is_on else length.quantile(position)

        connected = RandomSchedule(duration)
        if isinstance(self.availability, AlwaysOn):
            return connected
        return AllOf([self.availability, connected])

    @cached_property
    def availability(self) -> ConnectionSchedule:
        pattern = self.group.availability
        if pattern is None:
            return AlwaysOn()
        if pattern.hours is not None:
            return self._daily_schedule(pattern)
        if pattern.intervals_s is not None:
            return PeriodicSchedule(pattern.intervals_s, pattern.repeat_s or math.inf)
        return self._random_schedule(pattern)

    def _daily_schedule(self, pattern: Availability) -> ConnectionSchedule:
        intervals = list[tuple[float, float]]()
        for start, stop in pattern.hours or ():
            intervals += [(start, stop)] if start < stop else [(0.0, stop), (start, DAY_S)]
        zone_s = 3600 * pattern.spread_h * self._draw("time zone", 0)
        return PeriodicSchedule(sorted(intervals), DAY_S, shift_s=self._time_of_day_s + zone_s)

    def _random_schedule(self, pattern: Availability) -> ConnectionSchedule:
        share = pattern.share or 1.0
        if share == 1:
            return AlwaysOn()

        def duration(number: int, is_on: bool) -> float:  # noqa: FBT001 - the signature of `RandomSchedule`
            mean_s = pattern.period_s * (share if is_on else 1 - share)
            return mean_s * exponential_quantile(self._draw("availability", number))

        return RandomSchedule(duration, starts_on=self._draw("available at first", 0) < share)

    # --- random values --------------------------------------------------------------------------

    def _sample(self, delay: AnyDelay | None, purpose: str, message: int) -> float:
        if delay is None or self._draw(f"{purpose} occurs", message) >= delay.probability:
            return 0.0
        return delay.quantile(self._draw(purpose, message))

    def _draw(self, purpose: str, number: int) -> float:
        return draw_uniform(self._seed, self.client, purpose, number)


def mean_s(duration: AnyDuration | None) -> float:
    """Return the mean of a duration or delay without its probability; 0 for None."""
    return 0.0 if duration is None else duration.mean_s
