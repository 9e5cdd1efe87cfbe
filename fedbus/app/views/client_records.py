"""The clients of a federation as JSON data, for `fedbus clients`."""

from typing import Any

from fedbus.app.bus_session import latest_messages, latest_transitions
from fedbus.app.views.federation_status import apply_stored
from fedbus.bus.bus import Bus
from fedbus.contracts.client import CLIENT, FL_CLIENT, INFERENCE
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import LifecycleData
from fedbus.contracts.run import RUN
from fedbus.contracts.serving import DataChecked
from fedbus.domain.client_scores import ClientStats, collect_client_stats, task_rounds
from fedbus.domain.federation_view import ClientKey, ClientView, DeviceState, EntityState, FederationView


async def load_client_records(bus: Bus, *, with_checks_of: ClientId | None = None) -> list[dict[str, Any]]:
    """Load each client in each task: its three lifecycles, its statistics and its device.

    The data checks are loaded for one client only; those of all clients can be large.
    """
    kinds = (CLIENT.kind, FL_CLIENT.kind, INFERENCE.kind, RUN.kind)
    transitions = await latest_transitions(bus, *kinds)
    view = FederationView(max_finished_runs=len(transitions))  # the statistics need all runs
    for stored in transitions:
        apply_stored(view, stored)
    for stored in await bus.last_per_device(DeviceReport):
        view.apply(stored.message, at=stored.envelope.time)
    checks = await latest_messages(bus, DataChecked, client=with_checks_of) if with_checks_of else []
    live = {
        (one.message.client, one.message.task): one.message.model_dump()["live"]
        for one in checks
        if isinstance(one.message, DataChecked)
    }
    stats = _stats_by_client(view)
    return [
        _client_record(client)
        | {
            "standing": _stats_record(stats.get(key, ClientStats())),
            "device": _device_record(view.presence.reports.get(key)),
            "live": live.get(key, []),
        }
        for key, client in view.clients.items()
    ]


def _client_record(client: ClientView) -> dict[str, Any]:
    served = client.served_model
    return {
        "client": client.client,
        "task": client.task,
        "state": client.state,
        "training": client.training_state,
        "inference": client.inference_state,
        "model_version": served.version if served else None,
        "sha256": served.sha256 if served else None,
        "not_served": client.not_served,
        "taken_version": client.taken_model.version if client.taken_model else None,
        "run": client.run,
        "endpoint": client.endpoint,
        "since": max(one.at for one in client.lifecycles),
        "lives": [_lifecycle_record(one) for one in client.lifecycles],
    }


def _lifecycle_record(entity: EntityState[LifecycleData]) -> dict[str, Any]:
    transition = entity.transition
    return {
        "kind": entity.data.kind,
        "state": entity.state,
        "event": transition.event,
        "reason": transition.reason,
        "waits_for": transition.waits_for,
        "deadline": transition.deadline,
        "since": entity.at,
    }


def _stats_by_client(view: FederationView) -> dict[ClientKey, ClientStats]:
    """Compute the statistics of each client in each task from the rounds of all runs."""
    runs = [run.transition for run in view.runs.values()]
    return {
        (client, task): stats
        for task in {task for _, task in view.clients}
        for client, stats in collect_client_stats(task_rounds(task, runs)).items()
    }


def _stats_record(stats: ClientStats) -> dict[str, Any]:
    return vars(stats) | {"reliability": stats.reliability}


def _device_record(device: DeviceState | None) -> dict[str, Any] | None:
    if device is None:
        return None
    return device.report.model_dump(exclude={"client", "task"}) | {"at": device.at}
