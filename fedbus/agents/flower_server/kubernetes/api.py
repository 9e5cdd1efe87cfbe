"""The few words of the Kubernetes API that a launcher needs, in plain HTTP, as the service account of our pod.

The token is read for each request, since the kubelet renews it. What the API server refuses is
Refused, with its own words; when it is away, Away.
"""

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import aiohttp

SERVICE_ACCOUNT_DIRECTORY: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_TIMEOUT_S: Final = 15.0
WATCH_S: Final = 240
"""How long one watch lasts; then the next begins."""
MAX_LINE_BYTES: Final = 4 * 1024**2
JOBS: Final = "/apis/batch/v1/namespaces/{namespace}/jobs"
PODS: Final = "/api/v1/namespaces/{namespace}/pods"
EVENTS: Final = "/api/v1/namespaces/{namespace}/events"
TEMPLATES: Final = "/api/v1/namespaces/{namespace}/podtemplates"

Object = dict[str, Any]


class KubernetesError(Exception):
    """What was asked of the cluster was not done."""


class NotInACluster(KubernetesError):
    """This process has no service account of a cluster."""


class ApiRequestRejected(KubernetesError):
    """The API server said no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_gone(self) -> bool:
        return self.status in (404, 410)


class ApiUnavailable(KubernetesError):
    """The API server does not answer, or cannot now: ask again."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the API server is, and as whom we speak to it."""

    url: str
    namespace: str
    token: Path
    ca: Path | None = None

    @classmethod
    def of_this_pod(
        cls, environment: Mapping[str, str] | None = None, mounted: Path = SERVICE_ACCOUNT_DIRECTORY
    ) -> Self:
        """The cluster that we run in; raises NotInACluster."""
        found = os.environ if environment is None else environment
        host, port = found.get("KUBERNETES_SERVICE_HOST"), found.get("KUBERNETES_SERVICE_PORT", "443")
        if host is None or not (mounted / "token").exists():
            raise NotInACluster(
                "there is no service account here: run this in a pod that has one (automountServiceAccountToken), "
                "or set FEDBUS_LAUNCHER=process"
            )
        host = f"[{host}]" if ":" in host else host
        namespace = (mounted / "namespace").read_text().strip()
        return cls(f"https://{host}:{port}", namespace, mounted / "token", mounted / "ca.crt")

    @asynccontextmanager
    async def open(self) -> AsyncIterator["KubernetesClient"]:
        """The API, for as long as the block runs."""
        tls = ssl.create_default_context(cafile=self.ca) if self.ca else None
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls if tls is not None else True),
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            read_bufsize=MAX_LINE_BYTES,
        ) as session:
            yield KubernetesClient(self, session)


class KubernetesClient:
    """Jobs, their pods and their logs, in one namespace."""

    def __init__(self, cluster: ClusterConfig, session: aiohttp.ClientSession) -> None:
        self._cluster = cluster
        self._session = session

    async def template(self, name: str) -> Object:
        """The PodTemplate *name*."""
        return await self._json("GET", f"{TEMPLATES}/{name}")

    async def create_job(self, job: Object) -> Object:
        return await self._json("POST", JOBS, body=job)

    async def job(self, name: str) -> Object:
        return await self._json("GET", f"{JOBS}/{name}")

    async def jobs(self, labels: Mapping[str, str]) -> list[Object]:
        found = await self._json("GET", JOBS, {"labelSelector": _label_selector(labels)})
        return list(found["items"])

    async def delete_job(self, name: str) -> None:
        """Ask for its end; it is there until its pods have gone. One that is not there is fine."""
        try:
            await self._json("DELETE", f"{JOBS}/{name}", {"propagationPolicy": "Foreground"})
        except ApiRequestRejected as refused:
            if not refused.is_gone:
                raise

    async def watch_job(self, name: str, since: str) -> AsyncIterator[tuple[str, Object]]:
        """What happens to the job after the resource version *since*, and how it is then: ``MODIFIED``, ``DELETED``."""
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": since,
            "timeoutSeconds": str(WATCH_S),
        }
        async with self._asked("GET", JOBS, query, total_s=WATCH_S + REQUEST_TIMEOUT_S) as answer:
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiRequestRejected(
                        event["object"].get("code", 500), event["object"].get("message", "?")
                    )
                yield event["type"], event["object"]

    async def pods_of(self, job: str) -> list[Object]:
        found = await self._json("GET", PODS, {"labelSelector": f"batch.kubernetes.io/job-name={job}"})
        return list(found["items"])

    async def events_of(self, thing: str) -> list[Object]:
        """What the cluster remarked on the object named *thing* in the last hour or so."""
        found = await self._json("GET", EVENTS, {"fieldSelector": f"involvedObject.name={thing}"})
        return list(found["items"])

    async def last_words(self, pod: str, lines: int = 1) -> str:
        """The end of its log, on one line."""
        async with self._asked("GET", f"{PODS}/{pod}/log", {"tailLines": str(lines)}) as answer:
            return " | ".join((await answer.text()).splitlines())

    async def _json(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Object | None = None
    ) -> Object:
        async with self._asked(method, path, query, body) as answer:
            found: Object = await answer.json()
            return found

    @asynccontextmanager
    async def _asked(
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
            ) as answer:
                await _raise_for_status(answer)
                yield answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnavailable(
                f"the API server at {self._cluster.url} does not answer: {error or 'too late'}"
            ) from None


async def _raise_for_status(answer: aiohttp.ClientResponse) -> None:
    if answer.status < 400:
        return
    said = await answer.text()
    try:
        message = json.loads(said).get("message") or said
    except ValueError:
        message = said or (answer.reason or "")
    if answer.status == 429 or answer.status >= 500:
        raise ApiUnavailable(f"the API server cannot now: {message}")
    raise ApiRequestRejected(answer.status, message)


def _label_selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())
