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
_AFTER_LOSS: Final = {"retransmit": "sent again", "drop": "not sent again"}


def describe_group(group: Group) -> dict[str, str]:
    """Return one text for each kind of condition; ``-`` without it."""
    loss, interruptions = group.loss, group.disconnections
    return {
        "training time": describe_training(group.training),
        "delay of a reply": describe_delay(group.delay),
        "network latency": describe_delay(group.latency),
        "bandwidth": _describe_bandwidth(group),
        "lost messages": NONE if loss is None else f"{_percent(loss.probability)}, {_AFTER_LOSS[loss.then]}",
        "interruptions": NONE
        if interruptions is None
        else f"on average every {format_seconds(interruptions.every_s)}, "
        f"each for {describe_duration(interruptions.duration)}",
        "availability": describe_availability(group.availability),
    }


def describe_training(training: TrainingTime) -> str:
    factor = "" if training.slowdown == 1 else f"{training.slowdown:g} × "
    if training.seconds is not None:
        return factor + describe_duration(training.seconds)
    if training.seconds_per_sample is not None:
        return f"{factor}{training.seconds_per_sample:g} s per sample"
    return f"{factor}the measured time" if factor else "as measured"


def describe_delay(delay: AnyDelay | None) -> str:
    if delay is None or delay.probability == 0:
        return NONE
    chance = "" if delay.probability == 1 else f", in {_percent(delay.probability)} of all cases"
    return describe_duration(delay) + chance


def describe_duration(duration: AnyDuration) -> str:
    match duration:
        case ConstantDuration():
            return format_seconds(duration.seconds)
        case UniformDuration():
            return f"{duration.min_s:g} to {duration.max_s:g} s (uniform)"
        case NormalDuration():
            return f"{duration.mean_s:g} ± {duration.std_s:g} s (normal)"
        case LognormalDuration():
            return f"{format_seconds(duration.median_s)} (median; lognormal, σ {duration.sigma:g})"
        case ExponentialDuration():
            return f"{format_seconds(duration.mean_s)} on average (exponential)"


def _describe_bandwidth(group: Group) -> str:
    down, up = group.bandwidth.down_mbit_s, group.bandwidth.up_mbit_s
    if down is None and up is None:
        return NONE
    limits = ((down, "down"), (up, "up"))
    return ", ".join(f"{limit:g} Mbit/s {name}" for limit, name in limits if limit is not None)


def describe_availability(pattern: Availability | None) -> str:
    if pattern is None:
        return NONE
    if pattern.share is not None:
        return (
            f"{_percent(pattern.share)} of the time, in periods of about {format_seconds(pattern.period_s)}"
        )
    if pattern.hours is not None:
        hours = ", ".join(f"{_format_hour(start)}-{_format_hour(stop)}" for start, stop in pattern.hours)
        return hours + (f", in time zones over {pattern.spread_h:g} h" if pattern.spread_h else "")
    intervals = ", ".join(f"{start:g}-{stop:g}" for start, stop in pattern.intervals_s or ())
    return f"{intervals} s" + (f" of each {format_seconds(pattern.repeat_s)}" if pattern.repeat_s else "")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def format_seconds(seconds: float) -> str:
    """Format a duration: ``60 ms``, ``20 s``, ``15 min``, ``2 h``."""
    if 0 < seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def _format_hour(seconds: float) -> str:
    return f"{int(seconds // 3600):02}:{int(seconds % 3600 // 60):02}"
