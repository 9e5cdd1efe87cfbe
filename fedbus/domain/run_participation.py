"""Whether a client joins a run that invites it. Every decline has a reason."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from fedbus.contracts.client import ClientState
from fedbus.contracts.server import UpdateReady

MAX_FAILURES = 2
MAX_NAMED_CLIENTS = 5
"""Clients with a reason that a recruiting summary names; it counts the others."""
MAX_REASON_CHARS = 500
"""The limit of each reason in a recruiting summary: a client may send a text of any length."""


def decline_reason(
    invitation: UpdateReady, *, state: ClientState, code_version: str, failures: int, now: datetime
) -> str | None:
    """Return why the client declines the run; None if it joins.

    A client that is not serving is busy with its model or its code; the server may invite it again later.
    Updates from different code versions cannot be aggregated. *failures* counts the failures of the client in
    this run; from `MAX_FAILURES` on it declines.
    """
    if invitation.recruit_until <= now:
        return f"recruiting for {invitation.run} ended at {invitation.recruit_until:%H:%M:%S}"
    if invitation.code_version and invitation.code_version != code_version:
        wanted, own = short_version(invitation.code_version), short_version(code_version)
        return f"the run is on code {wanted}, this client on {own}"
    if failures >= MAX_FAILURES:
        return f"this client has failed {failures} times in {invitation.run}"
    if state is not ClientState.SERVING:
        return f"this client is {state}"
    return None


def recruiting_summary(
    joined: Sequence[str],
    wanted: int,
    declined: Mapping[str, str],
    load_failures: Mapping[str, str] | None = None,
) -> str:
    """Describe why a run missed its quorum of *wanted* clients.

    Args:
        joined: The clients that joined.
        wanted: The quorum.
        declined: The reasons of the clients that declined.
        load_failures: The reasons of the clients that cannot load the task's code.

    """
    failed = load_failures or {}
    others = {client: reason for client, reason in declined.items() if client not in failed}
    return "; ".join(
        [
            f"{len(joined)} of {wanted} clients joined in time ({_list_clients(joined)})",
            *_name_clients(failed, "cannot load the task's code", more="cannot load it"),
            *_name_clients(others, "declined", more="declined"),
        ]
    )


def _list_clients(clients: Sequence[str]) -> str:
    """Return the first of *clients*, and the number of the others."""
    names, count = ", ".join(clients[:MAX_NAMED_CLIENTS]), len(clients) - MAX_NAMED_CLIENTS
    return f"{names} and {count} more" if count > 0 else names or "none"


def _name_clients(reasons: Mapping[str, str], what: str, *, more: str) -> list[str]:
    """Return one text for each of the first clients with its reason, and one for the number of the others."""
    named = [f"{client} {what}: {reasons[client][:MAX_REASON_CHARS]}" for client in sorted(reasons)]
    count = len(named) - MAX_NAMED_CLIENTS
    return named[:MAX_NAMED_CLIENTS] + ([f"{count} more {more}"] if count > 0 else [])


def will_serve_soon(state: ClientState) -> bool:
    """Return whether serving is the next state of a client in *state*, so that it keeps an invitation."""
    return state in (ClientState.S0, ClientState.PENDING_APPLICATION, ClientState.SYNCING)


def short_version(version: str) -> str:
    """Shorten a code version for people to read."""
    return version.removeprefix("sha256:")[:12] or "(none)"
