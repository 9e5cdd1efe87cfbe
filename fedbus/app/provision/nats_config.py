"""The configuration of the federation's nats-server (the hub), and of a leaf node at a site.

Both have the same claims, so a kit is valid at both. A leaf node forwards the messages of its clients to the hub and
stores none: streams and consumers are at the hub, so no JetStream domain is needed.

The leaf node receives revocations from the hub: at once if it is connected, else when it reconnects. It uses a second
connection for this, in the system account, with a key that permits nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.app.provision.registry import MONITOR_PORT
from fedbus.contracts.permissions import Permissions

LEAF_PORT_OFFSET: Final = 3200
"""From the client port to the leaf node port: the defaults of NATS are 4222 and 7422."""

HUB_CONFIG: Final = """\
# Written by `fedbus provision`; each change of members overwrites it.
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
    strict: true             # reject requests with unknown fields
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
# The leaf node of site {site}: clients connect here; it connects to the nats-server of the federation.
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
            account: {system}    # receives revocations
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
"""Permissions of a leaf node in the system account: request and receive account claims."""


@dataclass(frozen=True)
class ServerClaims:
    """The claims in the configuration of every nats-server of the federation."""

    operator: str
    system: str
    system_jwt: str
    account: str
    account_jwt: str


@dataclass(frozen=True)
class ServerLocation:
    """The addresses of a nats-server, and the directory of its files on its machine."""

    directory: Path
    port: int
    listen: str = "0.0.0.0"  # noqa: S104 (with credentials and TLS: the federation is not on one machine)
    monitor_port: int = MONITOR_PORT


def render_hub_config(name: str, place: ServerLocation, claims: ServerClaims) -> str:
    """Render the configuration of the federation's nats-server."""
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
    """Render the configuration of a leaf node; *url* is the leaf node port of the hub."""
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
