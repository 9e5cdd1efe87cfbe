"""Which client belongs to which group of a profile.

Names come first, then counts, then shares; the group without any of them takes all others. Counts and shares draw
clients at random with the seed, so that a group does not depend on the order of the data partitions.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from fedbus.simulation.profiles.draws import draw_uniform
from fedbus.simulation.profiles.errors import ProfileError
from fedbus.simulation.profiles.schema import Group, Profile

NO_GROUP: Final = ""
"""The group of clients that no group of the profile takes: they have no delays and no limits."""


def assign_groups(profile: Profile, clients: Sequence[str], seed: int) -> dict[str, str]:
    """Return the group of each client, in the order of *clients*.

    Raises:
        ProfileError: no client has the names of a group, or the counts exceed the clients.

    """
    groups = {client: _group_by_name(profile, client) for client in clients}
    for name, group in profile.groups.items():
        if group.clients is not None and name not in groups.values():
            raise ProfileError(
                f"group {name!r}: no client matches {', '.join(map(repr, group.clients))}. "
                f"The clients are {_abbreviate(clients)}"
            )
    free = sorted(
        (client for client, group in groups.items() if group is None),
        key=lambda client: (draw_uniform(seed, client, "group", 0), client),
    )
    for name, count in _sizes(profile, len(clients), len(free)).items():
        taken, free = free[:count], free[count:]
        groups.update(dict.fromkeys(taken, name))
    rest = _rest_group(profile)
    return {client: rest if group is None else group for client, group in groups.items()}


def group_of_device(profile: Profile, client: str, seed: int) -> str:
    """Return the group of one device, which does not know the other clients. A share is its probability.

    Raises:
        ProfileError: the profile has a group by count.

    """
    named = _group_by_name(profile, client)
    if named is not None:
        return named
    counted = [name for name, group in profile.groups.items() if group.count is not None]
    if counted:
        raise ProfileError(
            f"the group of {client} is not known: {', '.join(map(repr, counted))} has a number of clients, and a "
            f"device does not know the others. Choose its group: {', '.join(profile.groups)}"
        )
    position = draw_uniform(seed, client, "group", 0)
    for name, group in profile.groups.items():
        position -= group.share or 0.0
        if group.share is not None and position < 0:
            return name
    return _rest_group(profile)


def _group_by_name(profile: Profile, client: str) -> str | None:
    for name, group in profile.groups.items():
        if group.clients is not None and any(fnmatchcase(client, pattern) for pattern in group.clients):
            return name
    return None


def _rest_group(profile: Profile) -> str:
    return next((name for name, group in profile.groups.items() if group.is_rest), NO_GROUP)


def _sizes(profile: Profile, clients: int, free: int) -> dict[str, int]:
    """Return the number of clients of each group by count or share. Shares are of all clients."""
    sizes = {name: group.count for name, group in profile.groups.items() if group.count is not None}
    if sum(sizes.values()) > free:
        raise ProfileError(
            f"the groups {', '.join(sizes)} have {sum(sizes.values())} clients in total, and only {free} of "
            f"{clients} are left for them. Use more clients, or `share` instead of `count`"
        )
    free -= sum(sizes.values())
    shares = {name: group.share for name, group in profile.groups.items() if group.share is not None}
    return sizes | _round_shares(shares, clients, free)


def _round_shares(shares: dict[str, float], clients: int, free: int) -> dict[str, int]:
    """Round by largest remainder; at most *free* in total."""
    exact = {name: share * clients for name, share in shares.items()}
    sizes = {name: int(size + 1e-9) for name, size in exact.items()}
    total = min(round(sum(exact.values())), free)
    by_remainder = sorted(exact, key=lambda name: sizes[name] - exact[name])
    for name in by_remainder[: max(0, total - sum(sizes.values()))]:
        sizes[name] += 1
    for name in reversed(list(sizes)):  # the named and counted clients leave too few
        sizes[name] -= min(sizes[name], max(0, sum(sizes.values()) - free))
    return sizes


def _abbreviate(clients: Sequence[str]) -> str:
    if not clients:
        return "none"
    return ", ".join(clients) if len(clients) <= 4 else f"{clients[0]} … {clients[-1]}"


def unlimited_group() -> Group:
    """Return the conditions of `NO_GROUP`."""
    return Group()
