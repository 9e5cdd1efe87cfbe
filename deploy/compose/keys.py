"""The first thing that runs in the compose stack: volumes that their users may write, and the key of the S3.

Started as root with nothing but the right to change owners; everything after it runs as user 10001.
What is there already stays as it is.
"""

import json
import os
import secrets
from pathlib import Path

USER = 10001
VOLUMES = Path("/volumes")
SERVER, S3 = VOLUMES / "server-keys", VOLUMES / "s3-keys"


def write(path: Path, content: str) -> None:
    """A file for its owner alone, from its first moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    os.chown(path, USER, USER)


def make_s3_key() -> None:
    """One key, for SeaweedFS as it writes keys and for the server's agents as AWS does."""
    key, secret = f"fedbus{secrets.token_hex(8)}", secrets.token_urlsafe(32)
    identity = {
        "name": "fedbus",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write(
        SERVER / "s3-credentials", f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    )
    write(S3 / "identity.json", json.dumps({"identities": [identity]}))


if not (S3 / "identity.json").exists():
    (SERVER / "s3-credentials").unlink(missing_ok=True)  # of a start that was cut off
    make_s3_key()
for volume in VOLUMES.iterdir():
    os.chown(volume, USER, USER)
