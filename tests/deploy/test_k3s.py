"""The manifests for k3s and Kubernetes, rendered by kustomize and validated against Kubernetes schemas."""

import shutil
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    Object,
    containers,
    has_fixed_tag,
    objects_of_kind,
    pods,
    render,
)
from pydantic import BaseModel, ValidationError

from deploy import argocd
from fedbus.agents.common.process_orders import ServerProcessConfig
from fedbus.agents.flower_server.kubernetes.launcher import CONTAINER
from fedbus.agents.flower_server.kubernetes.launcher import render_job as rendered_job
from fedbus.app.composition.agents import SERVER_AGENTS
from fedbus.app.settings import Settings
from fedbus.contracts.run import RunPlan
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import read_task

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
VERSIONS = ("1.31", "1.34")
ALL_IN_ONE = DEPLOY / "k3s" / "overlays" / "all-in-one"
WITH_CLIENTS = [path for path in OVERLAYS if path.name != "server"]
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)


@pytest.mark.parametrize("version", VERSIONS)
@each_overlay
def test_each_object_is_valid_in_kubernetes(overlay: Path, version: str) -> None:
    for item in render(overlay):
        kubernetes_validate.validate(item, version, strict=True)


@each_overlay
def test_each_object_is_labelled_and_in_the_fedbus_namespace(overlay: Path) -> None:
    for item in render(overlay):
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "fedbus", item["metadata"]
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "fedbus"


@each_overlay
def test_each_image_is_pinned(overlay: Path) -> None:
    for name, container in containers(render(overlay)):
        assert has_fixed_tag(container["image"]), f"{name}: {container['image']}"


@each_overlay
def test_pods_conform_to_the_restricted_profile(overlay: Path) -> None:
    objects = render(overlay)
    for name, pod in pods(objects):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys(), name
        for volume in pod["spec"].get("volumes", []):
            assert volume.keys() & {
                "emptyDir",
                "secret",
                "configMap",
                "persistentVolumeClaim",
                "projected",
                "downwardAPI",
            }, f"{name}: {volume}"
    for name, container in containers(objects):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["readOnlyRootFilesystem"] is True, name
    for namespace in objects_of_kind(objects, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@each_overlay
def test_each_container_has_resource_limits_and_probes(overlay: Path) -> None:
    for name, container in containers(render(overlay)):
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
        assert "memory" in container["resources"]["limits"], name
        if not name.startswith(("PodTemplate/", "Job/")):
            assert container.keys() >= {"startupProbe", "livenessProbe"}, name


def test_a_client_requests_at_most_1_gib_of_memory() -> None:
    (client,) = objects_of_kind(render(ALL_IN_ONE), "StatefulSet")[:1]
    assert client["metadata"]["name"] == "client"
    requests = [
        container["resources"]["requests"]["memory"]
        for container in client["spec"]["template"]["spec"]["containers"]
    ]
    assert sum(int(memory.removesuffix("Mi")) for memory in requests) <= 1024


@each_overlay
def test_network_policies_select_all_pods(overlay: Path) -> None:
    objects = render(overlay)
    policies = objects_of_kind(objects, "NetworkPolicy")
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(objects)}
    for policy in policies:
        assert _selected(policy, labels), policy["metadata"]["name"]
    for direction in ("Ingress", "Egress"):
        selected = set().union(
            *(_selected(policy, labels) for policy in policies if direction in policy["spec"]["policyTypes"])
        )
        assert selected == labels.keys(), direction


def _selected(policy: Object, labels: dict[str, dict[str, str]]) -> set[str]:
    selector = policy["spec"]["podSelector"]["matchLabels"].items()
    return {name for name, pod_labels in labels.items() if selector <= pod_labels.items()}


def test_a_client_can_reach_only_the_required_ports() -> None:
    policy = next(
        one
        for one in objects_of_kind(render(ALL_IN_ONE), "NetworkPolicy")
        if one["metadata"]["name"] == "fedbus-client"
    )
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert ports == {53, 4222, 8333, 4318, 443, 22}


@each_overlay
def test_each_service_selects_pods(overlay: Path) -> None:
    objects = render(overlay)
    labels = [pod["metadata"]["labels"] for _, pod in pods(objects)]
    for service in objects_of_kind(objects, "Service"):
        selector = service["spec"]["selector"].items()
        assert any(selector <= pod_labels.items() for pod_labels in labels), service["metadata"]["name"]


@each_overlay
def test_each_config_map_that_a_pod_uses_exists(overlay: Path) -> None:
    """Secrets are not in the manifests."""
    objects = render(overlay)
    existing = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for name, pod in pods(objects):
        for volume in pod["spec"].get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in existing, name
    for name, container in containers(objects):
        for source in container.get("envFrom", []):
            assert ("ConfigMap", source["configMapRef"]["name"]) in existing, name


@each_overlay
def test_each_variable_is_a_known_setting(overlay: Path) -> None:
    objects = render(overlay)
    variables = {name for config_map in objects_of_kind(objects, "ConfigMap") for name in config_map["data"]}
    variables |= {
        variable["name"] for _, container in containers(objects) for variable in container.get("env", [])
    }
    assert {name for name in variables if name.startswith("FEDBUS_")} <= known_variables()


def known_variables() -> set[str]:
    """Return the variables of the settings, and those that other modules read."""
    settings = {field.alias for field in Settings.model_fields.values() if field.alias}
    return settings | {
        "FEDBUS_KIT",  # app/settings.py, before the other settings
        "FEDBUS_S3_CREDENTIALS",  # stores/s3
        "FEDBUS_LOG_LEVEL",  # app/telemetry
        "FEDBUS_GATEWAY_HOST",  # app/commands/gateway.py
        "FEDBUS_GATEWAY_PORT",
        "FEDBUS_GATEWAY_CERT",
        "FEDBUS_GATEWAY_KEY",
        "FEDBUS_GATEWAY_TOKEN_FILE",
        "FEDBUS_GATEWAY_HOSTS",
        "FEDBUS_TRACE_URL",
        "FEDBUS_PARTITIONS",  # the arguments of the containers
    }


def test_a_client_has_three_containers_with_one_directory() -> None:
    (client,) = [
        one
        for one in objects_of_kind(render(ALL_IN_ONE), "StatefulSet")
        if one["metadata"]["name"] == "client"
    ]
    client_containers = client["spec"]["template"]["spec"]["containers"]
    assert [container["name"] for container in client_containers] == [
        "client-manager",
        "flower-client",
        "inference",
    ]
    assert "client-manager,device-monitor" in client_containers[0]["args"]
    for container in client_containers:
        assert {"name": "device", "mountPath": "/var/lib/fedbus"} in container["volumeMounts"]
        assert "--client=$(POD_NAME)" in container["args"]


def test_all_server_side_agents_and_the_dashboard_run() -> None:
    args = [container["args"] for _, container in containers(of_kind_in(ALL_IN_ONE, "Deployment"))]
    assert {agent for arguments in args for agent in arguments[1:]} == set(SERVER_AGENTS)
    assert ["gateway"] in args


def of_kind_in(overlay: Path, kind: str) -> tuple[Object, ...]:
    return tuple(objects_of_kind(render(overlay), kind))


@pytest.mark.parametrize("overlay", WITH_CLIENTS, ids=lambda path: path.name)
def test_the_number_of_partitions_is_the_number_of_clients(overlay: Path) -> None:
    (client,) = [one for one in of_kind_in(overlay, "StatefulSet") if one["metadata"]["name"] == "client"]
    partitions = [
        variable["value"]
        for _, container in containers((client,))
        for variable in container["env"]
        if variable["name"] == "FEDBUS_PARTITIONS"
    ]
    assert partitions == [str(client["spec"]["replicas"])] * 2


def test_the_s3_and_the_dashboard_use_tls_only() -> None:
    objects = render(ALL_IN_ONE)
    (s3,) = [one for one in objects_of_kind(objects, "StatefulSet") if one["metadata"]["name"] == "s3"]
    (container,) = s3["spec"]["template"]["spec"]["containers"]
    assert {"-s3.cert.file=/keys/server.pem", "-s3.key.file=/keys/server.key"} <= set(container["command"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    (settings,) = [
        one for one in objects_of_kind(objects, "ConfigMap") if one["metadata"]["name"] == "fedbus-server"
    ]
    assert "endpoint=https://s3:8333" in settings["data"]["FEDBUS_STORE"]
    (dashboard,) = [one for name, one in containers(objects) if name == "Deployment/dashboard/dashboard"]
    variables = {variable["name"] for variable in dashboard["env"]}
    assert variables >= {"FEDBUS_GATEWAY_CERT", "FEDBUS_GATEWAY_KEY", "FEDBUS_GATEWAY_TOKEN_FILE"}
    assert "FEDBUS_GATEWAY_INSECURE" not in variables


def test_only_the_ingress_can_reach_the_dashboard() -> None:
    policies = objects_of_kind(render(ALL_IN_ONE), "NetworkPolicy")
    (policy,) = [one for one in policies if one["metadata"]["name"] == "fedbus-dashboard"]
    (rule,) = policy["spec"]["ingress"]
    (source,) = rule["from"]
    assert source.keys() == {"namespaceSelector", "podSelector"}


def test_the_server_overlay_exposes_nats_to_remote_clients() -> None:
    (service,) = [
        one for one in of_kind_in(DEPLOY / "k3s" / "overlays" / "server", "Service") if "type" in one["spec"]
    ]
    assert service["spec"]["type"] == "LoadBalancer"
    assert {port["port"] for port in service["spec"]["ports"]} == {4222, 7422}
    assert service["spec"]["selector"]["app.kubernetes.io/component"] == "nats"


def test_only_the_flower_server_launcher_has_api_access() -> None:
    objects = render(ALL_IN_ONE)
    for name, pod in pods(objects):
        has_token = pod["spec"].get("automountServiceAccountToken", True)
        assert has_token is (name == "Deployment/flower-server-starter"), name
    assert not objects_of_kind(objects, "ClusterRole") + objects_of_kind(objects, "ClusterRoleBinding")
    (role,) = objects_of_kind(objects, "Role")
    allowed = {
        (resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }
    assert allowed == {
        *(("jobs", verb) for verb in ("create", "get", "list", "watch", "delete")),
        ("pods", "list"),
        ("events", "list"),
        ("pods/log", "get"),
        ("podtemplates", "get"),
    }


def test_the_job_of_a_run_is_valid_and_restricted() -> None:
    """The launcher renders it from the deployed PodTemplate; the network policies select its pod."""
    objects = render(ALL_IN_ONE)
    (template,) = objects_of_kind(objects, "PodTemplate")
    task = read_task(Path(__file__).parents[2] / "examples" / "mnist", open_library)
    config = ServerProcessConfig(
        nats_url="nats://nats:4222",
        federation="demo",
        task=task,
        run="mnist-1",
        plan=RunPlan(),
        first_round=1,
        initial_sha256="0" * 64,
        store="s3://fedbus/models",
    )
    job = rendered_job("mnist-1-server-0a1b2c", template, config, {"app.kubernetes.io/part-of": "fedbus"})
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]
    assert (
        pod["metadata"]["labels"].items()
        >= {
            "app.kubernetes.io/part-of": "fedbus",
            "app.kubernetes.io/component": CONTAINER,
            "fedbus.dev/side": "server",
        }.items()
    )
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("name", "definition"),
    [("application", argocd.Application), ("applicationset", argocd.ApplicationSet)],
)
def test_each_argo_cd_manifest_is_valid(name: str, definition: type[BaseModel]) -> None:
    (manifest,) = yaml.safe_load_all((DEPLOY / "k3s" / "argocd" / f"{name}.yaml").read_text())
    definition.model_validate(manifest)

    spec = manifest["spec"] if name == "application" else manifest["spec"]["template"]["spec"]
    del spec["destination"]
    with pytest.raises(ValidationError, match="destination"):
        definition.model_validate(manifest)


@pytest.mark.parametrize("name", ["application", "applicationset"])
def test_argo_cd_uses_existing_overlays(name: str) -> None:
    (manifest,) = yaml.safe_load_all((DEPLOY / "k3s" / "argocd" / f"{name}.yaml").read_text())
    spec = manifest["spec"] if manifest["kind"] == "Application" else manifest["spec"]["template"]["spec"]
    path = spec["source"]["path"]
    assert path.startswith("deploy/k3s/overlays/")
    assert "{{" in path or (DEPLOY.parent / path / "kustomization.yaml").is_file()
    assert spec["source"]["targetRevision"] not in ("HEAD", "main")
