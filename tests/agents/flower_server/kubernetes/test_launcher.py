"""ServerApps as Kubernetes Jobs: a fake API server runs them as real processes."""

import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import eventually
from support.fake_kubernetes import FakeKubernetes, fake_kubernetes
from support.federation import TASK, FederationHarness, RunningAgent

from fedbus.agents.common.process_orders import ProcessConfig
from fedbus.agents.flower_server.agent import FlowerServer
from fedbus.agents.flower_server.kubernetes.api import ClusterConfig, NotInACluster
from fedbus.agents.flower_server.kubernetes.launcher import KubernetesLauncher, job_name
from fedbus.agents.flower_server.kubernetes.pod_status import has_started, scheduling_problem
from fedbus.agents.flower_server.server_app_process import TERMINATED_EXIT_CODE
from fedbus.contracts.flower_server import (
    FindServer,
    RunFailed,
    ServerLost,
    ServerStarted,
    StartServer,
    StopServer,
)
from fedbus.contracts.model import Artifact
from fedbus.contracts.run import RunPlan
from fedbus.learning import weights
from fedbus.stores.models.open import open_model_store

RUN = f"{TASK}-1"
PLAN = RunPlan(rounds=2, quorum=1, recruit_s=30, round_s=30)
TEMPLATE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "PodTemplate",
    "metadata": {"name": "flower-server"},
    "template": {
        "metadata": {"labels": {"its": "own"}},
        "spec": {
            "containers": [
                {
                    "name": "flower-server",
                    "image": "fedbus-torch:0.1.0",
                    "env": [{"name": "FEDBUS_LOG_LEVEL", "value": "INFO"}],
                }
            ]
        },
    },
}


@pytest.fixture
async def model(fed: FederationHarness) -> Artifact:
    store = open_model_store(fed.config.store_url, TASK)
    await store.prepare()
    arrays = {"weight": np.zeros((4, 3), np.float32), "bias": np.zeros(4, np.float32)}
    artifact = weights.save(arrays, fed.config.home / "first.safetensors")
    await store.put(fed.config.home / "first.safetensors", artifact.sha256)
    return artifact


@pytest.fixture
async def cluster(fed: FederationHarness, tmp_path: Path) -> AsyncIterator[FakeKubernetes]:
    """A cluster whose pods have a home directory of their own, and the task in their image."""
    pods = tmp_path / "pods"
    pods.mkdir()
    environment = {"FEDBUS_HOME": str(pods / "home"), "FEDBUS_TASK": fed.config.task.path}
    async with fake_kubernetes(pods, environment, TEMPLATE) as cluster:
        yield cluster


def make_launcher(
    fed: FederationHarness, cluster: FakeKubernetes, template: str = "flower-server"
) -> KubernetesLauncher:
    return KubernetesLauncher(
        cluster.cluster(), template=template, federation=fed.config.federation, task=TASK, start_timeout_s=0.2
    )


@pytest.fixture
async def agent(fed: FederationHarness, cluster: FakeKubernetes) -> AsyncIterator[RunningAgent]:
    async with fed.run_agent(lambda stop: run_flower_server(fed, make_launcher(fed, cluster), stop)) as agent:
        await eventually(lambda: fed.is_answered(FindServer(task=TASK, run=RUN)))
        yield agent


async def run_flower_server(
    fed: FederationHarness, launcher: KubernetesLauncher, stop: Any, config: ProcessConfig | None = None
) -> None:
    async with fed.config.connect_bus("flower-server") as bus:
        models = open_model_store(fed.config.store_url, TASK)
        config = config or fed.config.process_config()
        await FlowerServer(bus, config, models, logs=fed.config.logs, launcher=launcher).run(stop)


async def request_start(fed: FederationHarness, model: Artifact) -> None:
    await fed.bus.request(StartServer(task=TASK, run=RUN, plan=PLAN, artifact=model))


async def test_a_job_follows_the_pod_template_and_loads_its_model(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    (job,) = cluster.created
    pod = job["spec"]["template"]
    assert pod["metadata"]["labels"]["its"] == "own"
    assert pod["metadata"]["labels"]["fedbus.dev/run"] == RUN
    assert pod["spec"]["containers"][0]["image"] == "fedbus-torch:0.1.0"
    assert (job["spec"]["backoffLimit"], pod["spec"]["restartPolicy"]) == (0, "Never")
    variables = {entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0]["env"]}
    assert model.sha256 in variables["FEDBUS_ORDER"]


async def test_a_stopped_run_leaves_no_job(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    (job,) = cluster.jobs.values()
    await fed.bus.request(StopServer(task=TASK, run=RUN), timeout_s=30)
    assert not cluster.jobs
    assert job.process.returncode == TERMINATED_EXIT_CODE, "it ends itself and is not killed"
    assert not fed.messages_of(ServerLost)


async def test_a_killed_pod_is_reported_with_its_reason(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    (job,) = cluster.jobs.values()
    job.process.send_signal(signal.SIGKILL)
    lost = await fed.wait_for_message(ServerLost)
    assert lost.reason.startswith("the Flower server exceeded its memory limit")
    await eventually(lambda: not cluster.jobs)


async def test_a_failed_job_is_reported_with_its_termination_message(
    fed: FederationHarness, cluster: FakeKubernetes, model: Artifact
) -> None:
    cluster.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    unreachable = fed.config.process_config().model_copy(update={"nats_url": "nats://127.0.0.1:9"})
    async with fed.run_agent(
        lambda stop: run_flower_server(fed, make_launcher(fed, cluster), stop, unreachable)
    ):
        await eventually(lambda: fed.is_answered(FindServer(task=TASK, run=RUN)))
        await request_start(fed, model)
        lost = await fed.wait_for_message(ServerLost)
    assert lost.reason.startswith("the Flower server ended with code 3: BusUnreachable: ")


async def test_a_deleted_job_is_reported(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    await cluster.remove(next(iter(cluster.jobs)))
    assert (
        await fed.wait_for_message(ServerLost)
    ).reason == "the Job of the Flower server was deleted from outside fedbus"


async def test_a_rejected_job_is_reported_with_the_message_of_the_api(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    cluster.refusals["POST"] = (403, "jobs.batch is forbidden: exceeded quota")
    await request_start(fed, model)
    lost = await fed.wait_for_message(ServerLost)
    assert (
        lost.reason
        == "cannot run the Flower server as a Kubernetes Job: jobs.batch is forbidden: exceeded quota"
    )


NO_ROOM = {
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes: too little memory",
        }
    ]
}
NO_IMAGE = {
    "containerStatuses": [
        {
            "name": "flower-server",
            "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
        }
    ]
}


@pytest.mark.parametrize(
    ("status", "reason"),
    [(NO_ROOM, "Unschedulable: 0/3 nodes: too little memory"), (NO_IMAGE, "ImagePullBackOff: no such image")],
)
async def test_a_pod_that_does_not_start_is_reported_with_the_reason(
    fed: FederationHarness,
    cluster: FakeKubernetes,
    agent: RunningAgent,
    model: Artifact,
    status: Any,
    reason: str,
) -> None:
    cluster.pending_pod_status = status
    await request_start(fed, model)
    lost = await fed.wait_for_message(ServerLost)
    assert lost.reason == f"the pod of the Flower server does not start: {reason}"
    await eventually(lambda: not cluster.jobs)


async def test_a_job_without_a_pod_is_reported_with_its_event(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    cluster.pod_creation_error = 'pods "x" is forbidden: violates PodSecurity "restricted"'
    await request_start(fed, model)
    assert (await fed.wait_for_message(ServerLost)).reason.endswith(
        f"does not start: FailedCreate: {cluster.pod_creation_error}"
    )


def test_a_pod_that_pulls_its_image_is_starting() -> None:
    pulling = {"status": {"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}}
    assert not scheduling_problem(pulling)
    assert not has_started(pulling)


async def test_the_launcher_waits_for_an_unavailable_api(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    cluster.refusals["POST"] = (503, "etcdserver: leader changed")
    await request_start(fed, model)
    del cluster.refusals["POST"]
    await fed.wait_for_message(ServerStarted)


async def test_a_missing_model_fails_the_run_and_ends_the_job(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    absent = Artifact(sha256="0" * 64, size_bytes=1, architecture="0" * 64)
    await request_start(fed, absent)
    assert "0000" in (await fed.wait_for_message(RunFailed)).reason
    await eventually(lambda: not cluster.jobs)
    assert not fed.messages_of(ServerLost)


async def test_a_restarted_agent_deletes_jobs_left_behind(
    fed: FederationHarness, cluster: FakeKubernetes, agent: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    (job,) = cluster.jobs.values()
    cluster.refusals["DELETE"] = (403, "not now")
    await agent.stop()
    assert job.process.returncode is None
    del cluster.refusals["DELETE"]
    agent.start()
    await eventually(lambda: not cluster.jobs)


async def test_a_missing_pod_template_is_named(
    fed: FederationHarness, cluster: FakeKubernetes, model: Artifact
) -> None:
    async with fed.run_agent(
        lambda stop: run_flower_server(fed, make_launcher(fed, cluster, "no-such"), stop)
    ):
        await eventually(lambda: fed.is_answered(FindServer(task=TASK, run=RUN)))
        await request_start(fed, model)
        assert 'podtemplates "no-such" not found' in (await fed.wait_for_message(ServerLost)).reason


def test_a_job_name_is_short_enough_for_any_run_name() -> None:
    name = job_name(f"{'a' * 63}-1234")
    assert len(name) <= 63
    assert name != job_name(f"{'a' * 63}-1234")


def test_outside_a_cluster_the_error_gives_advice(tmp_path: Path) -> None:
    with pytest.raises(NotInACluster, match="FEDBUS_LAUNCHER=process"):
        ClusterConfig.from_pod({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path)
