"""A context of the `nats` CLI: natscli stores each in a JSON file, and the name of the selected one in another file.

The inbox prefix is that of users, because their credentials allow no other.
"""

import json
import os
from pathlib import Path
from typing import Final

from fedbus.app.settings import Settings
from fedbus.contracts import subjects

INBOX: Final = subjects.inbox(subjects.USERS, "nats")


def render_context(settings: Settings) -> str:
    """Return the context as JSON."""
    return json.dumps(
        {
            "description": f"federation {settings.fed}, by fedbus",
            "url": settings.nats_url,
            "creds": str(settings.creds.absolute()) if settings.creds else "",
            "ca": str(settings.ca.absolute()) if settings.ca else "",
            "inbox_prefix": INBOX,
        },
        indent=2,
    )


def context_folder() -> Path:
    """Return the directory in which the `nats` CLI stores its contexts."""
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(home) / "nats"


def write_context(name: str, text: str) -> Path:
    path = context_folder() / "context" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(f"{text}\n")
    path.chmod(0o600)
    return path


def select_context(name: str) -> None:
    (context_folder() / "context.txt").write_text(name)
