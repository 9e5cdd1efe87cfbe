"""Push updated account JWTs to a running nats-server; they take effect at once, also for open connections."""

import json
from collections.abc import Sequence
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import BusError
from fedbus.bus.nats.connection import open_connection

CLAIMS_UPDATE_SUBJECT: Final = "$SYS.REQ.CLAIMS.UPDATE"
REPLY_TIMEOUT_S: Final = 5.0


class AccountUpdateRejected(BusError):
    """The server rejected the new claims of the account."""


async def push_account_jwts(url: str, access: BusAccess, jwts: Sequence[str], *, host: str = "") -> None:
    """Replace the accounts of the server at *url* with *jwts*. Revoked users are disconnected, on leaf nodes too.

    Args:
        url: The address of the server.
        access: The credentials of the system account.
        jwts: The account JWTs.
        host: The name in the server's certificate, if it is not the host in *url*.

    Raises:
        BusUnreachable: No nats-server responds at *url*.
        AccessDenied: The server rejected the connection.
        AccountUpdateRejected: The server rejected the claims.

    """
    options = access.connect_options() | ({"tls_hostname": host} if host else {})
    async with open_connection(
        url, name="fedbus provision", inbox="_INBOX.provision", options=options
    ) as connection:
        for jwt in jwts:
            await _push(connection.client, url, jwt)


async def _push(client: Client, url: str, jwt: str) -> None:
    try:
        reply = await client.request(CLAIMS_UPDATE_SUBJECT, jwt.encode(), timeout=REPLY_TIMEOUT_S)
    except NoRespondersError:
        raise AccountUpdateRejected(
            f"{url} does not store accounts: set its account resolver to type full"
        ) from None
    except NatsError as error:
        raise AccountUpdateRejected(f"{url} did not answer within {REPLY_TIMEOUT_S:g} s: {error}") from None
    answer = json.loads(reply.data)
    if "error" in answer:
        raise AccountUpdateRejected(
            f"{url} rejected the account: {answer['error'].get('description', answer['error'])}"
        )
