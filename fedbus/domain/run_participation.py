"""Whether a client joins a run that invites it. Every decline has a reason."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from fedbus.contracts.client import ClientState
from fedbus.contracts.server import UpdateReady

MAX_FAILURES = 2
MAX_NAMED_CLIENTS = 5
"""Declined clients that a recruiting summary names; it counts the others."""


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
    count = f"{len(joined)} of {wanted} clients joined in time ({', '.join(joined) or 'none'})"
    reasons = [f"{client} cannot load the task's code: {reason}" for client, reason in sorted(failed.items())]
    more = (
        [f"{len(reasons) - MAX_NAMED_CLIENTS} more cannot load it"]
        if len(reasons) > MAX_NAMED_CLIENTS
        else []
    )
    others = [
        f"{client} declined: {reason}" for client, reason in sorted(declined.items()) if client not in failed
    ]
    more_declined = (
        [f"{len(others) - MAX_NAMED_CLIENTS} more declined"] if len(others) > MAX_NAMED_CLIENTS else []
    )
    return "; ".join(
        [count, *reasons[:MAX_NAMED_CLIENTS], *more, *others[:MAX_NAMED_CLIENTS], *more_declined]
    )


def will_serve_soon(state: ClientState) -> bool:
    """Return whether serving is the next state of a client in *state*, so that it keeps an invitation."""
    return state in (ClientState.S0, ClientState.PENDING_APPLICATION, ClientState.SYNCING)


def short_version(version: str) -> str:
    """Shorten a code version for people to read."""
    return version.removeprefix("sha256:")[:12] or "(none)"
