"""Public read access to the models of a bucket, by one statement in the bucket policy.

The statement allows anonymous clients to read the objects under the repository's prefix, and neither to list nor to
write. Other statements of the policy do not change.

Not covered: ACLs of the bucket, "Block Public Access" of AWS, broader statements in the policy.
"""

import json
from hashlib import sha256
from typing import Any, Final

from fedbus.stores.errors import StoreDenied
from fedbus.stores.s3.bucket import Bucket, BucketAddress

VERSION: Final = "2012-10-17"
_REMEDY: Final = (
    "the key needs s3:GetBucketPolicy, s3:PutBucketPolicy and s3:DeleteBucketPolicy; on AWS, Block Public Access "
    "of the bucket must allow public policies"
)


async def is_public(bucket: Bucket) -> bool:
    """Return whether the policy holds the statement. Raises StoreError."""
    return _public_read_statement(bucket.address) in [
        _normalize_statement(statement) for statement in _statements(await _read_policy(bucket))
    ]


async def set_public(bucket: Bucket, *, public: bool) -> None:
    """Add the statement to the policy, or remove it. Raises StoreError."""
    policy = await _read_policy(bucket)
    own = _public_read_statement(bucket.address)
    others = [statement for statement in _statements(policy) if _normalize_statement(statement) != own]
    statements = [*others, {"Sid": _statement_id(bucket.address), **own}] if public else others
    if statements == _statements(policy):
        return
    document = {"Version": VERSION, **policy, "Statement": statements}
    try:
        await bucket.set_policy(json.dumps(document) if statements else None)
    except StoreDenied as error:
        raise _policy_denied(bucket, error) from error


async def _read_policy(bucket: Bucket) -> dict[str, Any]:
    try:
        policy = await bucket.read_policy()
    except StoreDenied as error:
        raise _policy_denied(bucket, error) from error
    document: dict[str, Any] = json.loads(policy) if policy else {}
    return document


def _policy_denied(bucket: Bucket, error: StoreDenied) -> StoreDenied:
    return StoreDenied(str(bucket.address), f"{error.reason} (bucket policy)", remedy=_REMEDY)


def _statements(policy: dict[str, Any]) -> list[dict[str, Any]]:
    statements = policy.get("Statement", [])
    return statements if isinstance(statements, list) else [statements]


def _public_read_statement(address: BucketAddress) -> dict[str, Any]:
    keys = f"{address.prefix}/*" if address.prefix else "*"
    return {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject"],
        "Resource": [f"arn:aws:s3:::{address.bucket}/{keys}"],
    }


def _statement_id(address: BucketAddress) -> str:
    """Return an id of the statement, unique for each repository in the bucket."""
    return f"FedbusModels{sha256(address.prefix.encode()).hexdigest()[:12]}"


def _normalize_statement(statement: dict[str, Any]) -> dict[str, Any]:
    """Return *statement* without its id, with lists for values that an S3 may return as a single value."""
    normalized = {name: value for name, value in statement.items() if name != "Sid"}
    for name in ("Action", "Resource"):
        if isinstance(normalized.get(name), str):
            normalized[name] = [normalized[name]]
    if normalized.get("Principal") in ({"AWS": "*"}, {"AWS": ["*"]}):
        normalized["Principal"] = "*"
    return normalized
