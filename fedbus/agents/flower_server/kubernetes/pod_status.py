"""Why a pod does not start, in the cluster's own words: no image, no room, no permission, no such Secret.

Kubernetes goes on trying, and a Job without an end tells nobody. What stands in the way is read off
the pod's conditions and containers, and off the Job's events where there is no pod at all.
"""

from collections.abc import Sequence
from typing import Any, Final

Object = dict[str, Any]

STARTING_REASONS: Final = frozenset({"ContainerCreating", "PodInitializing"})
"""Reasons for which a container waits that are none for worry: images are pulled, volumes mounted."""


def has_started(pod: Object) -> bool:
    """Whether one of its containers runs or has run."""
    return any(one.get("state", {}).keys() & {"running", "terminated"} for one in _containers(pod))


def scheduling_problem(pod: Object) -> str:
    """What keeps *pod* from starting now; nothing where it is on its way."""
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _describe(condition)
    for container in _containers(pod):
        waits = container.get("state", {}).get("waiting") or {}
        if waits.get("reason", "ContainerCreating") not in STARTING_REASONS:
            return _describe(waits)
    return ""


def last_warning(events: Sequence[Object]) -> str:
    """The last warning among *events*; nothing where there is none."""
    warnings = [one for one in events if one.get("type") == "Warning"]
    return _describe(max(warnings, key=_event_time)) if warnings else ""


def _containers(pod: Object) -> list[Object]:
    return list(pod.get("status", {}).get("containerStatuses") or [])


def _event_time(event: Object) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or ""


def _describe(about: Object) -> str:
    return ": ".join(filter(None, (about.get("reason"), about.get("message"))))
