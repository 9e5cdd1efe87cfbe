"""Decentralised JWTs of NATS, version 2.

    operator   signs accounts, and names the system account
    account    the federation: limits, scoped signing keys, each with the permissions of its users, and revocations
    user       a name and a public key; its permissions are those of the signing key

User claims have no permissions. So the permissions of a role are changed in one place, for all its users, while the
server runs.

Source: https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/jwt
"""

import base64
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any, Final

from fedbus.app.provision.keys import Key
from fedbus.contracts.permissions import MAX_RESPONSES, RESPONSE_TTL_S, Permissions, Role

UNLIMITED: Final = {
    **dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1),
    "wildcards": True,
}
UNLIMITED_STORAGE: Final = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
UNLIMITED_USER: Final = dict.fromkeys(("subs", "data", "payload"), -1)


def sign_claims(
    signer: Key,
    subject: str,
    name: str,
    nats: Mapping[str, Any],
    *,
    issued: int | None = None,
    expires: int | None = None,
) -> str:
    """Sign claims as a JWT for nats-server."""
    claims: dict[str, Any] = {
        "iat": issued or int(time.time()),
        "iss": signer.public,
        "sub": subject,
        "name": name,
        "nats": {"version": 2, **nats},
    }
    if expires is not None:
        claims["exp"] = expires
    digest = hashlib.new("sha512_256", _encode_json(claims)).digest()
    claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
    signed = f"{_encode_base64({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_encode_base64(claims)}"
    return f"{signed}.{_unpadded(signer.sign(signed))}"


def operator_jwt(key: Key, *, system_account: str) -> str:
    return sign_claims(key, key.public, "fedbus", {"type": "operator", "system_account": system_account})


def system_account_jwt(operator_key: Key, public: str, revocations: Mapping[str, int]) -> str:
    return sign_claims(
        operator_key,
        public,
        "SYS",
        {"type": "account", "limits": UNLIMITED} | _revocation_claims(revocations),
    )


def account_jwt(
    operator_key: Key,
    public: str,
    name: str,
    roles: Mapping[Role, tuple[str, Permissions]],
    revocations: Mapping[str, int],
) -> str:
    """Return the account of the federation; *roles* has the public signing key and the permissions of each role."""
    scopes = [_signing_scope(role, key, permissions) for role, (key, permissions) in roles.items()]
    nats = {"type": "account", "limits": UNLIMITED | UNLIMITED_STORAGE, "signing_keys": scopes}
    return sign_claims(operator_key, public, name, nats | _revocation_claims(revocations))


def user_jwt(
    signing_key: Key,
    account_public: str,
    public: str,
    name: str,
    *,
    tags: tuple[str, ...] = (),
    issued: int | None = None,
    expires: int | None = None,
) -> str:
    nats: dict[str, Any] = {"type": "user", "issuer_account": account_public}
    if tags:
        nats["tags"] = list(tags)
    return sign_claims(signing_key, public, name, nats, issued=issued, expires=expires)


def system_user_jwt(
    system: Key, public: str, name: str, permissions: Permissions | None = None, *, expires: int | None = None
) -> str:
    """Return a user of the system account, which has no signing keys: the claims have *permissions*; None: all."""
    nats: dict[str, Any] = {"type": "user", "issuer_account": system.public, **UNLIMITED_USER}
    if permissions is not None:
        nats |= {"pub": {"allow": list(permissions.publish)}, "sub": {"allow": list(permissions.subscribe)}}
    return sign_claims(system, public, name, nats, expires=expires)


def _revocation_claims(revocations: Mapping[str, int]) -> dict[str, Any]:
    return {"revocations": dict(revocations)} if revocations else {}


def _signing_scope(role: Role, key: str, permissions: Permissions) -> dict[str, Any]:
    template: dict[str, Any] = {
        "pub": {"allow": list(permissions.publish)},
        "sub": {"allow": list(permissions.subscribe)},
        **UNLIMITED_USER,
    }
    if permissions.allow_responses:
        template["resp"] = {"max": MAX_RESPONSES, "ttl": int(RESPONSE_TTL_S * 1e9)}
    return {"kind": "user_scope", "key": key, "role": str(role), "template": template}


def _encode_base64(claims: Mapping[str, Any]) -> str:
    return _unpadded(_encode_json(claims))


def _encode_json(claims: Mapping[str, Any]) -> bytes:
    return json.dumps(claims, separators=(",", ":")).encode()


def _unpadded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
