"""The ServerApp of a run as a Kubernetes Job: scheduled where there is room, and gone with its run.

    wrapper –creates→ Job ← watches ← wrapper      the pod speaks on the bus like every Flower server

What its pod is like stands in a PodTemplate of the same namespace, so that an image, resources or a
GPU are set where everything else of the cluster is set. Here only three things are added: the
command, the order, and labels by which whoever comes after us finds what we left.

A pod that does not start, for want of an image, of room or of a permission, is lost after a while, with what
the cluster says of it. A Job is tried once: whether a run is taken up again is the server manager's to decide.
"""

import asyncio
import copy
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import structlog

from fedbus.agents.common.asyncio_tools import backoff_s, wait_for_first
from fedbus.agents.common.child_process import ANSWER_VARIABLE, trace_environment
from fedbus.agents.common.process_orders import ProcessConfig, ServerProcessConfig
from fedbus.agents.flower_server.kubernetes.api import (
    ApiRequestRejected,
    ApiUnavailable,
    ClusterConfig,
    KubernetesClient,
    KubernetesError,
)
from fedbus.agents.flower_server.kubernetes.pod_status import has_started, last_warning, scheduling_problem

"""The module that a Job's process begins in. A name and not an import: the edge stands above the agents."""
CONTAINER: Final = "flower-server"
TERMINATION_LOG: Final = "/dev/termination-log"
"""What a container writes there is its last word to the cluster, unless its template names another file."""
DELETE_TIMEOUT_S: Final = 90.0
"""How long the pod of a Job that was deleted may take to go."""
FINISHED_JOB_TTL_S: Final = 3600
"""How long Kubernetes keeps a Job that ended and that nobody removed."""
START_TIMEOUT_S: Final = 30.0
"""How long something may keep a pod from starting: the cluster may mend it, and clients wait meanwhile."""
LABEL_PREFIX: Final = "fedbus.dev/"

log = structlog.get_logger("fedbus.kubernetes_jobs")
T = TypeVar("T")


class KubernetesLauncher:
    """Runs ServerApps of one task in *cluster*, in pods like the PodTemplate *template*."""

    shares_files = False

    def __init__(
        self,
        cluster: ClusterConfig,
        *,
        template: str,
        federation: str,
        task: str,
        starts_within_s: float = START_TIMEOUT_S,
    ) -> None:
        self._cluster = cluster
        self._starts_within_s = starts_within_s
        self._template = template
        self._labels = {
            "app.kubernetes.io/part-of": "fedbus",
            "app.kubernetes.io/component": CONTAINER,
            f"{LABEL_PREFIX}federation": federation,
            f"{LABEL_PREFIX}task": task,
        }

    async def run(self, order: ServerProcessConfig, stop: asyncio.Event) -> str:
        async with self._cluster.open() as api:
            name = job_name(order.run)
            try:
                lost = await self._until_ended(api, name, order, stop)
            except KubernetesError as error:
                lost = f"the Flower server was not run as a Job: {error}"
            finally:
                await asyncio.shield(asyncio.ensure_future(self._remove(api, name)))
            return "" if stop.is_set() else lost

    async def sweep(self) -> None:
        async with self._cluster.open() as api:
            for job in await _retry(lambda: api.jobs(self._labels)):
                name = job["metadata"]["name"]
                log.warning("a Job of an earlier Flower server is removed", job=name)
                await self._remove(api, name)

    async def _until_ended(
        self, api: KubernetesClient, name: str, order: ServerProcessConfig, stop: asyncio.Event
    ) -> str:
        lost: list[str] = []

        async def work() -> None:
            template = await _retry(lambda: api.template(self._template))
            job = render_job(name, template, order, self._labels)
            await _retry(lambda: _create_job(api, job))
            log.info("the Flower server is a Job", job=name, run=order.run)
            await wait_for_first(end(), no_start())

        async def end() -> None:
            lost.append(await _describe_end(api, await _wait_for_end(api, name)))

        async def no_start() -> None:
            reason = await _wait_for_start_problem(api, name, self._starts_within_s)
            lost.append(f"the pod of the Flower server does not start: {reason}")

        await wait_for_first(work(), stop.wait())
        return lost[0] if lost else ""

    async def _remove(self, api: KubernetesClient, name: str) -> None:
        """End it, and wait until its pod has gone: two servers of a task would hear each other's words."""
        try:
            async with asyncio.timeout(DELETE_TIMEOUT_S):
                await _retry(lambda: api.delete_job(name))
                await _wait_until_deleted(api, name)
        except (TimeoutError, KubernetesError) as error:
            log.warning("a Job is left to the cluster", job=name, reason=str(error) or "it does not end")


def job_name(run: str) -> str:
    """A name for a Job of *run* that no other has; two tries of one run differ."""
    return f"{re.sub(r'[^a-z0-9-]', '-', run.lower())[:40].strip('-')}-server-{secrets.token_hex(3)}"


def render_job(
    name: str, template: dict[str, Any], order: ServerProcessConfig, labels: dict[str, str]
) -> dict[str, Any]:
    """The Job *name* that runs *order* in a pod like *template*; raises Refused where that has no such container."""
    pod = copy.deepcopy(template["template"])
    containers = [one for one in pod["spec"]["containers"] if one["name"] == CONTAINER]
    if not containers:
        raise ApiRequestRejected(422, f"the PodTemplate has no container {CONTAINER!r}")
    labels = {**labels, f"{LABEL_PREFIX}run": order.run[:63].rstrip("-")}
    containers[0]["command"] = ["python3", "-m", "fedbus", "job", "server"]
    answer = containers[0].get("terminationMessagePath", TERMINATION_LOG)
    containers[0]["env"] = [*containers[0].get("env", []), *_environment_variables(order, answer)]
    metadata = pod.setdefault("metadata", {})
    metadata["labels"] = {**metadata.get("labels", {}), **labels}
    pod["spec"]["restartPolicy"] = "Never"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {"backoffLimit": 0, "ttlSecondsAfterFinished": FINISHED_JOB_TTL_S, "template": pod},
    }


def _environment_variables(order: ProcessConfig, answer: str) -> list[dict[str, str]]:
    """The order itself, in the trace of now, and where its answer goes. The home is the pod's own."""
    given = (
        order.model_copy(update={"home": ""}).environment() | trace_environment() | {ANSWER_VARIABLE: answer}
    )
    return [{"name": name, "value": value} for name, value in given.items()]


async def _retry(ask: Callable[[], Awaitable[T]]) -> T:
    """The API server's answer, however long it is away; raises Refused."""
    attempt = 0
    while True:
        try:
            return await ask()
        except ApiUnavailable as error:
            if attempt == 0:
                log.warning("the cluster is away", reason=str(error))
            await asyncio.sleep(backoff_s(attempt))
            attempt += 1


async def _create_job(api: KubernetesClient, job: dict[str, Any]) -> None:
    """Create it; a conflict is an answer to our own first try, whose answer was lost."""
    try:
        await api.create_job(job)
    except ApiRequestRejected as refused:
        if refused.status != 409:
            raise


async def _wait_for_end(api: KubernetesClient, name: str) -> dict[str, Any] | None:
    """The Job when it has ended; None when it is no more."""
    while True:
        try:
            job = await _retry(lambda: api.job(name))
            if _has_ended(job):
                return job
            async for what, changed in api.watch_job(name, job["metadata"]["resourceVersion"]):
                if what == "DELETED" or "deletionTimestamp" in changed["metadata"]:
                    return None
                if _has_ended(changed):
                    return changed
        except ApiUnavailable:
            continue  # the next question waits for it
        except ApiRequestRejected as refused:
            if refused.status == 404:
                return None
            if not refused.is_gone:  # 410: what happened since is forgotten, so look anew
                raise


async def _wait_for_start_problem(api: KubernetesClient, name: str, within_s: float) -> str:
    """What keeps the Job's pod from starting, *within_s* or more after it was created; waits for ever where it starts.

    Looked up now and then until it has started, since what matters is what does not change.
    """
    while True:
        await asyncio.sleep(within_s)
        pods = await _retry(lambda: api.pods_of(name))
        if any(has_started(pod) for pod in pods):
            await asyncio.Event().wait()  # there is nothing more to look for
        if (
            reason := next(filter(None, map(scheduling_problem, pods)), "")
            if pods
            else await _read_warnings(api, name)
        ):
            return reason


async def _read_warnings(api: KubernetesClient, name: str) -> str:
    """What is remarked on a Job that has no pod; nothing where we may not read it."""
    try:
        return last_warning(await _retry(lambda: api.events_of(name)))
    except ApiRequestRejected as refused:
        log.warning("the events of a Job cannot be read", job=name, reason=str(refused))
        return ""


async def _wait_until_deleted(api: KubernetesClient, name: str) -> None:
    """Wait until there is no such Job."""
    while True:
        try:
            job = await _retry(lambda: api.job(name))
            async for what, _ in api.watch_job(name, job["metadata"]["resourceVersion"]):
                if what == "DELETED":
                    return
        except ApiUnavailable:
            continue
        except ApiRequestRejected as refused:
            if refused.status == 404:
                return
            if not refused.is_gone:
                raise


def _has_ended(job: dict[str, Any]) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in conditions)


async def _describe_end(api: KubernetesClient, job: dict[str, Any] | None) -> str:
    """In words where it was lost; nothing where it ended well."""
    if job is None:
        return "the Job of the Flower server was removed by somebody else"
    failed = [
        one for one in job["status"]["conditions"] if one["type"] == "Failed" and one["status"] == "True"
    ]
    if not failed:
        return ""
    try:
        return await _describe_pod_end(api, job["metadata"]["name"]) or _describe_condition(failed[0])
    except KubernetesError:  # its pod has gone: evicted, or its node lost
        return _describe_condition(failed[0])


async def _describe_pod_end(api: KubernetesClient, job: str) -> str:
    for pod in await api.pods_of(job):
        for container in pod.get("status", {}).get("containerStatuses") or []:
            if (end := container.get("state", {}).get("terminated")) is not None:
                last = end.get("message") or await api.last_words(pod["metadata"]["name"])
                return f"the Flower server {_describe_termination(end)}: {last}"
    return ""


def _describe_termination(end: dict[str, Any]) -> str:
    if end.get("reason") == "OOMKilled":
        return "was killed for want of memory (OOMKilled: see resources.limits in its PodTemplate)"
    return f"ended with code {end.get('exitCode')}"


def _describe_condition(failed: dict[str, Any]) -> str:
    return (
        f"the Job of the Flower server failed: {failed.get('reason', '')} {failed.get('message', '')}".strip()
    )
