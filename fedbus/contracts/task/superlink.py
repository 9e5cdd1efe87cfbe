"""The server that the library `flower-superlink` starts for a run: the table ``[tool.fedbus.superlink]``."""

import ipaddress
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from fedbus.contracts.task.base import ConfigSection

LOOPBACK: Final = "127.0.0.1"
ALL_INTERFACES: Final = "0.0.0.0"  # noqa: S104 - devices connect from other machines

Host = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?$", max_length=253)
]


class SuperLinkTable(ConfigSection):
    """Where the SuperLink of a run listens. Only the library `flower-superlink` uses it."""

    address: Host = LOOPBACK
    """The host name or IP address by which devices reach the machine of the run's server side. Default: devices on the
    same machine only."""
    port: int = Field(default=0, ge=0, le=65_535)
    """The TCP port of the SuperLink, which a firewall must let devices reach; 0: a free one. Two tasks that run on one
    machine at the same time need two ports."""
    bind: Host | None = None
    """The address on which it listens. Default: all interfaces, or only the loopback interface if *address* is
    one of it."""

    @property
    def bind_address(self) -> str:
        """The address on which the SuperLink listens."""
        return self.bind or (LOOPBACK if is_loopback(self.address) else ALL_INTERFACES)


def is_loopback(host: str) -> bool:
    """Return whether *host* is an address or the name of the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
