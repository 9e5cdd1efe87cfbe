"""Telling a running nats-server that an account has changed: it takes effect at once, for those connected too."""

import json
from typing import Final

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from fedbus.bus.access import Access
from fedbus.bus.connection import connection
from fedbus.bus.errors import BusError

UPDATE: Final = "$SYS.REQ.CLAIMS.UPDATE"
ANSWER_S: Final = 5.0


class AccountRefused(BusError):
    """The server would not have the account's new claims."""


async def push_account(url: str, access: Access, jwt: str) -> None:
    """Have the server at *url* go by *jwt* from now on. *access* is that of the system account.

    Whoever it puts out is disconnected. Raises BusUnreachable, AccessDenied and AccountRefused.
    """
    async with connection(
        url, name="fedbus provision", inbox="_INBOX.provision", options=access.options()
    ) as bus:
        try:
            reply = await bus.client.request(UPDATE, jwt.encode(), timeout=ANSWER_S)
        except NoRespondersError:
            raise AccountRefused(f"{url} keeps no accounts: its resolver must be of type full") from None
        except NatsError as error:
            raise AccountRefused(f"{url} did not answer within {ANSWER_S:g} s: {error}") from None
    answer = json.loads(reply.data)
    if "error" in answer:
        raise AccountRefused(
            f"{url} would not have the account: {answer['error'].get('description', answer['error'])}"
        )
