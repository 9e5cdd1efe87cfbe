"""What a nats-server reads: that of the federation, and that of a leaf node at a site.

Both are made from the same claims, so a device's kit is good at either. A leaf carries what its
clients say to the federation's server and keeps nothing itself: streams and consumers stay
where they are, and so no JetStream domain is needed.

A leaf is told who was put out by the server: at once where it is connected, else when it comes back. That
goes over a second connection, of the broker's own account, where its key is good for nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.app.provision.registry import MONITOR_PORT
from fedbus.contracts.permissions import Permissions

LEAF_PORT_OFFSET: Final = 3200
"""4222 for clients and 7422 for leaf nodes, as everywhere with NATS."""

HUB_CONFIG: Final = """\
# Written by `fedbus provision`; made anew by each change of who belongs to the federation.
server_name: {name}
listen: {listen}
http: "127.0.0.1:{monitor_port}"
max_payload: 8MB      # a chunk of a blob is up to 4 MB; the default of 1 MB is too small
max_pending: 256MB    # a window of chunks for a slow reader; the default of 64 MB cuts it off
tls {{
    cert_file: {cert}
    key_file: {key}
}}
jetstream {{
    store_dir: {store}
    sync_interval: always    # events are few, and must outlive a power cut
    strict: true             # a request with a field too many is no request
}}
leafnodes {{
    listen: {leaf_listen}
    tls {{
        cert_file: {cert}
        key_file: {key}
    }}
}}
operator: {operator}
system_account: {system}
resolver {{ type: full, dir: {resolver}, allow_delete: false }}
resolver_preload {{
    {system}: {system_jwt}
    {account}: {account_jwt}
}}
"""

LEAF_CONFIG: Final = """\
# A leaf node for the site {site}: its clients connect here, and one connection goes out to the federation.
# Written by `fedbus provision site`. Start it with: nats-server -c leaf.conf
server_name: {name}
listen: {listen}
max_payload: 8MB
max_pending: 256MB
tls {{
    cert_file: {cert}
    key_file: {key}
}}
leafnodes {{
    remotes: [
        {{
            url: {url}
            account: {account}
            credentials: {creds}
            tls {{ ca_file: {ca} }}
        }}
        {{
            url: {url}
            account: {system}    # by this one it hears who was put out, and puts them out itself
            credentials: {system_creds}
            tls {{ ca_file: {ca} }}
        }}
    ]
}}
operator: {operator}
system_account: {system}
resolver {{ type: full, dir: {accounts}, allow_delete: false, interval: "15s" }}
resolver_preload {{
    {system}: {system_jwt}
    {account}: {account_jwt}
}}
"""

LEAF_PERMISSIONS: Final = Permissions(
    publish=("$SYS.REQ.CLAIMS.PACK",), subscribe=("$SYS.REQ.CLAIMS.UPDATE", "$SYS._INBOX.>")
)
"""What a leaf may in the broker's own account: ask which claims are new, and hear of new ones."""


@dataclass(frozen=True)
class ServerClaims:
    """What every nats-server of the federation must know."""

    operator: str
    system: str
    system_jwt: str
    account: str
    account_jwt: str


@dataclass(frozen=True)
class ServerLocation:
    """Where a nats-server runs, and where its files are on that machine."""

    directory: Path
    port: int
    listen: str = "0.0.0.0"  # noqa: S104 (with credentials and TLS: the federation is not on one machine)
    monitor_port: int = MONITOR_PORT


def render_hub_config(name: str, place: ServerLocation, claims: ServerClaims) -> str:
    """The configuration of the federation's nats-server."""
    return HUB_CONFIG.format(
        name=json.dumps(name),
        listen=json.dumps(f"{place.listen}:{place.port}"),
        leaf_listen=json.dumps(f"{place.listen}:{leaf_port(place.port)}"),
        monitor_port=place.monitor_port,
        cert=_quoted_path(place, "tls/server.pem"),
        key=_quoted_path(place, "tls/server.key"),
        store=_quoted_path(place, "data"),
        resolver=_quoted_path(place, "accounts"),
        **vars(claims),
    )


def render_leaf_config(site: str, place: ServerLocation, claims: ServerClaims, *, url: str) -> str:
    """The configuration of a leaf node; *url* is where the federation's server takes leaf nodes."""
    return LEAF_CONFIG.format(
        site=site,
        name=json.dumps(f"fedbus-leaf-{site}"),
        listen=json.dumps(f"{place.listen}:{place.port}"),
        cert=_quoted_path(place, "server.pem"),
        key=_quoted_path(place, "server.key"),
        creds=_quoted_path(place, "site.creds"),
        system_creds=_quoted_path(place, "system.creds"),
        accounts=_quoted_path(place, "accounts"),
        ca=_quoted_path(place, "ca.pem"),
        url=json.dumps(url),
        **vars(claims),
    )


def leaf_port(port: int) -> int:
    return port + LEAF_PORT_OFFSET if port + LEAF_PORT_OFFSET < 65536 else port - LEAF_PORT_OFFSET


def _quoted_path(place: ServerLocation, name: str) -> str:
    return json.dumps(str(place.directory / name))
