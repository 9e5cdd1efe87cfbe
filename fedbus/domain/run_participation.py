"""Whether a client takes part in a run that invites it. Every no has its reason, in words."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from fedbus.contracts.client import ClientState
from fedbus.contracts.server import UpdateReady

MAX_FAILURES = 2
MAX_NAMED_CLIENTS = 5
"""Clients whose reasons are told at once."""


def decline_reason(
    invitation: UpdateReady, *, state: ClientState, code_version: str, failures: int, now: datetime
) -> str | None:
    """Why the client does not join, or None: then it does.

    A client that is not serving is busy with its model or its code; who asks may ask again when it
    serves. Another code version would make the aggregate meaningless. *failures* counts how often the
    client has failed in this very run: what broke it twice will break it again.
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


def recruiting_summary(joined: Sequence[str], wanted: int, declined: Mapping[str, str]) -> str:
    """Why a run found too few clients: who *joined*, of so many that were *wanted*, and who *declined*, and why."""
    came = f"{len(joined)} of {wanted} clients joined in time ({', '.join(joined) or 'nobody'})"
    noes = [f"{client} declined: {reason}" for client, reason in sorted(declined.items())]
    more = [f"{len(noes) - MAX_NAMED_CLIENTS} more declined"] if len(noes) > MAX_NAMED_CLIENTS else []
    return "; ".join([came, *noes[:MAX_NAMED_CLIENTS], *more])


def will_serve_soon(state: ClientState) -> bool:
    """Whether a client in *state* will be serving soon, so that an invitation is worth keeping."""
    return state in (ClientState.S0, ClientState.PENDING_APPLICATION, ClientState.SYNCING)


def short_version(version: str) -> str:
    """A code version as a person reads it."""
    return version.removeprefix("sha256:")[:12] or "(none)"
