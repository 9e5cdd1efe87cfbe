"""The part of the Kubernetes API that a launcher needs, over HTTP, with the service account of this pod.

The client reads the token for each request, since the kubelet renews it. A rejected request raises
ApiRequestRejected with the server's message; an unavailable server raises ApiUnavailable.
"""

import asyncio
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import aiohttp

SERVICE_ACCOUNT_DIRECTORY: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_TIMEOUT_S: Final = 15.0
WATCH_S: Final = 240
"""The duration of one watch request, in seconds. The caller starts the next one."""
MAX_LINE_BYTES: Final = 4 * 1024**2
JOBS: Final = "/apis/batch/v1/namespaces/{namespace}/jobs"
PODS: Final = "/api/v1/namespaces/{namespace}/pods"
EVENTS: Final = "/api/v1/namespaces/{namespace}/events"
TEMPLATES: Final = "/api/v1/namespaces/{namespace}/podtemplates"

Object = dict[str, Any]
"""A Kubernetes object as JSON."""


class KubernetesError(Exception):
    """A request to the Kubernetes API failed."""


class NotInACluster(KubernetesError):
    """This process does not run in a pod with a service account."""


class ApiRequestRejected(KubernetesError):
    """The API server rejected the request with an HTTP *status*."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_not_found(self) -> bool:
        return self.status in (404, 410)


class ApiUnavailable(KubernetesError):
    """The API server does not answer, or cannot serve the request now. A retry may succeed."""


@dataclass(frozen=True)
class ClusterConfig:
    """The address of the API server and the credentials of this process."""

    url: str
    namespace: str
    token: Path
    ca: Path | None = None

    @classmethod
    def from_pod(
        cls, environment: Mapping[str, str] | None = None, mounted: Path = SERVICE_ACCOUNT_DIRECTORY
    ) -> Self:
        """Return the cluster of this pod. Raises NotInACluster."""
        variables = os.environ if environment is None else environment
        host, port = variables.get("KUBERNETES_SERVICE_HOST"), variables.get("KUBERNETES_SERVICE_PORT", "443")
        if host is None or not (mounted / "token").exists():
            raise NotInACluster(
                "this process has no service account of a Kubernetes cluster. Run it in a pod with one "
                "(automountServiceAccountToken), or set FEDBUS_LAUNCHER=process"
            )
        host = f"[{host}]" if ":" in host else host
        namespace = (mounted / "namespace").read_text().strip()
        return cls(f"https://{host}:{port}", namespace, mounted / "token", mounted / "ca.crt")

    @asynccontextmanager
    async def open(self) -> AsyncIterator["KubernetesClient"]:
        """Open an HTTP session with the API server."""
        tls = ssl.create_default_context(cafile=self.ca) if self.ca else None
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls if tls is not None else True),
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            read_bufsize=MAX_LINE_BYTES,
        ) as session:
            yield KubernetesClient(self, session)


class KubernetesClient:
    """A client for Jobs, their pods, events and logs in one namespace.

    All methods raise KubernetesError.
    """

    def __init__(self, cluster: ClusterConfig, session: aiohttp.ClientSession) -> None:
        self._cluster = cluster
        self._session = session

    async def get_pod_template(self, name: str) -> Object:
        """Get the PodTemplate *name*."""
        return await self._request_json("GET", f"{TEMPLATES}/{name}")

    async def create_job(self, job: Object) -> Object:
        return await self._request_json("POST", JOBS, body=job)

    async def get_job(self, name: str) -> Object:
        return await self._request_json("GET", f"{JOBS}/{name}")

    async def list_jobs(self, labels: Mapping[str, str]) -> list[Object]:
        """List the Jobs with all of *labels*."""
        response = await self._request_json("GET", JOBS, {"labelSelector": _label_selector(labels)})
        return list(response["items"])

    async def delete_job(self, name: str) -> None:
        """Delete a Job in the foreground: it exists until its pods are deleted. A missing Job is not an error."""
        try:
            await self._request_json("DELETE", f"{JOBS}/{name}", {"propagationPolicy": "Foreground"})
        except ApiRequestRejected as rejected:
            if not rejected.is_not_found:
                raise

    async def watch_job(self, name: str, since: str) -> AsyncGenerator[tuple[str, Object], None]:
        """Yield the changes of a Job after the resource version *since*: their type (``MODIFIED``, …) and the Job."""
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": since,
            "timeoutSeconds": str(WATCH_S),
        }
        async with self._request("GET", JOBS, query, total_s=WATCH_S + REQUEST_TIMEOUT_S) as response:
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiRequestRejected(
                        event["object"].get("code", 500), event["object"].get("message", "?")
                    )
                yield event["type"], event["object"]

    async def list_pods(self, job: str) -> list[Object]:
        """List the pods of a Job."""
        response = await self._request_json(
            "GET", PODS, {"labelSelector": f"batch.kubernetes.io/job-name={job}"}
        )
        return list(response["items"])

    async def list_events(self, name: str) -> list[Object]:
        """List the events of the object *name*, which Kubernetes keeps for about an hour."""
        response = await self._request_json("GET", EVENTS, {"fieldSelector": f"involvedObject.name={name}"})
        return list(response["items"])

    async def log_tail(self, pod: str, lines: int = 1) -> str:
        """Return the last *lines* of a pod's log, joined to one line."""
        async with self._request("GET", f"{PODS}/{pod}/log", {"tailLines": str(lines)}) as response:
            return " | ".join((await response.text()).splitlines())

    async def _request_json(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Object | None = None
    ) -> Object:
        async with self._request(method, path, query, body) as response:
            result: Object = await response.json()
            return result

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        total_s: float = REQUEST_TIMEOUT_S,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        url = self._cluster.url + path.format(namespace=self._cluster.namespace)
        token = await asyncio.to_thread(self._cluster.token.read_text)
        try:
            async with self._session.request(
                method,
                url,
                params=query,
                json=body,
                headers={"Authorization": f"Bearer {token.strip()}"},
                timeout=aiohttp.ClientTimeout(total=total_s),
            ) as response:
                await _raise_for_status(response)
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnavailable(
                f"the Kubernetes API at {self._cluster.url} does not answer: {error or 'timeout'}"
            ) from None


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    text = await response.text()
    try:
        message = json.loads(text).get("message") or text
    except ValueError:
        message = text or (response.reason or "")
    if response.status == 429 or response.status >= 500:
        raise ApiUnavailable(f"the Kubernetes API is unavailable (HTTP {response.status}): {message}")
    raise ApiRequestRejected(response.status, message)


def _label_selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())
