"""`fedbus profile`: built-in profiles, and what a profile means for a number of clients."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Final

import typer

from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json
from fedbus.simulation.profiles.assignment import NO_GROUP
from fedbus.simulation.profiles.conditions import Conditions
from fedbus.simulation.profiles.describe import NONE, describe_group
from fedbus.simulation.profiles.reader import builtin_profiles, load_profile, profile_text
from fedbus.simulation.profiles.schema import Group, Profile

CONDITIONS: Final = tuple(describe_group(Group()))
"""The kinds of conditions, which are the rows of the table; each group is a column."""
WITHOUT_GROUP: Final = "(no group)"

Source = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or the name of a built-in profile; with parameters: NAME:key=value,key=value."
    ),
]
Clients = Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of clients.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the groups.", show_default="the profile's")]


def ls(*, json: output.JsonOption = False) -> None:
    """List the built-in profiles."""
    profiles = {name: load_profile(name) for name in builtin_profiles()}
    if json:
        print_json([{"name": name, **profile.model_dump(mode="json")} for name, profile in profiles.items()])
        return
    output.print_table(
        ("name", "groups", "parameters", "description"),
        [
            (
                name,
                ", ".join(profile.groups),
                ", ".join(f"{key}={value}" for key, value in profile.parameters.items()) or "-",
                profile.description,
            )
            for name, profile in profiles.items()
        ],
        empty="no built-in profiles",
    )


def show(
    profile: Source,
    *,
    clients: Clients = 100,
    seed: Seed = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print the file, to copy and change it.")] = False,
    json: output.JsonOption = False,
) -> None:
    """Show the groups of a profile: the number of clients of each, and their conditions."""
    if yaml:
        print(profile_text(profile), end="")
        return
    loaded = load_profile(profile)
    sizes = _group_sizes(loaded, clients, seed)
    if json:
        print_json({**loaded.model_dump(mode="json"), "clients": sizes})
        return
    about = f"{profile}: {loaded.description}" if loaded.description else profile
    output.console().print(about, highlight=False, markup=False, soft_wrap=True)
    conditions = {name: describe_group(loaded.groups.get(name, Group())) for name in sizes}
    kinds = [kind for kind in CONDITIONS if any(texts[kind] != NONE for texts in conditions.values())]
    output.print_table(
        ("group", *(name or WITHOUT_GROUP for name in sizes)),
        [
            ("clients", *sizes.values()),
            *((kind, *(conditions[name][kind] for name in sizes)) for kind in kinds),
        ],
        empty="no groups",
    )


def check(profile: Source, *, clients: Clients = 100, seed: Seed = None) -> None:
    """Check a profile: its keys and values, and that its groups fit a number of clients."""
    loaded = load_profile(profile)
    _group_sizes(loaded, clients, seed)
    output.console().print(f"{profile} is valid: {pluralize(len(loaded.groups), 'group')}", highlight=False)


def _group_sizes(profile: Profile, clients: int, seed: int | None) -> Mapping[str, int | str]:
    """Return the number of clients of each group. If names choose the clients, their number is not known."""
    if any(group.clients is not None for group in profile.groups.values()):
        return {name: _describe_selection(group) for name, group in profile.groups.items()}
    width = max(4, len(str(clients - 1)))
    names = [f"client-{number:0{width}}" for number in range(clients)]
    counts = Counter(Conditions(profile, names, seed=seed).groups.values())
    without = {NO_GROUP: counts[NO_GROUP]} if counts[NO_GROUP] else {}
    return {name: counts[name] for name in profile.groups} | without


def _describe_selection(group: Group) -> int | str:
    if group.clients is not None:
        return ", ".join(group.clients)
    if group.share is not None:
        return f"{100 * group.share:.3g} %"
    return "the others" if group.count is None else group.count
