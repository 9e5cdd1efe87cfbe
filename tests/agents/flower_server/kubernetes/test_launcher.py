"""ServerApps as Kubernetes Jobs: real processes, started, watched and ended through an API server."""

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
from fedbus.contracts.model import Artifact
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import FindServer, RunFailed, ServerLost, ServerStarted, StartServer, StopServer
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
    """Its pods have a disk of their own, and the task where its image has it."""
    pods = tmp_path / "pods"
    pods.mkdir()
    environment = {"FEDBUS_HOME": str(pods / "home"), "FEDBUS_TASK": fed.config.task.path}
    async with fake_kubernetes(pods, environment, TEMPLATE) as cluster:
        yield cluster


def make_launcher(
    fed: FederationHarness, cluster: FakeKubernetes, template: str = "flower-server"
) -> KubernetesLauncher:
    return KubernetesLauncher(
        cluster.cluster(), template=template, federation=fed.config.federation, task=TASK, starts_within_s=0.2
    )


@pytest.fixture
async def wrapper(fed: FederationHarness, cluster: FakeKubernetes) -> AsyncIterator[RunningAgent]:
    async with fed.run_agent(lambda stop: run_flower_server(fed, make_launcher(fed, cluster), stop)) as agent:
        await eventually(lambda: fed.is_answered(FindServer(task=TASK, run=RUN)))
        yield agent


async def run_flower_server(
    fed: FederationHarness, launcher: KubernetesLauncher, stop: Any, order: ProcessConfig | None = None
) -> None:
    async with fed.config.bus("flower-server") as bus:
        models = open_model_store(fed.config.store_url, TASK)
        order = order or fed.config.order()
        await FlowerServer(bus, order, models, logs=fed.config.logs, launcher=launcher).run(stop)


async def request_start(fed: FederationHarness, model: Artifact) -> None:
    await fed.bus.request(StartServer(task=TASK, run=RUN, plan=PLAN, artifact=model))


async def test_a_run_is_a_job_like_the_template_that_gets_its_model_out_of_the_repository(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    (job,) = cluster.created
    pod = job["spec"]["template"]
    assert pod["metadata"]["labels"]["its"] == "own"
    assert pod["metadata"]["labels"]["fedbus.dev/run"] == RUN
    assert pod["spec"]["containers"][0]["image"] == "fedbus-torch:0.1.0"
    assert (job["spec"]["backoffLimit"], pod["spec"]["restartPolicy"]) == (0, "Never")
    order = next(one["value"] for one in pod["spec"]["containers"][0]["env"] if one["name"] == "FEDBUS_ORDER")
    assert model.sha256 in order


async def test_a_run_that_is_stopped_leaves_no_job_behind(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    (job,) = cluster.jobs.values()
    await fed.bus.request(StopServer(task=TASK, run=RUN), timeout_s=30)
    assert not cluster.jobs
    assert job.process.returncode == 0
    assert not fed.messages_of(ServerLost)


async def test_a_pod_that_is_killed_is_told_of_with_its_reason(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    (job,) = cluster.jobs.values()
    job.process.send_signal(signal.SIGKILL)
    lost = await fed.wait_for_message(ServerLost)
    assert lost.reason.startswith("the Flower server was killed for want of memory")
    await eventually(lambda: not cluster.jobs)


async def test_a_job_that_falls_is_told_of_in_its_own_word_whatever_is_logged_after_it(
    fed: FederationHarness, cluster: FakeKubernetes, model: Artifact
) -> None:
    cluster.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    nowhere = fed.config.order().model_copy(update={"nats_url": "nats://127.0.0.1:9"})
    async with fed.run_agent(lambda stop: run_flower_server(fed, make_launcher(fed, cluster), stop, nowhere)):
        await eventually(lambda: fed.is_answered(FindServer(task=TASK, run=RUN)))
        await request_start(fed, model)
        lost = await fed.wait_for_message(ServerLost)
    assert lost.reason.startswith("the Flower server ended with code 3: BusUnreachable: ")


async def test_a_job_that_somebody_removes_is_told_of(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    await cluster.remove(next(iter(cluster.jobs)))
    assert (
        await fed.wait_for_message(ServerLost)
    ).reason == "the Job of the Flower server was removed by somebody else"


async def test_a_cluster_that_says_no_is_told_of_in_its_own_words(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    cluster.refusals["POST"] = (403, "jobs.batch is forbidden: exceeded quota")
    await request_start(fed, model)
    lost = await fed.wait_for_message(ServerLost)
    assert lost.reason == "the Flower server was not run as a Job: jobs.batch is forbidden: exceeded quota"


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
async def test_a_pod_that_never_starts_is_told_of_with_what_keeps_it(
    fed: FederationHarness,
    cluster: FakeKubernetes,
    wrapper: RunningAgent,
    model: Artifact,
    status: Any,
    reason: str,
) -> None:
    cluster.pending_pod_status = status
    await request_start(fed, model)
    lost = await fed.wait_for_message(ServerLost)
    assert lost.reason == f"the pod of the Flower server does not start: {reason}"
    await eventually(lambda: not cluster.jobs)


async def test_a_job_whose_pod_is_not_let_in_is_told_of_with_what_its_event_says(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    cluster.pod_creation_error = 'pods "x" is forbidden: violates PodSecurity "restricted"'
    await request_start(fed, model)
    assert (await fed.wait_for_message(ServerLost)).reason.endswith(
        f"does not start: FailedCreate: {cluster.pod_creation_error}"
    )


def test_a_pod_whose_image_is_being_pulled_is_on_its_way() -> None:
    pulling = {"status": {"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}}
    assert not scheduling_problem(pulling)
    assert not has_started(pulling)


async def test_a_cluster_that_is_away_is_waited_for(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    cluster.refusals["POST"] = (503, "etcdserver: leader changed")
    await request_start(fed, model)
    del cluster.refusals["POST"]
    await fed.wait_for_message(ServerStarted)


async def test_a_model_that_the_repository_does_not_hold_fails_its_run_and_the_job_is_done(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    absent = Artifact(sha256="0" * 64, size_bytes=1, architecture="0" * 64)
    await request_start(fed, absent)
    assert "0000" in (await fed.wait_for_message(RunFailed)).reason
    await eventually(lambda: not cluster.jobs)
    assert not fed.messages_of(ServerLost)


async def test_a_new_wrapper_removes_what_the_one_before_left(
    fed: FederationHarness, cluster: FakeKubernetes, wrapper: RunningAgent, model: Artifact
) -> None:
    await request_start(fed, model)
    await fed.wait_for_message(ServerStarted)
    (left,) = cluster.jobs.values()
    cluster.refusals["DELETE"] = (403, "not now")
    await wrapper.stop()
    assert left.process.returncode is None
    del cluster.refusals["DELETE"]
    wrapper.start()
    await eventually(lambda: not cluster.jobs)


async def test_a_template_that_is_not_there_is_named(
    fed: FederationHarness, cluster: FakeKubernetes, model: Artifact
) -> None:
    async with fed.run_agent(
        lambda stop: run_flower_server(fed, make_launcher(fed, cluster, "no-such"), stop)
    ):
        await eventually(lambda: fed.is_answered(FindServer(task=TASK, run=RUN)))
        await request_start(fed, model)
        assert 'podtemplates "no-such" not found' in (await fed.wait_for_message(ServerLost)).reason


def test_a_jobs_name_fits_whatever_the_runs_name() -> None:
    name = job_name(f"{'a' * 63}-1234")
    assert len(name) <= 63
    assert name != job_name(f"{'a' * 63}-1234")


def test_outside_of_a_cluster_one_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(NotInACluster, match="FEDBUS_LAUNCHER=process"):
        ClusterConfig.of_this_pod({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path)
