"""Settings from environment variables, and their validation."""

from pathlib import Path

import pytest

from fedbus.app.settings import InvalidSetting, Settings


def test_without_variables_the_defaults_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_environment({})

    assert settings.home == tmp_path / ".fedbus"
    assert settings.data_dir == tmp_path / ".fedbus" / "data"
    assert settings.nats_url == "nats://127.0.0.1:4222"
    assert settings.fed == "dev"


def test_each_variable_is_read(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "FEDBUS_HOME": str(tmp_path),
            "FEDBUS_NATS_URL": "tls://bus.example:4222",
            "FEDBUS_FEDERATION": "clinics",
            "FEDBUS_DATA_DIR": "/data",
        }
    )

    assert (settings.home, settings.nats_url) == (tmp_path, "tls://bus.example:4222")
    assert (settings.fed, settings.data_dir) == ("clinics", Path("/data"))


def test_an_empty_variable_counts_as_unset() -> None:
    assert Settings.from_environment({"FEDBUS_FEDERATION": ""}).fed == "dev"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FEDBUS_FEDERATION", "All Clinics", "FEDBUS_FEDERATION: 'All Clinics' is not a valid federation id"),
        ("FEDBUS_FEDERATION", "*", r"FEDBUS_FEDERATION: '\*' is not a valid federation id"),
        ("FEDBUS_GATEWAY_PORT", "abc", "FEDBUS_GATEWAY_PORT: 'abc' must be an integer from 0 to 65535"),
        ("FEDBUS_TRAIN_AT_ONCE", "two", "FEDBUS_TRAIN_AT_ONCE: 'two' must be an integer ≥ 1"),
        ("FEDBUS_NATS_URL", "localhost", "FEDBUS_NATS_URL: 'localhost' is not the URL of a nats-server"),
    ],
)
def test_an_invalid_value_is_one_line_with_the_variable(name: str, value: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message) as caught:
        Settings.from_environment({name: value})

    assert "\n" not in str(caught.value)


def test_an_announced_url_is_used_until_the_block_ends(tmp_path: Path) -> None:
    settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path / "home")})
    with settings.announce_url("nats://127.0.0.1:4711"):
        assert settings.nats_url == "nats://127.0.0.1:4711"

    assert settings.nats_url == "nats://127.0.0.1:4222"


def test_the_url_of_a_successor_is_not_removed(tmp_path: Path) -> None:
    settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path)})
    with settings.announce_url("nats://127.0.0.1:1"):
        successor = settings.announce_url("nats://127.0.0.1:2")
        successor.__enter__()

    assert settings.local_nats_url == "nats://127.0.0.1:2"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_METRIC_EXPORT_INTERVAL": "abc"}, "'abc' must be a number of milliseconds, such as 15000"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "-1"}, "'-1' must be a number of seconds"),
        ({"FEDBUS_LOG_LEVEL": "loud"}, "'loud' must be one of: debug, info, warning"),
        ({"FEDBUS_LOG_FORMAT": "xml"}, "'xml' must be one of: console, json"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"},
            "must be the URL of a collector, such as http://collector:4318",
        ),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"},
            "'grpc' must be one of: http/protobuf",
        ),
        ({"FEDBUS_TRACES_MB": "abc"}, "'abc' must be an integer"),
        ({"FEDBUS_TRAIN_AT_ONCE": "0"}, "'0' must be ≥ 1"),
        ({"FEDBUS_GATEWAY_PORT": "70000"}, "'70000' must be ≤ 65535"),
        ({"FEDBUS_LAUNCHER": "podman"}, "'podman' must be one of: 'process' or 'kubernetes'"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_an_invalid_setting_is_named_with_valid_values(variables: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidSetting) as error:
        Settings.from_environment(variables)
    assert str(error.value).startswith(f"{next(iter(variables))}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_protocol_is_checked_only_with_a_collector() -> None:
    Settings.from_environment({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "FEDBUS_LOG_LEVEL": "DEBUG"})


def test_a_configured_url_overrides_an_announced_one(tmp_path: Path) -> None:
    settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path), "FEDBUS_NATS_URL": "nats://far:4222"})
    with settings.announce_url("nats://127.0.0.1:4711"):
        assert settings.nats_url == "nats://far:4222"
