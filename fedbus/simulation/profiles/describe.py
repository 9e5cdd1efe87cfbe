"""Texts of the conditions of a group, for tables."""

from typing import Final

from fedbus.simulation.profiles.durations import (
    AnyDuration,
    ConstantDuration,
    ExponentialDuration,
    LognormalDuration,
    NormalDuration,
    UniformDuration,
)
from fedbus.simulation.profiles.schema import AnyDelay, Availability, Group, TrainingTime

NONE: Final = "-"


def describe_group(group: Group) -> dict[str, str]:
    """Return one text for each kind of condition; ``-`` without it."""
    loss, interruptions = group.loss, group.disconnections
    return {
        "training": describe_training(group.training),
        "delay": describe_delay(group.delay),
        "latency": describe_delay(group.latency),
        "bandwidth": _describe_bandwidth(group),
        "loss": NONE if loss is None else f"{loss.probability:.3g} ({loss.then})",
        "disconnections": NONE
        if interruptions is None
        else f"every {format_seconds(interruptions.every_s)} for {describe_duration(interruptions.duration)}",
        "availability": describe_availability(group.availability),
    }


def describe_training(training: TrainingTime) -> str:
    factor = "" if training.slowdown == 1 else f"{training.slowdown:g} × "
    if training.seconds is not None:
        return factor + describe_duration(training.seconds)
    if training.seconds_per_sample is not None:
        return f"{factor}{training.seconds_per_sample:g} s per sample"
    return f"{factor}measured"


def describe_delay(delay: AnyDelay | None) -> str:
    if delay is None or delay.probability == 0:
        return NONE
    chance = "" if delay.probability == 1 else f" with p = {delay.probability:.3g}"
    return describe_duration(delay) + chance


def describe_duration(duration: AnyDuration) -> str:
    match duration:
        case ConstantDuration():
            return format_seconds(duration.seconds)
        case UniformDuration():
            return f"{duration.min_s:g} to {duration.max_s:g} s"
        case NormalDuration():
            return f"{duration.mean_s:g} ± {duration.std_s:g} s"
        case LognormalDuration():
            return f"lognormal, median {duration.median_s:g} s, σ {duration.sigma:g}"
        case ExponentialDuration():
            return f"exponential, mean {duration.mean_s:g} s"


def _describe_bandwidth(group: Group) -> str:
    down, up = group.bandwidth.down_mbit_s, group.bandwidth.up_mbit_s
    if down is None and up is None:
        return NONE
    return f"{NONE if down is None else f'{down:g}'} / {NONE if up is None else f'{up:g}'} Mbit/s"


def describe_availability(pattern: Availability | None) -> str:
    if pattern is None:
        return NONE
    if pattern.share is not None:
        return f"{100 * pattern.share:g} % of the time, period {format_seconds(pattern.period_s)}"
    if pattern.hours is not None:
        hours = ", ".join(f"{_format_hour(start)}-{_format_hour(stop)}" for start, stop in pattern.hours)
        return hours + (f" in zones over {pattern.spread_h:g} h" if pattern.spread_h else "")
    intervals = ", ".join(f"{start:g}-{stop:g}" for start, stop in pattern.intervals_s or ())
    return f"{intervals} s" + (f" of each {format_seconds(pattern.repeat_s)}" if pattern.repeat_s else "")


def format_seconds(seconds: float) -> str:
    """Format a duration: ``20 s``, ``15 min``, ``2 h``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def _format_hour(seconds: float) -> str:
    return f"{int(seconds // 3600):02}:{int(seconds % 3600 // 60):02}"
