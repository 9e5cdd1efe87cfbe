"""The reason why a pod does not start, as Kubernetes reports it: image, resources, permission, missing Secret.

Kubernetes retries forever, and the Job does not fail. So the reason is read from the conditions and containers of
the pod, or from the events of the Job if there is no pod.
"""

from collections.abc import Sequence
from typing import Final

from fedbus.agents.flower_server.kubernetes.api import Object

STARTING_REASONS: Final = frozenset({"ContainerCreating", "PodInitializing"})
"""Waiting reasons of a normal start: Kubernetes pulls images and mounts volumes."""


def has_started(pod: Object) -> bool:
    """Return whether a container of *pod* runs or has run."""
    return any(
        container.get("state", {}).keys() & {"running", "terminated"} for container in _containers(pod)
    )


def scheduling_problem(pod: Object) -> str:
    """Return why *pod* does not start; "" if it is starting normally."""
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _describe(condition)
    for container in _containers(pod):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason", "ContainerCreating") not in STARTING_REASONS:
            return _describe(waiting)
    return ""


def last_warning(events: Sequence[Object]) -> str:
    """Return the text of the last warning in *events*; "" if there is none."""
    warnings = [event for event in events if event.get("type") == "Warning"]
    return _describe(max(warnings, key=_event_time)) if warnings else ""


def _containers(pod: Object) -> list[Object]:
    return list(pod.get("status", {}).get("containerStatuses") or [])


def _event_time(event: Object) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or ""


def _describe(status: Object) -> str:
    return ": ".join(filter(None, (status.get("reason"), status.get("message"))))
