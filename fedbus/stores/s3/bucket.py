"""A client for one S3 bucket, with retries and with errors by what the caller can do.

    s3://bucket/prefix?endpoint=http://127.0.0.1:8333&region=us-east-1&cache=/var/cache/fedbus

It works with any S3: AWS (no endpoint), SeaweedFS, MinIO, Ceph. The address never holds credentials; see
`fedbus.stores.s3.client` for their sources.

Transient failures (no connection, a broken body, 5xx, "slow down") are retried with backoff until there was no
progress for *patience_s*; then the call raises StoreUnavailable. A refusal raises StoreDenied at once.

All calls inside `Bucket.open` share one client; the last user closes it.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from fedbus.common.retry import RetryBackoff
from fedbus.stores.errors import StoreCorrupt, StoreDenied, StoreError, StoreUnavailable, UnknownStore
from fedbus.stores.models.object_store import DownloadSink, ObjectContent, ObjectInfo
from fedbus.stores.s3.client import CREDENTIALS_FILE, READ_TIMEOUT_S, ClientSettings

RETRY_S: Final = 30.0
MIN_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 3.0
CHUNK_BYTES: Final = 1024**2
PART_BYTES: Final = 8 * 1024**2
MAX_PARTS: Final = 10_000
MAX_READ_BYTES: Final = 16 * 1024**2
"""The limit of an object that `Bucket.read` reads."""

CLIENT_ERRORS: Final = (
    ClientError,
    BotoCoreError,
    ResponseParserError,
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
)
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
    """The address of a repository: bucket, key prefix and S3 endpoint."""

    bucket: str
    prefix: str
    endpoint: str | None = None
    region: str | None = None
    cache: Path | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse *url*. Raises UnknownStore, without any secret in its text."""
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        endpoint = options.pop("endpoint", None)
        if "@" in parts.netloc or "@" in urlsplit(endpoint or "").netloc:
            raise UnknownStore(
                "the address of a repository must not hold credentials; "
                f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or {CREDENTIALS_FILE}"
            )
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc):
            raise UnknownStore(
                f"invalid bucket name {parts.netloc!r}; write s3://bucket/prefix with "
                "3 to 63 lower-case letters, digits, dots and hyphens"
            )
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise UnknownStore(f"invalid S3 endpoint {endpoint!r}; write endpoint=https://host:port")
        region, cache = options.pop("region", None), options.pop("cache", None)
        if options:
            raise UnknownStore(
                f"unknown option {min(options)!r} in the s3:// address; known are endpoint, region and cache"
            )
        prefix = parts.path.strip("/")
        return cls(parts.netloc, prefix, endpoint, region, Path(cache) if cache else None)

    @property
    def url(self) -> str:
        options = {"endpoint": self.endpoint, "region": self.region, "cache": self.cache}
        query = {name: str(value) for name, value in options.items() if value is not None}
        return f"s3://{self.bucket}/{self.prefix}" + (f"?{urlencode(query, safe=':/')}" if query else "")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" + (f" at {self.endpoint}" if self.endpoint else "")


class Bucket:
    """The bucket at *address*. Keys are complete: the caller adds the prefix."""

    def __init__(
        self, address: BucketAddress, *, patience_s: float = RETRY_S, credentials: Path | None = None
    ) -> None:
        self.address = address
        self._credentials = credentials
        self._retry_s = patience_s
        self._open_lock = asyncio.Lock()
        self._users = 0
        self._client: Any = None
        self._settings: ClientSettings | None = None
        """The settings of `_client`."""
        self._closed_client: tuple[ClientSettings | None, Any] = (None, None)
        """The last client and its settings, to open it again: a new client takes 8 ms of CPU time."""
        self._exit_stack = AsyncExitStack()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        """Open the client. Concurrent users share it, and the last one closes it."""
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
                client = (self._settings, self._client)
                await self._exit_stack.pop_all().aclose()
                self._closed_client = client

    # --- small objects ---

    async def read(self, key: str) -> ObjectContent | None:
        """Read a small object; None if it does not exist."""

        async def read(client: Any) -> ObjectContent | None:
            try:
                response = await client.get_object(Bucket=self.address.bucket, Key=key)
            except ClientError as error:
                if _error_code(error) in _NOT_FOUND_CODES:
                    return None
                raise
            async with response["Body"] as body:
                return ObjectContent(await _read_body(body), response["ETag"])

        return await self._with_retries(read)

    async def read_size(self, key: str) -> int | None:
        """Return the size of an object in bytes; None if it does not exist."""

        async def head(client: Any) -> int | None:
            try:
                return int((await client.head_object(Bucket=self.address.bucket, Key=key))["ContentLength"])
            except ClientError as error:
                if _error_code(error) not in _NOT_FOUND_CODES:
                    raise
            await client.list_objects_v2(Bucket=self.address.bucket, Prefix=key, MaxKeys=1)
            return None  # the bucket exists; a HEAD response is the same for a missing bucket and a missing object

        return await self._with_retries(head)

    async def write(self, key: str, content: bytes) -> None:
        """Write an object, whether or not it exists."""
        await self._put(key, content)

    async def create(self, key: str, content: bytes) -> bool:
        """Write an object only if none exists. Returns whether it was written. Of concurrent calls, one succeeds."""
        return await self._put_if(key, content, IfNoneMatch="*")

    async def replace(self, key: str, content: bytes, tag: str) -> bool:
        """Replace an object if it has *tag*. Returns whether it was written. Of concurrent calls, one succeeds."""
        return await self._put_if(key, content, IfMatch=tag)

    async def delete(self, key: str) -> None:
        async def delete(client: Any) -> None:
            await client.delete_object(Bucket=self.address.bucket, Key=key)

        await self._with_retries(delete)

    async def list_objects(self, prefix: str) -> list[ObjectInfo]:
        """List all objects whose keys begin with *prefix*."""
        objects: list[ObjectInfo] = []
        position: dict[str, str] = {}
        while True:

            async def list_page(client: Any, position: dict[str, str] = position) -> Any:
                return await client.list_objects_v2(Bucket=self.address.bucket, Prefix=prefix, **position)

            page = await self._with_retries(list_page)
            objects += [
                ObjectInfo(entry["Key"], entry["Size"], entry["LastModified"])
                for entry in page.get("Contents", ())
            ]
            if not page.get("IsTruncated"):
                return objects
            position = {"ContinuationToken": page["NextContinuationToken"]}

    async def list_folders(self, prefix: str) -> list[str]:
        """Return the key prefixes up to the next slash after *prefix*, of the first 1000."""

        async def list_prefixes(client: Any) -> list[str]:
            response = await client.list_objects_v2(Bucket=self.address.bucket, Prefix=prefix, Delimiter="/")
            return [entry["Prefix"] for entry in response.get("CommonPrefixes", ())]

        return await self._with_retries(list_prefixes)

    async def create_bucket(self) -> None:
        """Create the bucket if it does not exist."""

        async def make(client: Any) -> None:
            try:
                await client.create_bucket(Bucket=self.address.bucket)
            except ClientError as error:
                if _error_code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                    raise

        await self._with_retries(make)

    async def read_policy(self) -> str | None:
        """Return the bucket policy as JSON; None if there is none."""

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
        """Replace the bucket policy with this JSON; None deletes it."""

        async def put_or_delete(client: Any) -> None:
            if policy is not None:
                await client.put_bucket_policy(Bucket=self.address.bucket, Policy=policy)
                return
            try:
                await client.delete_bucket_policy(Bucket=self.address.bucket)
            except ClientError as error:
                if _error_code(error) != "NoSuchBucketPolicy":
                    raise

        await self._with_retries(put_or_delete)

    # --- large objects ---

    async def download(self, key: str, sink: DownloadSink) -> bool:
        """Send the rest of an object to *sink* and continue after each broken connection; False if it is missing."""
        backoff = self._new_backoff()
        async with self.open() as client:
            total = await self.read_size(key)
            if total is None:
                return False
            while sink.size_bytes < total:
                size_before = sink.size_bytes
                failure: Exception = StoreCorrupt(f"{self.address}, {key}", "the response body ends early")
                try:
                    await self._stream_into(client, key, sink)
                except CLIENT_ERRORS as error:
                    failure = error
                if sink.size_bytes > size_before:
                    backoff.reset()
                if sink.size_bytes < total:
                    await self._back_off(failure, backoff)
        return True

    async def _stream_into(self, client: Any, key: str, sink: DownloadSink) -> None:
        byte_range = {"Range": f"bytes={sink.size_bytes}-"} if sink.size_bytes else {}
        response = await client.get_object(Bucket=self.address.bucket, Key=key, **byte_range)
        async with response["Body"] as body:
            async for piece in body.iter_chunks(CHUNK_BYTES):
                await sink.add(piece)

    async def upload(self, key: str, size_bytes: int, parts: Iterator[bytes]) -> None:
        """Write a large object in parts, completely or not at all. Raises the errors of *parts*."""
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
        """Remove the parts of an incomplete upload."""

        async def abort(client: Any) -> None:
            await client.abort_multipart_upload(Bucket=self.address.bucket, Key=key, UploadId=upload)

        await self._with_retries(abort)

    async def _upload_parts(self, key: str, upload: str, parts: Iterator[bytes]) -> list[str]:
        tags: list[str] = []
        while (part := await asyncio.to_thread(next, parts, None)) is not None:

            async def send(client: Any, part: bytes = part) -> str:
                response = await client.upload_part(
                    Bucket=self.address.bucket, Key=key, UploadId=upload, PartNumber=len(tags) + 1, Body=part
                )
                tag: str = response["ETag"]
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
            # an earlier attempt succeeded, and its response was lost
            if _error_code(error) != "NoSuchUpload" or await self.read_size(key) != size_bytes:
                raise

    # --- retry and errors ---

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

    async def _with_retries(self, request: Callable[[Any], Awaitable[T]]) -> T:
        backoff = self._new_backoff()
        async with self.open() as client:
            while True:
                try:
                    return await request(client)
                except CLIENT_ERRORS as error:
                    await self._back_off(error, backoff)

    def _new_backoff(self) -> RetryBackoff:
        return RetryBackoff(first_s=MIN_BACKOFF_S, max_s=MAX_BACKOFF_S, limit_s=self._retry_s)

    async def _back_off(self, failure: Exception, backoff: RetryBackoff) -> None:
        """Pause before the next attempt; raise the store error if *failure* is permanent or the limit is exhausted."""
        if not _is_retryable(failure) or backoff.is_exhausted:
            raise self._to_store_error(failure) from failure
        await backoff.pause()

    def _to_store_error(self, failure: Exception) -> StoreError:
        if isinstance(failure, StoreError):
            return failure
        code, status = _error_code(failure), _error_status(failure)
        if code in _DENIED_CODES or status in (401, 403):
            return self._denied_error(code)
        if code == "NoSuchBucket":
            remedy = "create it, or correct the address of the repository"
            return StoreUnavailable(
                str(self.address), f"there is no bucket {self.address.bucket}", remedy=remedy
            )
        remedy = "check that it runs, that it is reachable from here and that the address is right"
        return StoreUnavailable(str(self.address), _describe_error(failure), remedy=remedy)

    def _denied_error(self, code: str) -> StoreDenied:
        if self._settings and not self._settings.is_signed:
            reason = f"{code}, and there are no credentials"
            remedy = f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or {CREDENTIALS_FILE}"
        else:
            reason, remedy = code, "check the credentials and their permissions to read, write and list"
        return StoreDenied(str(self.address), reason, remedy=remedy)

    async def _open_client(self) -> Any:
        """Open the last client again, or a new one if there is none or the credentials have changed."""
        (last_settings, client), self._closed_client = self._closed_client, (None, None)
        try:
            self._settings = settings = await ClientSettings.load(self._credentials)
            if client is None or settings != last_settings:
                client = settings.make_client(self.address.endpoint, self.address.region)
            return await self._exit_stack.enter_async_context(client)
        except (BotoCoreError, ValueError) as error:  # before the first request: a retry cannot help
            remedy = (
                "correct the AWS settings (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws)"
            )
            raise StoreDenied(str(self.address), _describe_error(error), remedy=remedy) from error


async def _read_body(body: Any) -> bytes:
    """Read a small body; of a body that is too large, only the first `MAX_READ_BYTES`."""
    content = b""
    while len(content) < MAX_READ_BYTES and (piece := await body.read(MAX_READ_BYTES - len(content))):
        content += piece
    return content


class ConditionalPutsUnsupported(Exception):
    """The S3 does not support conditional puts."""


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
        return f"the response is {_error_code(error)} ({_error_status(error)})"
    if isinstance(error, ResponseParserError):
        return "the response is not that of an S3 server"
    return " ".join(str(error).split())[:200] or f"{type(error).__name__} within {READ_TIMEOUT_S:g} s"
