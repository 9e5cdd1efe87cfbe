"""A bucket of an S3, as the model repository needs it: few verbs, each bounded, each failure told apart.

    s3://bucket/prefix?endpoint=http://127.0.0.1:8333&region=us-east-1&cache=/var/cache/fedbus

Any S3 will do: AWS (no endpoint), SeaweedFS, MinIO, Ceph. Credentials never stand in the
address. They come from the file that FEDBUS_S3_CREDENTIALS names, written as AWS writes its
own; else from where AWS's tools take them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
AWS_PROFILE, the role of the machine. Where there are none, requests go unsigned, which is
enough to read what is public.

What passes by itself (no connection, a broken body, 5xx, "slow down") is tried again, later
each time and with jitter, until nothing has moved for as long as the bucket is patient; then it is
StoreUnavailable. A refusal is StoreDenied at once.

The client is there for as long as somebody uses it, and no connection outlives its use.
"""

import asyncio
import configparser
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from botocore import UNSIGNED
from botocore.exceptions import BotoCoreError, ClientError

from fedbus.stores.errors import StoreCorrupt, StoreDenied, StoreError, StoreUnavailable, UnknownStore

CREDENTIALS_FILE: Final = "FEDBUS_S3_CREDENTIALS"
DEFAULT_REGION: Final = "us-east-1"
RETRY_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 30.0
"""How long a server may say nothing in the middle of an answer."""
MIN_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 3.0
CHUNK_BYTES: Final = 1024**2
PART_BYTES: Final = 8 * 1024**2
MAX_PARTS: Final = 10_000
MAX_READ_BYTES: Final = 16 * 1024**2
"""Manifests and pointers: what is read whole."""

CLIENT_ERRORS: Final = (ClientError, BotoCoreError, aiohttp.ClientError, TimeoutError, ConnectionError)
_DENIED_CODES: Final = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AccessDenied"}
_RETRYABLE_CODES: Final = {
    "SlowDown",
    "RequestTimeout",
    "ConditionalRequestConflict",
    "OperationAborted",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_UNSUPPORTED_CODES: Final = {"NotImplemented", "501", "MethodNotAllowed"}
_NOT_FOUND_CODES: Final = {"NoSuchKey", "404", "NotFound"}

T = TypeVar("T")


@dataclass(frozen=True)
class BucketAddress:
    """Where a repository is: the bucket, what its keys begin with, and which S3."""

    bucket: str
    prefix: str
    endpoint: str | None = None
    region: str | None = None
    cache: Path | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """The address in *url*; raises UnknownStore, which repeats no secret."""
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        endpoint = options.pop("endpoint", None)
        if "@" in parts.netloc or "@" in urlsplit(endpoint or "").netloc:
            raise UnknownStore(
                "credentials do not belong into the address of a repository: "
                f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or {CREDENTIALS_FILE}"
            )
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc):
            raise UnknownStore(
                f"{parts.netloc!r} is no name of a bucket: write s3://bucket/prefix, "
                "the bucket in 3 to 63 small letters, digits, dots and hyphens"
            )
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise UnknownStore(f"{endpoint!r} is no endpoint of an S3: write endpoint=https://host:port")
        region, cache = options.pop("region", None), options.pop("cache", None)
        if options:
            raise UnknownStore(
                f"{min(options)!r} is no option of an s3:// address: there are endpoint, region and cache"
            )
        prefix = parts.path.strip("/")
        return cls(parts.netloc, prefix, endpoint, region, Path(cache) if cache else None)

    @property
    def url(self) -> str:
        options = {"endpoint": self.endpoint, "region": self.region, "cache": self.cache}
        given = {name: str(value) for name, value in options.items() if value is not None}
        return f"s3://{self.bucket}/{self.prefix}" + (f"?{urlencode(given, safe=':/')}" if given else "")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" + (f" at {self.endpoint}" if self.endpoint else "")


@dataclass(frozen=True)
class ObjectContent:
    """An object that was read whole, and the tag of what it was then."""

    content: bytes
    tag: str


@dataclass(frozen=True)
class ObjectInfo:
    """An object that is there."""

    key: str
    size_bytes: int
    modified: datetime


class DownloadSink(Protocol):
    """Takes in a download piece by piece, and goes on where it stands."""

    size_bytes: int

    async def add(self, piece: bytes) -> None:
        """Take the next piece; a trouble of the sink's own is a StoreError."""


class RetryBudget:
    """How long somebody insists: pauses that grow, with jitter, until *limit_s* after the last success."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.renew()

    def renew(self) -> None:
        """Something has moved."""
        self._ends = time.monotonic() + self._limit_s
        self._pause_s = MIN_BACKOFF_S

    @property
    def is_spent(self) -> bool:
        return time.monotonic() >= self._ends

    async def pause(self) -> None:
        await asyncio.sleep(random.uniform(0.5, 1.0) * self._pause_s)  # noqa: S311 (jitter, not a secret)
        self._pause_s = min(MAX_BACKOFF_S, self._pause_s * 2)


class Bucket:
    """The bucket at *address*. Keys are whole: the prefix is the caller's."""

    def __init__(
        self, address: BucketAddress, *, patience_s: float = RETRY_S, credentials: Path | None = None
    ) -> None:
        self.address = address
        self._credentials = credentials
        self._retry_s = patience_s
        self._open_lock = asyncio.Lock()
        self._users = 0
        self._client: Any = None
        self._exit_stack = AsyncExitStack()
        self._is_signed = True

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        """The client; those who ask while it is open share it, and the last one closes it."""
        async with self._open_lock:
            if self._users == 0:
                self._exit_stack = AsyncExitStack()
                self._client = await self._open_client()
            self._users += 1
        try:
            yield self._client
        finally:
            self._users -= 1
            if self._users == 0:
                await self._exit_stack.pop_all().aclose()

    # --- verbs ---------------------------------------------------------------------------------

    async def read(self, key: str) -> ObjectContent | None:
        """A small object; None where there is none."""

        async def read(client: Any) -> ObjectContent | None:
            try:
                answer = await client.get_object(Bucket=self.address.bucket, Key=key)
            except ClientError as error:
                if _error_code(error) in _NOT_FOUND_CODES:
                    return None
                raise
            async with answer["Body"] as body:
                return ObjectContent(await _read_body(body), answer["ETag"])

        return await self._with_retries(read)

    async def read_size(self, key: str) -> int | None:
        """How large the object is; None where there is none."""

        async def look(client: Any) -> int | None:
            try:
                return int((await client.head_object(Bucket=self.address.bucket, Key=key))["ContentLength"])
            except ClientError as error:
                if _error_code(error) not in _NOT_FOUND_CODES:
                    raise
            await client.list_objects_v2(Bucket=self.address.bucket, Prefix=key, MaxKeys=1)
            return None  # the bucket is there: a HEAD has no body that would say which of both is missing

        return await self._with_retries(look)

    async def write(self, key: str, content: bytes) -> None:
        """Put an object there, whatever was there before."""
        await self._put(key, content)

    async def create(self, key: str, content: bytes) -> bool:
        """Put an object there if there is none; whether we did. Of several at once, one does."""
        return await self._put_if(key, content, IfNoneMatch="*")

    async def replace(self, key: str, content: bytes, tag: str) -> bool:
        """Put an object in the place of the one with *tag*; whether we did. Of several at once, one does."""
        return await self._put_if(key, content, IfMatch=tag)

    async def delete(self, key: str) -> None:
        async def delete(client: Any) -> None:
            await client.delete_object(Bucket=self.address.bucket, Key=key)

        await self._with_retries(delete)

    async def list_objects(self, prefix: str) -> list[ObjectInfo]:
        """All objects whose keys begin with *prefix*."""
        found: list[ObjectInfo] = []
        more: dict[str, str] = {}
        while True:

            async def page(client: Any, more: dict[str, str] = more) -> Any:
                return await client.list_objects_v2(Bucket=self.address.bucket, Prefix=prefix, **more)

            answer = await self._with_retries(page)
            found += [
                ObjectInfo(one["Key"], one["Size"], one["LastModified"]) for one in answer.get("Contents", ())
            ]
            if not answer.get("IsTruncated"):
                return found
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def list_folders(self, prefix: str) -> list[str]:
        """What stands between *prefix* and the next slash, of the first thousand."""

        async def look(client: Any) -> list[str]:
            answer = await client.list_objects_v2(Bucket=self.address.bucket, Prefix=prefix, Delimiter="/")
            return [one["Prefix"] for one in answer.get("CommonPrefixes", ())]

        return await self._with_retries(look)

    async def make(self) -> None:
        """Make the bucket where there is none."""

        async def make(client: Any) -> None:
            try:
                await client.create_bucket(Bucket=self.address.bucket)
            except ClientError as error:
                if _error_code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                    raise

        await self._with_retries(make)

    async def read_policy(self) -> str | None:
        """Who else may do what with the bucket, as AWS writes it; None where nothing is said."""

        async def read(client: Any) -> str | None:
            try:
                policy: str = (await client.get_bucket_policy(Bucket=self.address.bucket))["Policy"]
            except ClientError as error:
                if _error_code(error) != "NoSuchBucketPolicy":
                    raise
                return None
            return policy

        return await self._with_retries(read)

    async def set_policy(self, policy: str | None) -> None:
        """Who else may do what with the bucket, as AWS writes it; None: nobody."""

        async def set_it(client: Any) -> None:
            if policy is not None:
                await client.put_bucket_policy(Bucket=self.address.bucket, Policy=policy)
                return
            try:
                await client.delete_bucket_policy(Bucket=self.address.bucket)
            except ClientError as error:
                if _error_code(error) != "NoSuchBucketPolicy":
                    raise

        await self._with_retries(set_it)

    # --- what is large -------------------------------------------------------------------------

    async def download(self, key: str, sink: DownloadSink) -> bool:
        """Give *sink* what it lacks of an object, and go on after each break; False where there is none."""
        patience = RetryBudget(self._retry_s)
        async with self.open() as client:
            total = await self.read_size(key)
            if total is None:
                return False
            while sink.size_bytes < total:
                before = sink.size_bytes
                failure: Exception = StoreCorrupt(f"{self.address}, {key}", "its body ends early")
                try:
                    await self._stream_into(client, key, sink)
                except CLIENT_ERRORS as error:
                    failure = error
                if sink.size_bytes > before:
                    patience.renew()
                if sink.size_bytes < total:
                    await self._back_off(failure, patience)
        return True

    async def _stream_into(self, client: Any, key: str, sink: DownloadSink) -> None:
        start = {"Range": f"bytes={sink.size_bytes}-"} if sink.size_bytes else {}
        answer = await client.get_object(Bucket=self.address.bucket, Key=key, **start)
        async with answer["Body"] as body:
            async for piece in body.iter_chunks(CHUNK_BYTES):
                await sink.add(piece)

    async def upload(self, key: str, size_bytes: int, parts: Iterator[bytes]) -> None:
        """Put a large object there, part by part, whole or not at all. What *parts* raises comes out."""
        async with self.open():
            upload = (await self._with_retries(lambda client: self._open_object(client, key)))["UploadId"]
            try:
                tags = await self._upload_parts(key, upload, parts)
                await self._with_retries(
                    lambda client: self._complete_upload(client, key, upload, tags, size_bytes)
                )
            except BaseException:
                with suppress(StoreError):
                    await Bucket(self.address, patience_s=0, credentials=self._credentials).abort_upload(
                        key, upload
                    )
                raise

    async def abort_upload(self, key: str, upload: str) -> None:
        """Have the parts of an upload removed that will not be completed."""

        async def abort(client: Any) -> None:
            await client.abort_multipart_upload(Bucket=self.address.bucket, Key=key, UploadId=upload)

        await self._with_retries(abort)

    async def _upload_parts(self, key: str, upload: str, parts: Iterator[bytes]) -> list[str]:
        tags: list[str] = []
        while (part := await asyncio.to_thread(next, parts, None)) is not None:

            async def send(client: Any, part: bytes = part) -> str:
                answer = await client.upload_part(
                    Bucket=self.address.bucket, Key=key, UploadId=upload, PartNumber=len(tags) + 1, Body=part
                )
                tag: str = answer["ETag"]
                return tag

            tags.append(await self._with_retries(send))
        return tags

    async def _open_object(self, client: Any, key: str) -> Any:
        return await client.create_multipart_upload(Bucket=self.address.bucket, Key=key)

    async def _complete_upload(
        self, client: Any, key: str, upload: str, tags: list[str], size_bytes: int
    ) -> None:
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        try:
            await client.complete_multipart_upload(
                Bucket=self.address.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except ClientError as error:
            # done before, and only the answer was lost
            if _error_code(error) != "NoSuchUpload" or await self.read_size(key) != size_bytes:
                raise

    # --- insisting -----------------------------------------------------------------------------

    async def _put(self, key: str, content: bytes, **conditions: str) -> None:
        async def put(client: Any) -> None:
            await client.put_object(Bucket=self.address.bucket, Key=key, Body=content, **conditions)

        await self._with_retries(put)

    async def _put_if(self, key: str, content: bytes, **conditions: str) -> bool:
        async def put(client: Any) -> bool:
            try:
                await client.put_object(Bucket=self.address.bucket, Key=key, Body=content, **conditions)
            except ClientError as error:
                if _error_status(error) == 412 or (
                    _error_code(error) in _NOT_FOUND_CODES and "IfMatch" in conditions
                ):
                    return False
                if _error_code(error) in _UNSUPPORTED_CODES or _error_status(error) == 501:
                    raise ConditionalPutsUnsupported from None
                raise
            return True

        return await self._with_retries(put)

    async def _with_retries(self, what: Callable[[Any], Awaitable[T]]) -> T:
        patience = RetryBudget(self._retry_s)
        async with self.open() as client:
            while True:
                try:
                    return await what(client)
                except CLIENT_ERRORS as error:
                    await self._back_off(error, patience)

    async def _back_off(self, failure: Exception, patience: RetryBudget) -> None:
        """Wait a while where it may pass; raise what it is where not, or where patience is at its end."""
        if not _is_retryable(failure) or patience.is_spent:
            raise self._to_store_error(failure) from failure
        await patience.pause()

    def _to_store_error(self, failure: Exception) -> StoreError:
        if isinstance(failure, StoreError):
            return failure
        code, status = _error_code(failure), _error_status(failure)
        if code in _DENIED_CODES or status in (401, 403):
            return self._denied_error(code)
        if code == "NoSuchBucket":
            remedy = "make it, or correct the address of the repository"
            return StoreUnavailable(
                str(self.address), f"there is no bucket {self.address.bucket}", remedy=remedy
            )
        remedy = "see that it runs and can be reached from here, and that the address is right"
        return StoreUnavailable(str(self.address), _describe_error(failure), remedy=remedy)

    def _denied_error(self, code: str) -> StoreDenied:
        if not self._is_signed:
            reason = f"{code}, and there are no credentials"
            remedy = f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or {CREDENTIALS_FILE}"
        else:
            reason, remedy = code, "check the credentials, and that they may read, write and list there"
        return StoreDenied(str(self.address), reason, remedy=remedy)

    async def _open_client(self) -> Any:
        try:
            return await self._exit_stack.enter_async_context(await self._new_client())
        except (BotoCoreError, ValueError) as error:  # before the first request: nothing that would pass
            remedy = "correct what AWS's tools are told (AWS_ACCESS_KEY_ID and its like, AWS_PROFILE, ~/.aws)"
            raise StoreDenied(str(self.address), _describe_error(error), remedy=remedy) from error

    async def _new_client(self) -> Any:
        session = await asyncio.to_thread(_session)
        file = self._credentials or os.environ.get(CREDENTIALS_FILE)
        keys = await asyncio.to_thread(_read_credentials, Path(file)) if file else {}
        self._is_signed = bool(keys) or await session.get_credentials() is not None
        config = AioConfig(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": 1},  # we insist ourselves, and say for how long
            s3={
                "addressing_style": "path" if self.address.endpoint else "auto",
                "payload_signing_enabled": True,  # bytes that were changed on their way are refused
            },
            request_checksum_calculation="when_required",  # not every S3 knows the newer ones
            response_checksum_validation="when_required",  # we check all digests ourselves
            signature_version=None if self._is_signed else UNSIGNED,
        )
        return session.create_client(
            "s3",
            endpoint_url=self.address.endpoint,
            region_name=self.address.region or session.get_config_variable("region") or DEFAULT_REGION,
            config=config,
            **keys,
        )


async def _read_body(body: Any) -> bytes:
    """All of a small body; of one that is too large, enough to see that it is no good."""
    content = b""
    while len(content) < MAX_READ_BYTES and (piece := await body.read(MAX_READ_BYTES - len(content))):
        content += piece
    return content


class ConditionalPutsUnsupported(Exception):
    """This S3 says that it does not know conditional puts."""


@lru_cache(1)
def _session() -> AioSession:
    """One for the process, with what takes long to read already read."""
    session = get_session()
    loader = session.get_component("data_loader")
    loader.load_service_model("s3", "service-2")
    loader.load_service_model("s3", "endpoint-rule-set-1")
    return session


def _read_credentials(file: Path) -> dict[str, str]:
    """What *file* holds, which no message of ours repeats."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(file.read_text())
        section = parser[parser.sections()[0]]
        keys = {key: section[key] for key in ("aws_access_key_id", "aws_secret_access_key")}
        token = section.get("aws_session_token")
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError, IndexError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not written as AWS writes its own"
        remedy = "write [default], aws_access_key_id = … and aws_secret_access_key = … into it"
        raise StoreDenied(str(file), why, remedy=remedy) from None
    return keys | ({"aws_session_token": token} if token else {})


def _error_code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _error_status(error: Exception) -> int:
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_retryable(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return (
            _error_code(error) in _RETRYABLE_CODES
            or _error_status(error) >= 500
            or _error_status(error) in (408, 429)
        )
    return True


def _describe_error(error: Exception) -> str:
    if isinstance(error, ClientError):
        return f"it answers {_error_code(error)} ({_error_status(error)})"
    return " ".join(str(error).split())[:200] or f"{type(error).__name__} within {READ_TIMEOUT_S:g} s"
