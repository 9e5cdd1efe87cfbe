"""The S3 clients of a process: credentials, settings, and what is slow to load and therefore shared.

Credentials come from the file that FEDBUS_S3_CREDENTIALS names, in the format of AWS; without it, from the sources of
the AWS tools: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, the role of the machine. Without credentials,
requests are unsigned, which is enough to read public objects.
"""

import asyncio
import configparser
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession, get_session
from botocore import UNSIGNED
from botocore.httpsession import get_cert_path
from botocore.loaders import Loader

from fedbus.stores.errors import StoreDenied

CREDENTIALS_FILE: Final = "FEDBUS_S3_CREDENTIALS"
DEFAULT_REGION: Final = "us-east-1"
CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 30.0
"""The limit of time without data in a response, in seconds."""


@dataclass(frozen=True)
class ClientSettings:
    """What a client depends on, apart from the address."""

    session: AioSession
    keys: dict[str, str] = field(repr=False)
    is_signed: bool

    @classmethod
    async def load(cls, credentials: Path | None) -> Self:
        """Load the settings, with the keys in the file *credentials*; None is the file of the environment.

        Raises:
            StoreDenied: the file cannot be read.
            BotoCoreError: the AWS settings are invalid.

        """

        def load() -> tuple[AioSession, dict[str, str]]:
            file = credentials or os.environ.get(CREDENTIALS_FILE)
            return _session(), _read_credentials(Path(file)) if file else {}

        session, keys = await asyncio.to_thread(load)
        return cls(session, keys, bool(keys) or await session.get_credentials() is not None)

    def make_client(self, endpoint: str | None, region: str | None) -> Any:
        """Make a client, which is a context manager. Its caller retries."""
        config = AioConfig(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": 1},
            s3={
                "addressing_style": "path" if endpoint else "auto",
                "payload_signing_enabled": True,  # the server rejects bytes that changed on the way
            },
            request_checksum_calculation="when_required",  # not every S3 supports the newer checksums
            response_checksum_validation="when_required",  # the model repository verifies all digests
            signature_version=None if self.is_signed else UNSIGNED,
            http_session_cls=_HttpSession,
        )
        return self.session.create_client(
            "s3",
            endpoint_url=endpoint,
            region_name=region or self.session.get_config_variable("region") or DEFAULT_REGION,
            config=config,
            **self.keys,
        )


class _HttpSession(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore has no types
    """A session that shares its TLS context: to load the CA certificates takes 25 ms of CPU time."""

    _shared: ClassVar[dict[tuple[str, int], Any]] = {}
    """By CA file and its time of change."""

    def _build_ssl_contexts(self, proxy_url: str | None) -> Any:
        if not self._verify or self._cert_file or proxy_url:
            return super()._build_ssl_contexts(proxy_url)
        ca_file: str = get_cert_path(self._verify)
        version = (ca_file, Path(ca_file).stat().st_mtime_ns)
        if version not in self._shared:
            self._shared[version] = super()._build_ssl_contexts(None)
        return self._shared[version]


@lru_cache(1)
def _session() -> AioSession:
    """Create the session of the process."""
    session = get_session()
    session.register_component("data_loader", load_service_models())
    return session


@lru_cache(1)
def load_service_models() -> Loader:
    """Load the service models of S3, which takes 0.3 s of CPU time."""
    loader: Loader = get_session().get_component("data_loader")  # it respects AWS_DATA_PATH
    loader.load_service_model("s3", "service-2")
    loader.load_service_model("s3", "endpoint-rule-set-1")
    loader.load_data_with_path("endpoints")
    return loader


def _read_credentials(file: Path) -> dict[str, str]:
    """Read the keys in *file*; no error text repeats them."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(file.read_text())
        section = parser[parser.sections()[0]]
        keys = {key: section[key] for key in ("aws_access_key_id", "aws_secret_access_key")}
        token = section.get("aws_session_token")
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError, IndexError) as error:
        reason = (
            error.strerror
            if isinstance(error, OSError)
            else "it is not in the format of an AWS credentials file"
        )
        remedy = "write the lines [default], aws_access_key_id = … and aws_secret_access_key = …"
        raise StoreDenied(str(file), reason, remedy=remedy) from None
    return keys | ({"aws_session_token": token} if token else {})
