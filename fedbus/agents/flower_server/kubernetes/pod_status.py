"""Why a pod does not start, in the cluster's own words: no image, no room, no permission, no such Secret.

Kubernetes goes on trying, and a Job without an end tells nobody. What stands in the way is read off
the pod's conditions and containers, and off the Job's events where there is no pod at all.
"""

from collections.abc import Sequence
from typing import Any, Final

Object = dict[str, Any]

ON_ITS_WAY: Final = frozenset({"ContainerCreating", "PodInitializing"})
"""Reasons for which a container waits that are none for worry: images are pulled, volumes mounted."""


def has_started(pod: Object) -> bool:
    """Whether one of its containers runs or has run."""
    return any(one.get("state", {}).keys() & {"running", "terminated"} for one in _containers(pod))


def obstacle(pod: Object) -> str:
    """What keeps *pod* from starting now; nothing where it is on its way."""
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _said(condition)
    for container in _containers(pod):
        waits = container.get("state", {}).get("waiting") or {}
        if waits.get("reason", "ContainerCreating") not in ON_ITS_WAY:
            return _said(waits)
    return ""


def warned_of(events: Sequence[Object]) -> str:
    """The last warning among *events*; nothing where there is none."""
    warnings = [one for one in events if one.get("type") == "Warning"]
    return _said(max(warnings, key=_when)) if warnings else ""


def _containers(pod: Object) -> list[Object]:
    return list(pod.get("status", {}).get("containerStatuses") or [])


def _when(event: Object) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or ""


def _said(about: Object) -> str:
    return ": ".join(filter(None, (about.get("reason"), about.get("message"))))
