"""Where things are: the few settings that every command shares, read from the environment once.

    FEDBUS_HOME         what fedbus keeps on this machine; default: .fedbus in the working directory
    FEDBUS_NATS_URL     the bus; default: the one that `fedbus up` or `fedbus demo` started here, which
                        leaves its address in FEDBUS_HOME/nats.url; else nats://127.0.0.1:4222
    FEDBUS_FEDERATION   everything that shares one bus account; default: dev
    FEDBUS_STORE        the model repository: a directory, or s3://bucket/prefix?endpoint=…; default: the one
                        that `fedbus up` uses here, else FEDBUS_HOME/models
    FEDBUS_DATA_DIR     where data sets are looked for; default: FEDBUS_HOME/data
    FEDBUS_TRACES_MB    how much of FEDBUS_HOME/traces is kept for `fedbus trace`; default: 256, and 0 for none
    FEDBUS_NATS_MONITOR the monitoring address of the nats-server, whose figures are then measured too

A mistake in them is one line that names the variable.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedbus.contracts.identifiers import FederationId, federation_id

DEFAULT_NATS_URL: Final = "nats://127.0.0.1:4222"
URL_FILE: Final = "nats.url"
STORE_FILE: Final = "store.url"
SCHEMES: Final = ("nats://", "tls://", "ws://", "wss://")


class BadSetting(Exception):
    """A variable holds what it cannot hold; the text names it and says what it may be."""


class Settings(BaseModel):
    """What the environment says, checked."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, validate_default=True)

    home: Path = Field(default=Path(".fedbus"), alias="FEDBUS_HOME")
    given_nats_url: str | None = Field(default=None, alias="FEDBUS_NATS_URL")
    federation: Annotated[str, AfterValidator(federation_id)] = Field(
        default="dev", alias="FEDBUS_FEDERATION"
    )
    given_store: str | None = Field(default=None, alias="FEDBUS_STORE")
    given_data_dir: Path | None = Field(default=None, alias="FEDBUS_DATA_DIR")
    traces_mb: int = Field(default=256, ge=0, alias="FEDBUS_TRACES_MB")
    nats_monitor: str = Field(default="", alias="FEDBUS_NATS_MONITOR")

    @field_validator("home")
    @classmethod
    def _stays_where_it_is(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("given_nats_url")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(SCHEMES):
            raise ValueError(f"{url!r} is not the address of a nats-server: write nats://host:4222")
        return url

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """The settings of this process; raises BadSetting. An empty variable counts as none."""
        found = os.environ if environment is None else environment
        names = [field.alias for field in cls.model_fields.values() if field.alias]
        try:
            return cls.model_validate({name: found[name] for name in names if found.get(name)})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise BadSetting(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from None

    @property
    def fed(self) -> FederationId:
        return FederationId(self.federation)

    @property
    def data_dir(self) -> Path:
        return (self.given_data_dir or self.home / "data").expanduser().absolute()

    @property
    def traces_dir(self) -> Path:
        """What was traced on this machine: a file for each process."""
        return self.home / "traces"

    @property
    def nats_dir(self) -> Path:
        """What the embedded nats-server keeps."""
        return self.home / "nats"

    @property
    def s3_dir(self) -> Path:
        """What the embedded S3 keeps."""
        return self.home / "s3"

    @property
    def store_url(self) -> str:
        """The model repository: the one that was named, else the one in use here, else a directory."""
        return self.given_store or _line_in(self.home / STORE_FILE) or str(self.home / "models")

    @property
    def nats_url(self) -> str:
        """The bus to talk to: the one that was named, else the one that runs here, else the usual address."""
        return self.given_nats_url or self.running_here or DEFAULT_NATS_URL

    @property
    def nats_url_from(self) -> str:
        """Where that address comes from, for whoever wonders."""
        if self.given_nats_url:
            return "FEDBUS_NATS_URL"
        return str(self._url_file) if self.running_here else "the usual address"

    @property
    def running_here(self) -> str | None:
        """The address that a fedbus on this machine has left."""
        return _line_in(self._url_file)

    @contextmanager
    def announced(self, url: str) -> Iterator[None]:
        """Other commands on this machine find *url* without a flag, for as long as the block runs."""
        with _left_in(self._url_file, url):
            yield

    @contextmanager
    def announced_store(self, url: str) -> Iterator[None]:
        """The same of the model repository at *url*."""
        with _left_in(self.home / STORE_FILE, url):
            yield

    @property
    def _url_file(self) -> Path:
        return self.home / URL_FILE


def _line_in(file: Path) -> str | None:
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


@contextmanager
def _left_in(file: Path, line: str) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{line}\n")
    try:
        yield
    finally:
        if _line_in(file) == line:  # another may have taken over since
            file.unlink(missing_ok=True)
