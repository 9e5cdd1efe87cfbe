"""The first thing that runs in the compose stack: who belongs to it, and volumes that each may write.

Makes the federation's keys, certificates and the bus's settings (`fedbus provision`), a kit for each client, and the
key of the S3, each into the volume of who needs it and nobody else. The keys that make other keys stay in the
volume `authority`, which nothing else mounts.

Started as root with nothing but the right to change owners; everything after it runs as user 10001.
What is there already stays as it is.
"""

import json
import os
import secrets
import shutil
import subprocess
from pathlib import Path

USER = 10001
CLIENTS = ("c1", "c2", "c3")
VOLUMES = Path("/volumes")
AUTHORITY, NATS, S3 = VOLUMES / "authority", VOLUMES / "nats", VOLUMES / "s3-keys"
SERVER, DASHBOARD, PEOPLE = VOLUMES / "server-keys", VOLUMES / "dashboard-keys", VOLUMES / "people-keys"
TRUST = AUTHORITY / "trust"


def provision(*arguments: str) -> None:
    subprocess.run(["fedbus", "provision", *arguments, "--trust", TRUST], check=True)


def make_federation() -> None:
    """All of it, or nothing: a start that was cut off begins anew."""
    shutil.rmtree(TRUST, ignore_errors=True)
    provision("init", "--host", "nats", "--host", "localhost", "--url", "tls://nats:4222", "--at", "/nats")
    shutil.copytree(TRUST / "nats", NATS, dirs_exist_ok=True)
    for volume, role in ((SERVER, "server"), (DASHBOARD, "gateway"), (PEOPLE, "user")):
        shutil.copy(TRUST / "creds" / f"{role}.creds", volume / "bus.creds")
        shutil.copy(TRUST / "tls" / "ca.pem", volume)
    for client in CLIENTS:
        kit = VOLUMES / f"{client}-kit"
        provision("client", client, "--days", "0", "--out", str(AUTHORITY / client))
        shutil.copytree(AUTHORITY / client, kit, dirs_exist_ok=True)


def make_s3_key() -> None:
    """One key, for SeaweedFS as it writes keys and for the server's agents as AWS does."""
    key, secret = f"fedbus{secrets.token_hex(8)}", secrets.token_urlsafe(32)
    identity = {
        "name": "fedbus",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    written = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    for volume in (SERVER, DASHBOARD):
        (volume / "s3-credentials").write_text(written)
    (S3 / "identity.json").write_text(json.dumps({"identities": [identity]}))


os.umask(0o077)
if not (done := AUTHORITY / "done").exists():
    make_federation()
    make_s3_key()
    done.touch()
for volume in VOLUMES.iterdir():
    if volume != AUTHORITY:
        for path in (volume, *volume.rglob("*")):
            os.chown(path, USER, USER, follow_symlinks=False)
