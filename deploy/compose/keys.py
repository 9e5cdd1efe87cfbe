"""Create the identities and secrets of the compose stack, and set the owners of its volumes. Runs first.

Creates the federation's keys, certificates and the bus configuration (`fedbus provision`), a kit for each client, the
key of the S3 and the token of the dashboard, and copies each into the volume of its user. The signing
keys stay in the volume `authority`, which only the service `provision` mounts.

Runs as root with only the capability to change owners; all other services run as user 10001.
Existing secrets are not created again, but copied again: the next `docker compose up` distributes what
`provision` has renewed.
"""

import json
import os
import secrets
import shutil
import subprocess
from pathlib import Path

USER = 10001
CLIENTS = ("c1", "c2", "c3")
ROLES = {
    "server-manager": "server-manager",
    "workflow-scheduler": "workflow-scheduler",
    "flower-server": "flower-server",
    "training-monitor": "training-monitor",
    "dashboard": "gateway",
    "people": "user",
}
"""The role whose credentials are in the volume NAME-keys."""
OPEN_THE_S3 = ("server-manager", "flower-server", "dashboard")
VOLUMES = Path("/volumes")
FEDERATION = VOLUMES / "authority" / "federation"
"""The directory of `provision`: trust/, kits/ of clients, certificates/, the S3 key and the token."""


def make_federation(folder: Path) -> None:
    """Create everything or nothing: an interrupted start begins again."""
    part = folder.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    provision(part, "init", "--host", "nats", *local_names(), "--url", "tls://nats:4222", "--at", "/nats")
    for client in CLIENTS:
        provision(part, "client", client, "--days", "0", "--out", part / "kits" / client)
    make_s3_key(part)
    (part / "token").write_text(f"{secrets.token_hex(16)}\n")
    part.rename(folder)


def make_certificates(folder: Path) -> None:
    """Create the certificates of the S3 and the dashboard, if they do not exist; delete them to renew them."""
    if not (made := folder / "certificates").exists():
        part = folder / "certificates.part"
        shutil.rmtree(part, ignore_errors=True)
        for server in ("s3", "dashboard"):
            provision(folder, "certificate", "--host", server, *local_names(), "--out", part / server)
        part.rename(made)


def provision(folder: Path, *arguments: str | Path) -> None:
    subprocess.run(["fedbus", "provision", *arguments, "--trust", folder / "trust"], check=True)


def local_names() -> tuple[str, ...]:
    """The host names of the loopback interface."""
    return ("--host", "localhost", "--host", "127.0.0.1")


def make_s3_key(folder: Path) -> None:
    """Create one key, in the format of SeaweedFS, and in the format of AWS for the server's agents."""
    key, secret = f"fedbus{secrets.token_hex(8)}", secrets.token_urlsafe(32)
    identity = {
        "name": "fedbus",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3-credentials").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    )
    (folder / "identity.json").write_text(json.dumps({"identities": [identity]}))


def distribute(made: Path) -> None:
    """Copy each secret into the volume of its user."""
    trust = made / "trust"
    shutil.copytree(trust / "nats", VOLUMES / "nats", dirs_exist_ok=True)
    for client in CLIENTS:
        shutil.copytree(made / "kits" / client, VOLUMES / f"{client}-kit", dirs_exist_ok=True)
    for name, role in ROLES.items():
        volume = VOLUMES / f"{name}-keys"
        shutil.copy(trust / "creds" / f"{role}.creds", volume / "bus.creds")
        shutil.copy(trust / "tls" / "ca.pem", volume)
        if name in OPEN_THE_S3:
            shutil.copy(made / "s3-credentials", volume)
    for server, own in (("s3", "identity.json"), ("dashboard", "token")):
        shutil.copy(made / own, VOLUMES / f"{server}-keys")
        shutil.copytree(made / "certificates" / server, VOLUMES / f"{server}-keys", dirs_exist_ok=True)


os.umask(0o077)
if not FEDERATION.exists():
    make_federation(FEDERATION)
make_certificates(FEDERATION)
distribute(FEDERATION)
for volume in VOLUMES.iterdir():
    for path in (volume, *volume.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
