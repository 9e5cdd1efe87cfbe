"""The environment variables of log lines, spans and metrics, and their validation."""

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
SUPPORTED_PROTOCOL: Final = "http/protobuf"


def invalid_variable(environment: Mapping[str, str]) -> str | None:
    """Describe the first invalid variable and its valid values; None if all are valid. An empty one is unset."""
    variables = {name: value.strip() for name, value in environment.items() if value.strip()}
    endpoints = [name for name in (ENDPOINT, TRACES, METRICS, LOGS) if name in variables]
    problems = [
        _check_choice(variables, LEVEL, LEVELS),
        _check_choice(variables, FORMAT, FORMATS),
        _check_number(variables, INTERVAL, "milliseconds, such as 15000"),
        _check_number(variables, TIMEOUT, "seconds, such as 5"),
        *(_check_address(variables, name) for name in endpoints),
        _check_choice(variables, PROTOCOL, (SUPPORTED_PROTOCOL,)) if endpoints else None,
    ]
    return next(filter(None, problems), None)


def _check_choice(variables: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    if variables.get(name, choices[0]).lower() in choices:
        return None
    return f"{name}: {variables[name]!r} must be one of: {', '.join(choices)}"


def _check_number(variables: Mapping[str, str], name: str, unit: str) -> str | None:
    try:
        is_valid = float(variables.get(name, "1")) > 0
    except ValueError:
        is_valid = False
    return None if is_valid else f"{name}: {variables[name]!r} must be a number of {unit}"


def _check_address(variables: Mapping[str, str], name: str) -> str | None:
    if variables[name].lower().startswith(("http://", "https://")):
        return None
    return f"{name}: {variables[name]!r} must be the URL of a collector, such as http://collector:4318"
