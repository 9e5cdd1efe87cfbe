"""Where things are: the few settings that every command shares, read from the environment once.

    FEDBUS_HOME         what fedbus keeps on this machine; default: .fedbus in the working directory
    FEDBUS_NATS_URL     the bus; default: the one that `fedbus up` or `fedbus demo` started here, which
                        leaves its address in FEDBUS_HOME/nats.url; else nats://127.0.0.1:4222
    FEDBUS_FEDERATION   everything that shares one bus account; default: dev
    FEDBUS_KIT          the folder that a device was given; its settings.env is read as if it stood in the environment
    FEDBUS_CREDS        a NATS credentials file: who we are to the bus; default: nobody in particular
    FEDBUS_CA           whose certificates are believed, a PEM file; default: those the system knows
    FEDBUS_STORE        the model repository: a directory, or s3://bucket/prefix?endpoint=…; default: the one
                        that `fedbus up` uses here, else FEDBUS_HOME/models
    FEDBUS_TASK         the task: its directory, or git+https://host/repo@branch#subdirectory=dir, which is followed;
                        default: the working directory
    FEDBUS_ALLOWED_SIGNERS  who may sign the task's commits, as ssh-keygen knows it; none: they are not verified
    FEDBUS_ALLOW_INSTALL    what tasks may have installed on this machine: names, or * for anything; default: nothing
    FEDBUS_LABELS       what a device is told apart by: "site=lab board=jetson"
    FEDBUS_SIGNING_KEY  the server's private key, which signs every model that is made: see fedbus model keygen
    FEDBUS_TRUSTED_KEYS the public keys whose models may be served; none: any model is
    FEDBUS_TRACKERS     where the curves of training go beside FEDBUS_HOME/training: tensorboard, mlflow, wandb, …
    FEDBUS_TRAIN_AT_ONCE    how many tasks may train at the same time on one device; default: 1
    FEDBUS_DATA_DIR     where data sets are looked for; default: FEDBUS_HOME/data
    FEDBUS_TRACES_MB    how much of FEDBUS_HOME/traces is kept for `fedbus trace`; default: 256, and 0 for none
    FEDBUS_LAUNCHER     where the ServerApp of a run is at work: process (the default), or kubernetes, in a Job
    FEDBUS_JOB_TEMPLATE the PodTemplate that such a Job's pod is made like; default: flower-server
    FEDBUS_GATEWAY_PORT where the dashboard listens; default: 8765, or another that is free
    FEDBUS_NATS_MONITOR the monitoring address of the nats-server, whose figures are then measured too

A mistake in them is one line that names the variable.
"""

import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedbus.contracts.identifiers import FederationId, federation_id

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from fedbus.bus.credentials import BusAccess

if TYPE_CHECKING:
    from fedbus.stores.models.signing import ModelSigner, TrustedKeys

DEFAULT_NATS_URL: Final = "nats://127.0.0.1:4222"
URL_FILE: Final = "nats.url"
STORE_FILE: Final = "store.url"
NATS_MONITOR: Final = "FEDBUS_NATS_MONITOR"
LABEL_PATTERN: Final = r"[a-z0-9][a-z0-9-]*=[A-Za-z0-9._-]+"
SCHEMES: Final = ("nats://", "tls://", "ws://", "wss://")


class InvalidSetting(Exception):
    """A variable holds what it cannot hold; the text names it and says what it may be."""


class InvalidLabel(InvalidSetting, ValueError):
    """A label is not written as one."""


KIT: Final = "FEDBUS_KIT"
KIT_SETTINGS: Final = "settings.env"
KIT_FILES: Final = ("FEDBUS_CREDS", "FEDBUS_CA", "FEDBUS_ALLOWED_SIGNERS", "FEDBUS_TRUSTED_KEYS")
"""Settings that name a file beside settings.env."""


def apply_kit(environment: MutableMapping[str, str]) -> MutableMapping[str, str]:
    """*environment* with what its kit says, where it has one; what stands there already is not changed.

    The processes that we start have it too, and so has the S3 client, which knows the authority by
    AWS_CA_BUNDLE. Raises BadSetting.
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
        raise InvalidSetting(f"{KIT}: {folder} is no kit: {KIT_SETTINGS}: {error.strerror}") from None
    for line in lines:
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            yield name.strip(), value.strip()


class Settings(BaseModel):
    """What the environment says, checked."""

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
            raise ValueError(f"{url!r} is not the address of a nats-server: write nats://host:4222")
        return url

    @field_validator("allowed_signers", "signing_key", "trusted_keys")
    @classmethod
    def _validate_file(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path.absolute() if path else None

    @field_validator("labels_text")
    @classmethod
    def _validate_labels(cls, text: str) -> str:
        parse_labels(text)
        return text

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """The settings of this process; raises BadSetting. An empty variable counts as none."""
        from fedbus.app.telemetry_settings import invalid_variable  # noqa: PLC0415  # not for `fedbus --help`

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
        """What the number in *variable* may be: `` from 0 to 65535``."""
        of = [field.metadata for field in cls.model_fields.values() if field.alias == variable]
        bounds = [str(getattr(one, name)) for one in of[0] for name in ("ge", "le") if hasattr(one, name)]
        return f" from {' to '.join(bounds)}{' on' if len(bounds) == 1 else ''}" if bounds else ""

    @property
    def fed(self) -> FederationId:
        return FederationId(self.federation)

    @property
    def tracker_names(self) -> tuple[str, ...]:
        return tuple(self.trackers.replace(",", " ").split())

    @property
    def labels(self) -> dict[str, str]:
        return parse_labels(self.labels_text)

    def signer(self) -> "ModelSigner | None":
        """Who signs the models that are made here; raises BadKey."""
        from fedbus.stores.models.signing import ModelSigner  # noqa: PLC0415  # not for `fedbus --help`

        return ModelSigner.read(self.signing_key) if self.signing_key else None

    def trusted(self) -> "TrustedKeys | None":
        """Whose models may be served here; raises BadKey."""
        from fedbus.stores.models.signing import TrustedKeys  # noqa: PLC0415  # not for `fedbus --help`

        return TrustedKeys.read(self.trusted_keys) if self.trusted_keys else None

    @property
    def allowed_installs(self) -> tuple[str, ...]:
        return tuple(self.allow_install.replace(",", " ").split())

    @property
    def access(self) -> "BusAccess":
        """Who we are to the bus, and whom we believe."""
        from fedbus.bus.credentials import BusAccess  # noqa: PLC0415  # `fedbus --help` reads settings, and needs no TLS

        return BusAccess(self.creds, self.ca)

    @property
    def data_dir(self) -> Path:
        return (self.configured_data_dir or self.home / "data").expanduser().absolute()

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
        return self.configured_store or _read_line(self.home / STORE_FILE) or str(self.home / "models")

    @property
    def nats_url(self) -> str:
        """The bus to talk to: the one that was named, else the one that runs here, else the usual address."""
        return self.configured_nats_url or self.local_nats_url or DEFAULT_NATS_URL

    @property
    def nats_url_source(self) -> str:
        """Where that address comes from, for whoever wonders."""
        if self.configured_nats_url:
            return "FEDBUS_NATS_URL"
        return str(self._url_file) if self.local_nats_url else "the usual address"

    @property
    def local_nats_url(self) -> str | None:
        """The address that a fedbus on this machine has left."""
        return _read_line(self._url_file)

    @contextmanager
    def announce_url(self, url: str) -> Iterator[None]:
        """Other commands on this machine find *url* without a flag, for as long as the block runs."""
        with _write_temporarily(self._url_file, url):
            yield

    @contextmanager
    def announce_store(self, url: str) -> Iterator[None]:
        """The same of the model repository at *url*."""
        with _write_temporarily(self.home / STORE_FILE, url):
            yield

    @property
    def _url_file(self) -> Path:
        return self.home / URL_FILE


def _describe_error(error: "ErrorDetails", bounds_in_words: str) -> str:
    """What pydantic found, as the rest of fedbus would say it."""
    given, bounds = error["input"], error.get("ctx", {})
    match error["type"]:
        case "int_parsing":
            return f"{given!r} is no whole number{bounds_in_words}"
        case "greater_than_equal":
            return f"{given!r} is too little: it is at least {bounds['ge']}"
        case "less_than_equal":
            return f"{given!r} is too much: it is at most {bounds['le']}"
        case "literal_error":
            return f"{given!r} is none of what it may be: {bounds['expected']}"
        case _:
            return error["msg"].removeprefix("Value error, ")


def parse_labels(text: str) -> dict[str, str]:
    """``site=lab board=jetson`` as a table; raises BadSetting."""
    for pair in text.split():
        if not re.fullmatch(LABEL_PATTERN, pair):
            raise InvalidLabel(f"{pair!r} is no label: write site=lab, several with spaces between them")
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
        if _read_line(file) == line:  # another may have taken over since
            file.unlink(missing_ok=True)
