"""The clients whose replies differ from the others. Flower's error about inconsistent replies names no client."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from flwr.app import ConfigRecord, Message, RecordDict

MAX_NAMED_CLIENTS: Final = 5
Layout: TypeAlias = tuple[tuple[str, str, tuple[str, ...]], ...]
"""The records of a reply: name, type and sorted keys."""


def describe_differences(replies: Sequence[Message], client_of: Callable[[int], str]) -> str:
    """Return the clients whose replies differ from most others, and the first difference; else what all have."""
    layouts = [
        (client_of(one.metadata.src_node_id), _layout_of(one.content))
        for one in replies
        if not one.has_error()
    ]
    if not layouts:
        return "there is no reply"
    usual, _ = Counter(layout for _, layout in layouts).most_common(1)[0]
    others = [(client, layout) for client, layout in layouts if layout != usual]
    if not others:
        return f"each reply has {_describe(usual)}"
    names = ", ".join(client for client, _ in others[:MAX_NAMED_CLIENTS])
    more = f" and {len(others) - MAX_NAMED_CLIENTS} more" if len(others) > MAX_NAMED_CLIENTS else ""
    reference = next(client for client, layout in layouts if layout == usual)
    (client, layout), *_ = others
    return f"differing: {names}{more}. {client} {_first_difference(layout, usual)}, unlike {reference}"


def _layout_of(content: RecordDict) -> Layout:
    return tuple(
        (name, type(record).__name__, tuple(sorted(record)))
        for name, record in sorted(content.items())
        if not isinstance(record, ConfigRecord)
    )


def _first_difference(layout: Layout, usual: Layout) -> str:
    own = {(name, kind): keys for name, kind, keys in layout}
    expected = {(name, kind): keys for name, kind, keys in usual}
    for name, kind in sorted(own.keys() ^ expected.keys()):
        return f"{'has' if (name, kind) in own else 'lacks'} the {kind} {name!r}"
    for (name, kind), keys in sorted(own.items()):
        for key in sorted(set(keys) ^ set(expected[name, kind])):
            return f"{'has' if key in keys else 'lacks'} {key!r} in the {kind} {name!r}"
    return "has the same records"


def _describe(layout: Layout) -> str:
    return "; ".join(
        f"the {kind} {name!r} with {', '.join(keys[:12]) or 'no keys'}" for name, kind, keys in layout
    )
