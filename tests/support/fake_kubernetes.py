"""A fake Kubernetes API that runs each Job as a process on this machine.

It has the paths that the launcher uses, checks the token and the manifest (against the schema of a real version),
supports resource versions and watches, and reports the exit of the process as a kubelet does. It does not schedule
pods or pull images, and has one namespace.
"""

import asyncio
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
from aiohttp import web

from fedbus.agents.common.child_process import ANSWER_VARIABLE
from fedbus.agents.flower_server.kubernetes.api import ClusterConfig

NAMESPACE: Final = "fedbus"
VERSION: Final = "1.34"
TOKEN: Final = "a token"
GRACE_S: Final = 10.0
Object = dict[str, Any]


@dataclass
class FakeJob:
    manifest: Object
    child: asyncio.subprocess.Process | None
    log: Path
    termination_log: Path
    """The file of the container's termination message."""
    watch: "asyncio.Task[None] | None" = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self.child is not None, "its pod has not started"
        return self.child

    @property
    def has_ended(self) -> bool:
        return bool(self.manifest["status"].get("conditions"))


@dataclass
class FakeKubernetes:
    """The state of the cluster, and its HTTP API."""

    directory: Path
    environment: dict[str, str]
    """Variables of a pod in addition to its manifest; in a cluster, the image has them."""
    template: Object
    url: str = ""
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    created: list[Object] = field(default_factory=list)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    """HTTP method → status and message of the reply to each request."""
    pending_pod_status: Object | None = None
    """If set, no pod starts, and each has this status."""
    pod_creation_error: str = ""
    """If set, no pod is created, and each Job has an event with this message."""
    _version: "itertools.count[int]" = field(default_factory=lambda: itertools.count(100))
    _watch_events: list[tuple[int, str, Object]] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def cluster(self) -> ClusterConfig:
        token = self.directory / "token"
        token.write_text(f"{TOKEN}\n")
        return ClusterConfig(self.url, NAMESPACE, token)

    async def remove(self, name: str) -> None:
        """Delete a Job, as ``kubectl delete job`` does."""
        await self._begin_deletion(name)
        await self._finish_deletion(name)

    # --- HTTP API --------------------------------------------------------------------------

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._authorize])
        jobs, core = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs", f"/api/v1/namespaces/{NAMESPACE}"
        application.add_routes(
            [
                web.get(jobs, self._list_or_watch),
                web.post(jobs, self._create),
                web.get(f"{jobs}/{{name}}", self._get),
                web.delete(f"{jobs}/{{name}}", self._delete),
                web.get(f"{core}/podtemplates/{{name}}", self._template),
                web.get(f"{core}/pods", self._pods),
                web.get(f"{core}/events", self._events),
                web.get(f"{core}/pods/{{name}}/log", self._log),
            ]
        )
        return application

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _status(401, "Unauthorized")
        if (refusal := self.refusals.get(request.method)) is not None:
            return _status(*refusal)
        response: web.StreamResponse = await handler(request)
        return response

    async def _template(self, request: web.Request) -> web.Response:
        if request.match_info["name"] != self.template["metadata"]["name"]:
            return _status(404, f'podtemplates "{request.match_info["name"]}" not found')
        return web.json_response(self.template)

    async def _create(self, request: web.Request) -> web.Response:
        manifest = await request.json()
        kubernetes_validate.validate(manifest, VERSION, strict=True)
        name = manifest["metadata"]["name"]
        if name in self.jobs:  # the client has repeated a request whose response came too late
            return _status(409, f'jobs.batch "{name}" already exists')
        manifest["metadata"] |= {"namespace": NAMESPACE, "resourceVersion": str(next(self._version))}
        manifest["status"] = {"active": 1}
        self.created.append(manifest)
        container = manifest["spec"]["template"]["spec"]["containers"][0]
        variables = {one["name"]: one["value"] for one in container["env"]}
        program, *arguments = container["command"]
        assert program == "python3"
        log, termination_log = self.directory / f"{name}.log", self.directory / f"{name}.last-word"
        assert variables[ANSWER_VARIABLE] == container.get("terminationMessagePath", "/dev/termination-log")
        self.jobs[name] = job = FakeJob(manifest, None, log, termination_log)
        if self.pending_pod_status is not None or self.pod_creation_error:
            return web.json_response(manifest, status=201)
        with log.open("wb") as output:
            job.child = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                env=os.environ | variables | {ANSWER_VARIABLE: str(termination_log)} | self.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        job.watch = asyncio.create_task(self._watch_process(job))
        return web.json_response(manifest, status=201)

    async def _watch_process(self, job: FakeJob) -> None:
        code = await job.process.wait()
        condition = {"type": "Complete" if code == 0 else "Failed", "status": "True"}
        if code:
            condition |= {"reason": "BackoffLimitExceeded", "message": "Job has reached the backoff limit"}
        job.manifest["status"] = {"conditions": [condition]}
        await self._record_event("MODIFIED", job.manifest)

    async def _get(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["name"])
        return _not_found(request) if job is None else web.json_response(job.manifest)

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.jobs:
            return _not_found(request)
        assert request.query["propagationPolicy"] == "Foreground"
        job = self.jobs[name]
        await self._begin_deletion(name)
        self._deletion = asyncio.create_task(self._finish_deletion(name))
        return web.json_response(job.manifest)

    async def _begin_deletion(self, name: str) -> None:
        job = self.jobs[name]
        job.manifest["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        await self._record_event("MODIFIED", job.manifest)
        if job.child is not None and job.child.returncode is None:
            job.child.terminate()

    async def _finish_deletion(self, name: str) -> None:
        job = self.jobs[name]
        if job.watch is not None:
            await asyncio.wait([job.watch], timeout=GRACE_S)
            if not job.watch.done():
                job.process.kill()
                await job.watch
        self.jobs.pop(name, None)
        await self._record_event("DELETED", job.manifest)

    async def _pods(self, request: web.Request) -> web.Response:
        label, _, name = request.query["labelSelector"].partition("=")
        assert label == "batch.kubernetes.io/job-name"
        job = self.jobs.get(name)
        if job is None or self.pod_creation_error:
            return web.json_response({"items": []})
        pending = self.pending_pod_status or {"phase": "Pending"}
        status = pending if job.child is None else _status_of(job)
        return web.json_response({"items": [{"metadata": {"name": f"{name}-abcde"}, "status": status}]})

    async def _events(self, request: web.Request) -> web.Response:
        name = request.query["fieldSelector"].removeprefix("involvedObject.name=")
        event = {"type": "Warning", "reason": "FailedCreate", "message": self.pod_creation_error}
        has_event = name in self.jobs and self.pod_creation_error
        return web.json_response({"items": [event] if has_event else []})

    async def _log(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["name"].removesuffix("-abcde")]
        lines = job.log.read_text().splitlines()[-int(request.query["tailLines"]) :]
        return web.Response(text="\n".join(lines))

    async def _list_or_watch(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") != "true":
            wanted = dict(one.split("=", 1) for one in request.query["labelSelector"].split(","))
            found = [job.manifest for job in self.jobs.values() if wanted.items() <= _labels(job).items()]
            return web.json_response({"items": found})
        name = request.query["fieldSelector"].removeprefix("metadata.name=")
        response = web.StreamResponse()
        await response.prepare(request)
        since = int(request.query["resourceVersion"])
        with suppress(ConnectionResetError):  # the watcher has closed the connection
            await self._send_watch_events(response, name, since)
        return response

    async def _send_watch_events(self, response: web.StreamResponse, name: str, since: int) -> None:
        sent = 0
        while True:
            for version, event_type, manifest in self._watch_events[sent:]:
                sent += 1
                if version > since and manifest["metadata"]["name"] == name:
                    await response.write(
                        json.dumps({"type": event_type, "object": manifest}).encode() + b"\n"
                    )
            async with self._changed:
                while sent == len(self._watch_events):
                    await self._changed.wait()

    async def _record_event(self, event_type: str, manifest: Object) -> None:
        version = next(self._version)
        manifest["metadata"]["resourceVersion"] = str(version)
        self._watch_events.append((version, event_type, json.loads(json.dumps(manifest))))
        async with self._changed:
            self._changed.notify_all()


def _labels(job: FakeJob) -> dict[str, str]:
    labels: dict[str, str] = job.manifest["metadata"]["labels"]
    return labels


def _status_of(job: FakeJob) -> Object:
    """The status of the pod of *job*."""
    code = job.process.returncode
    state: Object = {"running": {}}
    if code is not None:
        state = {"terminated": {"exitCode": code if code >= 0 else 128 - code, "reason": "Error"}}
        if job.termination_log.exists():
            state["terminated"]["message"] = job.termination_log.read_text()
    if code == -9:  # SIGKILL, as by the kernel at the memory limit
        state["terminated"]["reason"] = "OOMKilled"
    return {"containerStatuses": [{"name": "flower-server", "state": state}]}


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


def _not_found(request: web.Request) -> web.Response:
    return _status(404, f'jobs.batch "{request.match_info["name"]}" not found')


@asynccontextmanager
async def fake_kubernetes(
    directory: Path, environment: dict[str, str], template: Object
) -> AsyncIterator[FakeKubernetes]:
    """Run a cluster with one PodTemplate until the block ends; then kill the processes that still run."""
    fake = FakeKubernetes(directory, environment, template)
    runner = web.AppRunner(fake.application(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        for job in fake.jobs.values():
            if job.child is not None and job.child.returncode is None:
                job.child.kill()
            if job.watch is not None:
                await job.watch
        await runner.cleanup()
