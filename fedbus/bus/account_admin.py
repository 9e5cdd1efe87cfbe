"""Telling a running nats-server that an account has changed: it takes effect at once, for those connected too."""

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
    """Have the server at *url* go by *jwts* from now on. *access* is that of the system account.

    *host*: the name that its certificate is for, where that is not the one in *url*. Whoever is put out is
    disconnected, by the leaf nodes too. Raises BusUnreachable, AccessDenied and AccountRefused.
    """
    options = access.options() | ({"tls_hostname": host} if host else {})
    async with open_connection(
        url, name="fedbus provision", inbox="_INBOX.provision", options=options
    ) as bus:
        for jwt in jwts:
            await _push(bus.client, url, jwt)


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
