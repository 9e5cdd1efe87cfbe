"""The page of the documentation that says what each role may do, written from the table that accounts are made of."""

from typing import Final

from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.permissions import ROLE_DESCRIPTIONS, Permissions, Role, permissions_for

HEAD: Final = """\
# Permissions

Written by `make docs` from the table in `fedbus/contracts/permissions.py`; the accounts that `fedbus provision`
makes come from the same table. `dev` stands for the federation. The broker puts a device's name where
`{{name()}}` stands, and each of a site's clients where `{{tag(client)}}` does. What is not listed is denied. How it
fits together: [security](security.md).

| role | for | may answer what it is sent |
|---|---|---|"""


def render_permissions_page() -> str:
    roles = {role: permissions_for(FederationId("dev"), role) for role in Role}
    rows = [
        f"| [{role}](#{role}) | {ROLE_DESCRIPTIONS[role]} | {'yes' if may.answers else 'no'} |"
        for role, may in roles.items()
    ]
    sections = [line for role, may in roles.items() for line in _section(role, may)]
    return "\n".join([HEAD, *rows, *sections]) + "\n"


def _section(role: Role, may: Permissions) -> list[str]:
    publishes, subscribes = (["", "```text", *found, "```"] for found in (may.publish, may.subscribe))
    return [
        "",
        f"## {role}",
        "",
        f"For {ROLE_DESCRIPTIONS[role]}.",
        "",
        "Publishes:",
        *publishes,
        "",
        "Subscribes:",
        *subscribes,
    ]
