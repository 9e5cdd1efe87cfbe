"""What the environment asks of lines, traces and figures, and whether it makes sense."""

from collections.abc import Mapping
from typing import Final

from fedbus.app.telemetry_endpoints import ENDPOINT, LOGS, METRICS, TRACES

LEVEL: Final = "FEDBUS_LOG_LEVEL"
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
FORMAT: Final = "FEDBUS_LOG_FORMAT"
FORMATS: Final = ("console", "json")
INTERVAL: Final = "OTEL_METRIC_EXPORT_INTERVAL"
TIMEOUT: Final = "OTEL_EXPORTER_OTLP_TIMEOUT"
PROTOCOL: Final = "OTEL_EXPORTER_OTLP_PROTOCOL"
SPOKEN: Final = "http/protobuf"


def senseless(environment: Mapping[str, str]) -> str | None:
    """What makes no sense first, and what would, in a line; None where all does. An empty variable asks nothing."""
    asked = {name: value.strip() for name, value in environment.items() if value.strip()}
    endpoints = [name for name in (ENDPOINT, TRACES, METRICS, LOGS) if name in asked]
    complaints = [
        _one_of(asked, LEVEL, LEVELS),
        _one_of(asked, FORMAT, FORMATS),
        _number(asked, INTERVAL, "milliseconds, such as 15000"),
        _number(asked, TIMEOUT, "seconds, such as 5"),
        *(_address(asked, name) for name in endpoints),
        _one_of(asked, PROTOCOL, (SPOKEN,)) if endpoints else None,
    ]
    return next(filter(None, complaints), None)


def _one_of(asked: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    if asked.get(name, choices[0]).lower() in choices:
        return None
    return f"{name}: {asked[name]!r} is none of what it may be: {', '.join(choices)}"


def _number(asked: Mapping[str, str], name: str, wanted: str) -> str | None:
    try:
        sound = float(asked.get(name, "1")) > 0
    except ValueError:
        sound = False
    return None if sound else f"{name}: {asked[name]!r} is no number of {wanted}"


def _address(asked: Mapping[str, str], name: str) -> str | None:
    if asked[name].lower().startswith(("http://", "https://")):
        return None
    return f"{name}: {asked[name]!r} is no address of a collector: write http://collector:4318"
