"""The settings that all commands share, read from environment variables.

    FEDBUS_HOME         directory for the files of fedbus on this machine; default: .fedbus in the working directory
    FEDBUS_NATS_URL     URL of nats-server; default: the one that `fedbus up` or `fedbus demo` wrote to
                        FEDBUS_HOME/nats.url, else nats://127.0.0.1:4222
    FEDBUS_FEDERATION   federation id; default: dev
    FEDBUS_KIT          folder with the kit of a device or a user; its settings.env adds environment variables
    FEDBUS_CREDS        NATS credentials file; default: none, connect without credentials
    FEDBUS_CA           PEM file with the CA of nats-server and S3; default: the CAs of the system
    FEDBUS_STORE        model repository: a directory, or s3://bucket/prefix?endpoint=…; default: the one
                        that `fedbus up` uses on this machine, else FEDBUS_HOME/models
    FEDBUS_TASK         directory of the task, or git+https://host/repo@branch#subdirectory=dir, whose new commits
                        are rolled out; default: the working directory
    FEDBUS_ALLOWED_SIGNERS  allowed_signers file of ssh-keygen; default: none, commits are not verified
    FEDBUS_ALLOW_INSTALL    packages that tasks may install on this machine, or * for all; default: none
    FEDBUS_LABELS       device labels, for example "site=lab board=jetson"
    FEDBUS_SIGNING_KEY  private key of the server, which signs each new model: see fedbus model keygen
    FEDBUS_TRUSTED_KEYS public keys; only models signed by one of them are served; default: none, serve any model
    FEDBUS_TRACKERS     experiment trackers in addition to FEDBUS_HOME/training: tensorboard, mlflow, wandb, …
    FEDBUS_TRAIN_AT_ONCE    number of tasks that a device trains at the same time; default: 1
    FEDBUS_DATA_DIR     directory of data sets; default: FEDBUS_HOME/data
    FEDBUS_TRACES_MB    size limit of FEDBUS_HOME/traces, which `fedbus trace` reads; default: 256; 0 keeps none
    FEDBUS_LAUNCHER     how the ServerApp of a run is started: process (default), or kubernetes for a Job
    FEDBUS_JOB_TEMPLATE PodTemplate of that Job; default: flower-server
    FEDBUS_GATEWAY_PORT port of the dashboard; default: 8765, or a free one if that is taken
    FEDBUS_NATS_MONITOR monitoring URL of nats-server; if set, its metrics are exported too

An invalid value is reported in one line that names the variable.
"""

import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from fedbus.app.telemetry_settings import invalid_variable
from fedbus.bus.credentials import BusAccess
from fedbus.contracts.identifiers import FederationId, federation_id

if TYPE_CHECKING:
    from fedbus.stores.models.signing import ModelSigner, TrustedKeys

DEFAULT_NATS_URL: Final = "nats://127.0.0.1:4222"
URL_FILE: Final = "nats.url"
STORE_FILE: Final = "store.url"
NATS_MONITOR: Final = "FEDBUS_NATS_MONITOR"
LABEL_PATTERN: Final = r"[a-z0-9][a-z0-9-]*=[A-Za-z0-9._-]+"
SCHEMES: Final = ("nats://", "tls://", "ws://", "wss://")


class InvalidSetting(Exception):
    """An environment variable is invalid; the message names it and its valid values."""


class InvalidLabel(InvalidSetting, ValueError):
    """A device label does not have the form key=value."""


KIT: Final = "FEDBUS_KIT"
KIT_SETTINGS: Final = "settings.env"
KIT_FILES: Final = ("FEDBUS_CREDS", "FEDBUS_CA", "FEDBUS_ALLOWED_SIGNERS", "FEDBUS_TRUSTED_KEYS")
"""Settings whose value is the name of a file in the kit."""


def apply_kit(environment: MutableMapping[str, str]) -> MutableMapping[str, str]:
    """Add the settings of the kit to *environment*; a variable that is set is not changed.

    Child processes inherit them. AWS_CA_BUNDLE passes the CA to the S3 client.

    Raises:
        InvalidSetting: FEDBUS_KIT is not the folder of a kit.

    """
    if environment.get(KIT):
        folder = Path(environment[KIT]).expanduser().absolute()
        for name, value in _read_kit_settings(folder):
            environment.setdefault(name, str(folder / value) if name in KIT_FILES else value)
    if environment.get("FEDBUS_CA"):
        environment.setdefault("AWS_CA_BUNDLE", environment["FEDBUS_CA"])
    return environment


def _read_kit_settings(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = (folder / KIT_SETTINGS).read_text().splitlines()
    except OSError as error:
        raise InvalidSetting(f"{KIT}: {folder} is not a kit: {KIT_SETTINGS}: {error.strerror}") from None
    for line in lines:
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            yield name.strip(), value.strip()


class Settings(BaseModel):
    """The validated settings."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, validate_default=True)

    home: Path = Field(default=Path(".fedbus"), alias="FEDBUS_HOME")
    configured_nats_url: str | None = Field(default=None, alias="FEDBUS_NATS_URL")
    federation: Annotated[str, AfterValidator(federation_id)] = Field(
        default="dev", alias="FEDBUS_FEDERATION"
    )
    creds: Path | None = Field(default=None, alias="FEDBUS_CREDS")
    ca: Path | None = Field(default=None, alias="FEDBUS_CA")
    client: str = Field(default="", alias="FEDBUS_CLIENT")
    configured_store: str | None = Field(default=None, alias="FEDBUS_STORE")
    task: str = Field(default=".", alias="FEDBUS_TASK")
    allowed_signers: Path | None = Field(default=None, alias="FEDBUS_ALLOWED_SIGNERS")
    allow_install: str = Field(default="", alias="FEDBUS_ALLOW_INSTALL")
    labels_text: str = Field(default="", alias="FEDBUS_LABELS")
    train_at_once: int = Field(default=1, ge=1, alias="FEDBUS_TRAIN_AT_ONCE")
    trackers: str = Field(default="", alias="FEDBUS_TRACKERS")
    signing_key: Path | None = Field(default=None, alias="FEDBUS_SIGNING_KEY")
    trusted_keys: Path | None = Field(default=None, alias="FEDBUS_TRUSTED_KEYS")
    configured_data_dir: Path | None = Field(default=None, alias="FEDBUS_DATA_DIR")
    traces_mb: int = Field(default=256, ge=0, alias="FEDBUS_TRACES_MB")
    launcher: Literal["process", "kubernetes"] = Field(default="process", alias="FEDBUS_LAUNCHER")
    job_template: str = Field(default="flower-server", alias="FEDBUS_JOB_TEMPLATE")
    nats_monitor: str = Field(default="", alias=NATS_MONITOR)
    gateway_port: int | None = Field(default=None, ge=0, le=65535, alias="FEDBUS_GATEWAY_PORT")

    @field_validator("home")
    @classmethod
    def _make_absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("configured_nats_url")
    @classmethod
    def _validate_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(SCHEMES):
            raise ValueError(f"{url!r} is not the URL of a nats-server. Use the form nats://host:4222")
        return url

    @field_validator("allowed_signers", "signing_key", "trusted_keys")
    @classmethod
    def _validate_file(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"no such file: {path}")
        return path.absolute() if path else None

    @field_validator("labels_text")
    @classmethod
    def _validate_labels(cls, text: str) -> str:
        parse_labels(text)
        return text

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read the settings of this process. An empty variable counts as unset.

        Raises:
            InvalidSetting: A variable is invalid.

        """
        found = apply_kit(os.environ) if environment is None else environment
        if (problem := invalid_variable(found)) is not None:
            raise InvalidSetting(problem)
        names = [field.alias for field in cls.model_fields.values() if field.alias]
        try:
            return cls.model_validate({name: found[name] for name in names if found.get(name)})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise InvalidSetting(
                f"{first['loc'][0]}: {_describe_error(first, cls._describe_bounds(first['loc'][0]))}"
            ) from None

    @classmethod
    def _describe_bounds(cls, variable: int | str) -> str:
        """Format the bounds of the number in *variable*, for example `` from 0 to 65535``."""
        of = [field.metadata for field in cls.model_fields.values() if field.alias == variable]
        bounds = [str(getattr(one, name)) for one in of[0] for name in ("ge", "le") if hasattr(one, name)]
        return (
            f" {f'from {bounds[0]} to {bounds[1]}' if len(bounds) == 2 else f'≥ {bounds[0]}'}"
            if bounds
            else ""
        )

    @property
    def fed(self) -> FederationId:
        return FederationId(self.federation)

    @property
    def tracker_names(self) -> tuple[str, ...]:
        return tuple(self.trackers.replace(",", " ").split())

    @property
    def labels(self) -> dict[str, str]:
        return parse_labels(self.labels_text)

    def load_signer(self) -> "ModelSigner | None":
        """Read the key that signs new models.

        Raises:
            InvalidKey: The file has no private key.

        """
        from fedbus.stores.models.signing import ModelSigner  # noqa: PLC0415  # cryptography: 9 MB

        return ModelSigner.load(self.signing_key) if self.signing_key else None

    def load_trusted_keys(self) -> "TrustedKeys | None":
        """Read the keys whose models may be served.

        Raises:
            InvalidKey: The file has no public keys.

        """
        from fedbus.stores.models.signing import TrustedKeys  # noqa: PLC0415  # cryptography: 9 MB

        return TrustedKeys.load(self.trusted_keys) if self.trusted_keys else None

    @property
    def allowed_installs(self) -> tuple[str, ...]:
        return tuple(self.allow_install.replace(",", " ").split())

    @property
    def access(self) -> BusAccess:
        """The credentials and the CA for NATS."""
        return BusAccess(self.creds, self.ca)

    @property
    def data_dir(self) -> Path:
        return (self.configured_data_dir or self.home / "data").expanduser().absolute()

    @property
    def traces_dir(self) -> Path:
        """The directory of span files, one for each process."""
        return self.home / "traces"

    @property
    def nats_dir(self) -> Path:
        """The directory of the embedded nats-server."""
        return self.home / "nats"

    @property
    def s3_dir(self) -> Path:
        """The directory of the embedded SeaweedFS."""
        return self.home / "s3"

    @property
    def store_url(self) -> str:
        """The model repository: FEDBUS_STORE, else the one in use on this machine, else a directory."""
        return self.configured_store or _read_line(self.home / STORE_FILE) or str(self.home / "models")

    @property
    def nats_url(self) -> str:
        """The URL of nats-server: FEDBUS_NATS_URL, else the one on this machine, else the default."""
        return self.configured_nats_url or self.local_nats_url or DEFAULT_NATS_URL

    @property
    def nats_url_source(self) -> str:
        """Where `nats_url` comes from, for `fedbus doctor`."""
        if self.configured_nats_url:
            return "FEDBUS_NATS_URL"
        return str(self._url_file) if self.local_nats_url else "the default URL"

    @property
    def local_nats_url(self) -> str | None:
        """The URL that a running `fedbus up` or `fedbus demo` announced on this machine."""
        return _read_line(self._url_file)

    @contextmanager
    def announce_url(self, url: str) -> Iterator[None]:
        """Announce *url* to the other commands on this machine while the block runs."""
        with _write_temporarily(self._url_file, url):
            yield

    @contextmanager
    def announce_store(self, url: str) -> Iterator[None]:
        """Announce the model repository at *url* while the block runs."""
        with _write_temporarily(self.home / STORE_FILE, url):
            yield

    @property
    def _url_file(self) -> Path:
        return self.home / URL_FILE


def _describe_error(error: ErrorDetails, bounds_text: str) -> str:
    """Describe a validation error of pydantic."""
    value, bounds = error["input"], error.get("ctx", {})
    match error["type"]:
        case "int_parsing":
            return f"{value!r} must be an integer{bounds_text}"
        case "greater_than_equal":
            return f"{value!r} must be ≥ {bounds['ge']}"
        case "less_than_equal":
            return f"{value!r} must be ≤ {bounds['le']}"
        case "literal_error":
            return f"{value!r} must be one of: {bounds['expected']}"
        case _:
            return error["msg"].removeprefix("Value error, ")


def parse_labels(text: str) -> dict[str, str]:
    """Parse ``site=lab board=jetson``.

    Raises:
        InvalidLabel: A label does not have the form key=value.

    """
    for pair in text.split():
        if not re.fullmatch(LABEL_PATTERN, pair):
            raise InvalidLabel(
                f"{pair!r} is not a label. Use the form site=lab, and a space between two labels"
            )
    return dict(pair.split("=", 1) for pair in text.split())


def _read_line(file: Path) -> str | None:
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


@contextmanager
def _write_temporarily(file: Path, line: str) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{line}\n")
    try:
        yield
    finally:
        if _read_line(file) == line:  # else another process has announced its own
            file.unlink(missing_ok=True)
