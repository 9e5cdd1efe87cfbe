"""The processes of Flower: ``python -m fedbus.learning.flower_superlink.child superlink|supernode|check ARGUMENTS``.

Each runs Flower's own command, or imports the ClientApp, and ends when its parent has ended: the parent holds the other
end of its standard input. A SuperLink serves three APIs on one port, and its Control API has no authentication without
an account plugin. So it gets a middleware that answers other machines only on the paths of the Fleet API, on which
SuperNodes authenticate.
"""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

Scope = MutableMapping[str, Any]
AsgiApp = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

FLEET_PATH: Final = "/v1/fleet/"
LOOPBACK_ADDRESSES: Final = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
DIRECTORY_VARIABLE: Final = "FEDBUS_SUPERLINK_DIRECTORY"
"""The environment variable with the directory for the files of one run: keys, and installed app bundles."""


class FleetOnly:
    """An ASGI middleware that answers other machines only on the paths of the Fleet API."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan" or _is_allowed(scope):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b"only the Fleet API is open to other machines"})


def _is_allowed(scope: Scope) -> bool:
    client = scope.get("client")
    is_local = client is not None and client[0] in LOOPBACK_ADDRESSES
    path = str(scope.get("path", ""))
    return scope["type"] == "http" and (is_local or (path.startswith(FLEET_PATH) and ".." not in path))


def end_with_parent() -> None:
    """Kill this process and its descendants when its standard input closes, and remove the files of the run.

    They have nothing to save: the run has ended, or is recovered without them.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE, "")

    def watch() -> None:
        while os.read(0, 4096):
            pass
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if directory:  # last, since the other processes write to it
            shutil.rmtree(directory, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def main() -> None:
    end_with_parent()
    program = sys.argv.pop(1)
    if program == "check":
        from fedbus.learning.flower_superlink import client_app  # noqa: PLC0415 - with Flower, after the watch has begun

        client_app.check(Path(sys.argv[1]))
        return
    from starlette.middleware import Middleware  # noqa: PLC0415 - the same

    from fedbus.learning.flower_superlink import private_api  # noqa: PLC0415

    sys.argv[0] = f"flower-{program}"
    match program:
        case "superlink":
            private_api.serve_superlink([Middleware(FleetOnly)])
        case "supernode":
            private_api.serve_supernode()
        case _:
            sys.exit(f"unknown program {program!r} (known: superlink, supernode, check)")


if __name__ == "__main__":
    main()
