"""A launcher that runs the server session of a run as a Kubernetes Job.

    Flower server –creates, watches and deletes→ Job      its pod uses the bus like every server session

A PodTemplate of the same namespace defines the pod: its image, resources and GPU. The launcher adds the command,
the process configuration, and labels by which a restarted agent finds Jobs that its predecessor left behind.

If a pod does not start, because of a missing image, resources or permission, the run counts as lost after
`START_TIMEOUT_S`, with the reason that Kubernetes reports. A Job has one attempt: the server manager decides
whether a run resumes.
"""

import asyncio
import copy
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final, TypeVar

import structlog

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.child_process import ANSWER_VARIABLE, trace_environment
from fedbus.agents.common.process_orders import ProcessConfig, ServerProcessConfig
from fedbus.agents.flower_server.kubernetes.api import (
    ApiRequestRejected,
    ApiUnavailable,
    ClusterConfig,
    KubernetesClient,
    KubernetesError,
    Object,
)
from fedbus.agents.flower_server.kubernetes.pod_status import has_started, last_warning, scheduling_problem
from fedbus.common.retry import retry

CONTAINER: Final = "flower-server"
"""The container of the PodTemplate that runs the session."""
TERMINATION_LOG: Final = "/dev/termination-log"
"""The default `terminationMessagePath`: Kubernetes reports the content of this file."""
DELETE_TIMEOUT_S: Final = 90.0
"""The limit for the deletion of a Job and its pod."""
FINISHED_JOB_TTL_S: Final = 3600
"""`ttlSecondsAfterFinished`: Kubernetes deletes an ended Job after this time if the launcher has not."""
START_TIMEOUT_S: Final = 30.0
"""The limit for a start problem of a pod, which may be temporary. Clients wait in this time."""
LABEL_PREFIX: Final = "fedbus.dev/"

log = structlog.get_logger("fedbus.kubernetes_launcher")
T = TypeVar("T")


class KubernetesLauncher:
    """Runs server sessions of one task as Jobs in *cluster*, with the PodTemplate *template*."""

    has_shared_files = False

    def __init__(
        self,
        cluster: ClusterConfig,
        *,
        template: str,
        federation: str,
        task: str,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._cluster = cluster
        self._start_timeout_s = start_timeout_s
        self._template = template
        self._labels = {
            "app.kubernetes.io/part-of": "fedbus",
            "app.kubernetes.io/component": CONTAINER,
            f"{LABEL_PREFIX}federation": federation,
            f"{LABEL_PREFIX}task": task,
        }

    async def run(self, config: ServerProcessConfig, stop: asyncio.Event) -> str:
        async with self._cluster.open() as api:
            name = job_name(config.run)
            try:
                reason = await self._run_job(api, name, config, stop)
            except KubernetesError as error:
                reason = f"cannot run the Flower server as a Kubernetes Job: {error}"
            finally:
                await asyncio.shield(asyncio.ensure_future(self._delete(api, name)))
            return "" if stop.is_set() else reason

    async def remove_orphans(self) -> None:
        async with self._cluster.open() as api:
            for job in await _retry(lambda: api.list_jobs(self._labels)):
                name = job["metadata"]["name"]
                log.warning("Deleting Job of an earlier Flower server", job=name)
                await self._delete(api, name)

    async def _run_job(
        self, api: KubernetesClient, name: str, config: ServerProcessConfig, stop: asyncio.Event
    ) -> str:
        reasons: list[str] = []

        async def create_and_wait() -> None:
            template = await _retry(lambda: api.get_pod_template(self._template))
            job = render_job(name, template, config, self._labels)
            await _retry(lambda: _create_job(api, job))
            log.info("Job created", job=name, run=config.run)
            await wait_for_first(wait_for_end(), wait_for_start_problem())

        async def wait_for_end() -> None:
            reasons.append(await _describe_end(api, await _wait_for_end(api, name)))

        async def wait_for_start_problem() -> None:
            problem = await _wait_for_start_problem(api, name, self._start_timeout_s)
            reasons.append(f"the pod of the Flower server does not start: {problem}")

        await wait_for_first(create_and_wait(), stop.wait())
        return reasons[0] if reasons else ""

    async def _delete(self, api: KubernetesClient, name: str) -> None:
        """Delete a Job and wait for the end of its pod: two sessions of a task would share messages."""
        try:
            async with asyncio.timeout(DELETE_TIMEOUT_S):
                await _retry(lambda: api.delete_job(name))
                await _wait_until_deleted(api, name)
        except (TimeoutError, KubernetesError) as error:
            log.warning("Job deletion failed", job=name, reason=str(error) or "timeout")


def job_name(run: str) -> str:
    """Return a unique name for a Job of *run*, of at most 63 characters. Two attempts of a run have two names."""
    return f"{re.sub(r'[^a-z0-9-]', '-', run.lower())[:40].strip('-')}-server-{secrets.token_hex(3)}"


def render_job(name: str, template: Object, config: ServerProcessConfig, labels: dict[str, str]) -> Object:
    """Build the Job *name* from the PodTemplate.

    Raises:
        ApiRequestRejected: the PodTemplate has no container `CONTAINER`.

    """
    pod = copy.deepcopy(template["template"])
    containers = [container for container in pod["spec"]["containers"] if container["name"] == CONTAINER]
    if not containers:
        raise ApiRequestRejected(422, f"the PodTemplate has no container {CONTAINER!r}")
    labels = {**labels, f"{LABEL_PREFIX}run": config.run[:63].rstrip("-")}
    containers[0]["command"] = ["python3", "-m", "fedbus", "job", "server"]
    answer_file = containers[0].get("terminationMessagePath", TERMINATION_LOG)
    containers[0]["env"] = [*containers[0].get("env", []), *_environment_variables(config, answer_file)]
    metadata = pod.setdefault("metadata", {})
    metadata["labels"] = {**metadata.get("labels", {}), **labels}
    pod["spec"]["restartPolicy"] = "Never"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {"backoffLimit": 0, "ttlSecondsAfterFinished": FINISHED_JOB_TTL_S, "template": pod},
    }


def _environment_variables(config: ProcessConfig, answer_file: str) -> list[dict[str, str]]:
    """Return the variables with *config*, the current trace, and the answer file. The pod sets its own home."""
    variables = (
        config.model_copy(update={"home": ""}).environment()
        | trace_environment()
        | {ANSWER_VARIABLE: answer_file}
    )
    return [{"name": name, "value": value} for name, value in variables.items()]


async def _retry(request: Callable[[], Awaitable[T]]) -> T:
    """Repeat *request* while the API server is unavailable. Raises ApiRequestRejected."""

    def report(error: Exception, failed_before: int) -> None:
        if failed_before == 0:
            log.warning("Kubernetes API unavailable; retrying", reason=str(error))

    return await retry(request, on=ApiUnavailable, on_failure=report)


async def _create_job(api: KubernetesClient, job: Object) -> None:
    """Create a Job. A conflict means that an earlier attempt created it and its response was lost."""
    try:
        await api.create_job(job)
    except ApiRequestRejected as rejected:
        if rejected.status != 409:
            raise


async def _job_states(api: KubernetesClient, name: str) -> AsyncGenerator[Object, None]:
    """Yield a Job now and after each change, until it is deleted. Raises ApiRequestRejected."""
    while True:
        try:
            job = await _retry(lambda: api.get_job(name))
            yield job
            async with aclosing(api.watch_job(name, job["metadata"]["resourceVersion"])) as changes:
                async for change, changed_job in changes:
                    if change == "DELETED":
                        return
                    yield changed_job
        except ApiUnavailable:
            continue  # the next request waits until it is available
        except ApiRequestRejected as rejected:
            if rejected.status == 404:
                return
            if (
                not rejected.is_not_found
            ):  # 410: the resource version is too old to watch, so read the Job again
                raise


async def _wait_for_end(api: KubernetesClient, name: str) -> Object | None:
    """Wait for the end of a Job and return it; None if it is deleted before it completes."""
    async with aclosing(_job_states(api, name)) as states:
        async for job in states:
            if "deletionTimestamp" in job["metadata"] and _true_condition(job, "Complete") is None:
                return None
            if _has_ended(job):
                return job
    return None


async def _wait_for_start_problem(api: KubernetesClient, name: str, interval_s: float) -> str:
    """Return why the pod of a Job does not start. If the pod starts, never return.

    It checks every *interval_s* seconds, so that it ignores a problem that is resolved before.
    """
    while True:
        await asyncio.sleep(interval_s)
        pods = await _retry(lambda: api.list_pods(name))
        if any(has_started(pod) for pod in pods):
            await asyncio.Event().wait()  # until the caller cancels it
        if (
            reason := next(filter(None, map(scheduling_problem, pods)), "")
            if pods
            else await _read_warnings(api, name)
        ):
            return reason


async def _read_warnings(api: KubernetesClient, name: str) -> str:
    """Return the last warning about a Job without a pod; "" if this service account may not read events."""
    try:
        return last_warning(await _retry(lambda: api.list_events(name)))
    except ApiRequestRejected as rejected:
        log.warning("Reading Job events failed", job=name, reason=str(rejected))
        return ""


async def _wait_until_deleted(api: KubernetesClient, name: str) -> None:
    async for _ in _job_states(api, name):
        pass


def _true_condition(job: Object, *types: str) -> Object | None:
    """Return the first condition of *types* with the status True, or None."""
    conditions = job.get("status", {}).get("conditions") or []
    return next((entry for entry in conditions if entry["type"] in types and entry["status"] == "True"), None)


def _has_ended(job: Object) -> bool:
    return _true_condition(job, "Complete", "Failed") is not None


async def _describe_end(api: KubernetesClient, job: Object | None) -> str:
    """Return how the session was lost; "" if the Job completed."""
    if job is None:
        return "the Job of the Flower server was deleted from outside fedbus"
    failed = _true_condition(job, "Failed")
    if failed is None:
        return ""
    try:
        return await _describe_pod_end(api, job["metadata"]["name"]) or _describe_condition(failed)
    except KubernetesError:  # the pod is deleted, because it was evicted or its node was lost
        return _describe_condition(failed)


async def _describe_pod_end(api: KubernetesClient, job: str) -> str:
    for pod in await api.list_pods(job):
        for container in pod.get("status", {}).get("containerStatuses") or []:
            if (terminated := container.get("state", {}).get("terminated")) is not None:
                message = terminated.get("message") or await api.log_tail(pod["metadata"]["name"])
                return f"the Flower server {_describe_termination(terminated)}: {message}"
    return ""


def _describe_termination(terminated: Object) -> str:
    if terminated.get("reason") == "OOMKilled":
        return "exceeded its memory limit (OOMKilled; raise resources.limits in its PodTemplate)"
    return f"ended with code {terminated.get('exitCode')}"


def _describe_condition(condition: Object) -> str:
    text = f"{condition.get('reason', '')} {condition.get('message', '')}"
    return f"the Job of the Flower server failed: {text}".strip()
