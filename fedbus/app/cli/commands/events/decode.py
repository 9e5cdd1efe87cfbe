"""`fedbus events decode`: one message body as JSON.

`nats sub --translate` starts it for every message, so it imports little.
"""

import sys

from fedbus.app.failures import CliError
from fedbus.app.terminal.plain import print_json
from fedbus.contracts.envelope import MAX_EVENT_BYTES, unpack


def decode() -> None:
    """Print the msgpack body on standard input as JSON: nats sub '…' --translate 'fedbus events decode'."""
    if sys.stdin.isatty():
        raise CliError(
            "standard input is a terminal. Use it as: nats sub 'fedbus.>' --translate 'fedbus events decode'"
        )
    print_json(unpack(sys.stdin.buffer.read(MAX_EVENT_BYTES + 1)))
