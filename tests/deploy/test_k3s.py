"""The manifests for k3s and Kubernetes, rendered by kustomize and held against the schema of a real version."""

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
from fedbus.stores.tasks.task_directory import read_task

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed, and renders these"
)
VERSIONS = ("1.31", "1.34")
ALL_IN_ONE = DEPLOY / "k3s" / "overlays" / "all-in-one"
WITH_CLIENTS = [path for path in OVERLAYS if path.name != "server"]
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)


@pytest.mark.parametrize("version", VERSIONS)
@each_overlay
def test_every_object_is_what_kubernetes_knows(overlay: Path, version: str) -> None:
    for one in render(overlay):
        kubernetes_validate.validate(one, version, strict=True)


@each_overlay
def test_every_object_is_in_our_namespace_and_belongs_to_us(overlay: Path) -> None:
    for one in render(overlay):
        assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "fedbus", one["metadata"]
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "fedbus"


@each_overlay
def test_no_image_floats(overlay: Path) -> None:
    for name, container in containers(render(overlay)):
        assert has_fixed_tag(container["image"]), f"{name}: {container['image']}"


@each_overlay
def test_pods_are_what_the_restricted_profile_allows(overlay: Path) -> None:
    objects = render(overlay)
    for name, pod in pods(objects):
        whole = pod["spec"]["securityContext"]
        assert whole["runAsNonRoot"] is True, name
        assert whole["runAsUser"] > 0, name
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, name
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
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False, name
        assert own["capabilities"] == {"drop": ["ALL"]}, name
        assert own["readOnlyRootFilesystem"] is True, name
    for namespace in objects_of_kind(objects, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@each_overlay
def test_every_container_has_bounds_and_whoever_stays_is_looked_after(overlay: Path) -> None:
    for name, container in containers(render(overlay)):
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
        assert "memory" in container["resources"]["limits"], name
        if not name.startswith(("PodTemplate/", "Job/")):
            assert container.keys() >= {"startupProbe", "livenessProbe"}, name


def test_a_client_leaves_room_on_a_board_of_4_gb() -> None:
    (client,) = objects_of_kind(render(ALL_IN_ONE), "StatefulSet")[:1]
    assert client["metadata"]["name"] == "client"
    asked = [
        one["resources"]["requests"]["memory"] for one in client["spec"]["template"]["spec"]["containers"]
    ]
    assert sum(int(one.removesuffix("Mi")) for one in asked) <= 1024


@each_overlay
def test_a_network_policy_selects_pods_that_are_there_and_leaves_none_out(overlay: Path) -> None:
    objects = render(overlay)
    policies = objects_of_kind(objects, "NetworkPolicy")
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(objects)}
    for policy in policies:
        assert _selected(policy, labels), policy["metadata"]["name"]
    for direction in ("Ingress", "Egress"):
        under = set().union(
            *(_selected(one, labels) for one in policies if direction in one["spec"]["policyTypes"])
        )
        assert under == labels.keys(), direction


def _selected(policy: Object, labels: dict[str, dict[str, str]]) -> set[str]:
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    return {name for name, found in labels.items() if wanted <= found.items()}


def test_a_client_is_let_out_to_the_bus_the_collector_git_and_names_alone() -> None:
    policy = next(
        one
        for one in objects_of_kind(render(ALL_IN_ONE), "NetworkPolicy")
        if one["metadata"]["name"] == "fedbus-client"
    )
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert ports == {53, 4222, 8333, 4318, 443, 22}


@each_overlay
def test_a_service_finds_its_pods(overlay: Path) -> None:
    objects = render(overlay)
    labels = [pod["metadata"]["labels"] for _, pod in pods(objects)]
    for service in objects_of_kind(objects, "Service"):
        wanted = service["spec"]["selector"].items()
        assert any(wanted <= found.items() for found in labels), service["metadata"]["name"]


@each_overlay
def test_what_a_pod_refers_to_is_there(overlay: Path) -> None:
    """All but the keys, which nobody writes into a file."""
    objects = render(overlay)
    there = {(one["kind"], one["metadata"]["name"]) for one in objects}
    for name, pod in pods(objects):
        for volume in pod["spec"].get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there, name
    for name, container in containers(objects):
        for source in container.get("envFrom", []):
            assert ("ConfigMap", source["configMapRef"]["name"]) in there, name


@each_overlay
def test_a_variable_that_is_set_is_one_that_somebody_reads(overlay: Path) -> None:
    objects = render(overlay)
    given = {name for one in objects_of_kind(objects, "ConfigMap") for name in one["data"]}
    given |= {one["name"] for _, container in containers(objects) for one in container.get("env", [])}
    assert {name for name in given if name.startswith("FEDBUS_")} <= known_variables()


def known_variables() -> set[str]:
    """Those of the settings, and those that stand beside them, each with who reads it."""
    settings = {field.alias for field in Settings.model_fields.values() if field.alias}
    return settings | {
        "FEDBUS_KIT",  # app/settings.py, before all others
        "FEDBUS_S3_CREDENTIALS",  # stores/s3.py
        "FEDBUS_LOG_LEVEL",  # app/telemetry
        "FEDBUS_GATEWAY_HOST",  # app/commands/gateway.py
        "FEDBUS_GATEWAY_PORT",
        "FEDBUS_GATEWAY_CERT",
        "FEDBUS_GATEWAY_KEY",
        "FEDBUS_GATEWAY_TOKEN_FILE",
        "FEDBUS_GATEWAY_HOSTS",
        "FEDBUS_TRACE_URL",
        "FEDBUS_PARTITIONS",  # the argument beside it
    }


def test_a_client_is_three_containers_that_share_a_directory_and_are_named_for_their_pod() -> None:
    (client,) = [
        one
        for one in objects_of_kind(render(ALL_IN_ONE), "StatefulSet")
        if one["metadata"]["name"] == "client"
    ]
    found = client["spec"]["template"]["spec"]["containers"]
    assert [one["name"] for one in found] == ["client-manager", "flower-client", "inference"]
    assert "client-manager,device-monitor" in found[0]["args"]
    for container in found:
        assert {"name": "device", "mountPath": "/var/lib/fedbus"} in container["volumeMounts"]
        assert "--client=$(POD_NAME)" in container["args"]


def test_all_agents_of_a_server_are_there_and_the_dashboard_beside_them() -> None:
    args = [one["args"] for _, one in containers(of_kind_in(ALL_IN_ONE, "Deployment"))]
    assert {agent for words in args for agent in words[1:]} == set(SERVER_AGENTS)
    assert ["gateway"] in args


def of_kind_in(overlay: Path, kind: str) -> tuple[Object, ...]:
    return tuple(objects_of_kind(render(overlay), kind))


@pytest.mark.parametrize("overlay", WITH_CLIENTS, ids=lambda path: path.name)
def test_there_are_as_many_parts_of_the_data_as_clients(overlay: Path) -> None:
    (client,) = [one for one in of_kind_in(overlay, "StatefulSet") if one["metadata"]["name"] == "client"]
    told = [
        one["value"]
        for _, container in containers((client,))
        for one in container["env"]
        if one["name"] == "FEDBUS_PARTITIONS"
    ]
    assert told == [str(client["spec"]["replicas"])] * 2


def test_models_and_the_dashboard_travel_by_tls_alone() -> None:
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
    given = {one["name"] for one in dashboard["env"]}
    assert given >= {"FEDBUS_GATEWAY_CERT", "FEDBUS_GATEWAY_KEY", "FEDBUS_GATEWAY_TOKEN_FILE"}
    assert "FEDBUS_GATEWAY_INSECURE" not in given


def test_the_dashboard_is_reached_by_an_ingress_and_by_nobody_else() -> None:
    policies = objects_of_kind(render(ALL_IN_ONE), "NetworkPolicy")
    (policy,) = [one for one in policies if one["metadata"]["name"] == "fedbus-dashboard"]
    (rule,) = policy["spec"]["ingress"]
    (source,) = rule["from"]
    assert source.keys() == {"namespaceSelector", "podSelector"}


def test_clients_elsewhere_have_a_way_in_to_a_server_that_has_none_of_its_own() -> None:
    (service,) = [
        one for one in of_kind_in(DEPLOY / "k3s" / "overlays" / "server", "Service") if "type" in one["spec"]
    ]
    assert service["spec"]["type"] == "LoadBalancer"
    assert {port["port"] for port in service["spec"]["ports"]} == {4222, 7422}
    assert service["spec"]["selector"]["app.kubernetes.io/component"] == "nats"


def test_only_the_starter_of_jobs_may_speak_to_the_api_server_and_only_of_jobs() -> None:
    objects = render(ALL_IN_ONE)
    for name, pod in pods(objects):
        told = pod["spec"].get("automountServiceAccountToken", True)
        assert told is (name == "Deployment/flower-server-starter"), name
    assert not objects_of_kind(objects, "ClusterRole") + objects_of_kind(objects, "ClusterRoleBinding")
    (role,) = objects_of_kind(objects, "Role")
    allowed = {(one, verb) for rule in role["rules"] for one in rule["resources"] for verb in rule["verbs"]}
    assert allowed == {
        *(("jobs", verb) for verb in ("create", "get", "list", "watch", "delete")),
        ("pods", "list"),
        ("events", "list"),
        ("pods/log", "get"),
        ("podtemplates", "get"),
    }


def test_the_job_of_a_run_is_one_that_the_cluster_takes_in() -> None:
    """Rendered by the launcher, from the PodTemplate that is deployed: valid, restricted, under a policy."""
    objects = render(ALL_IN_ONE)
    (template,) = objects_of_kind(objects, "PodTemplate")
    task = read_task(Path(__file__).parents[2] / "examples" / "mnist")
    order = ServerProcessConfig(
        nats_url="nats://nats:4222",
        federation="demo",
        task=task,
        run="mnist-1",
        plan=RunPlan(),
        first_round=1,
        initial_sha256="0" * 64,
        store="s3://fedbus/models",
    )
    job = rendered_job("mnist-1-server-0a1b2c", template, order, {"app.kubernetes.io/part-of": "fedbus"})
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
def test_argo_cd_knows_all_that_it_is_told(name: str, definition: type[BaseModel]) -> None:
    (one,) = yaml.safe_load_all((DEPLOY / "k3s" / "argocd" / f"{name}.yaml").read_text())
    definition.model_validate(one)

    spec = one["spec"] if name == "application" else one["spec"]["template"]["spec"]
    del spec["destination"]
    with pytest.raises(ValidationError, match="destination"):
        definition.model_validate(one)


@pytest.mark.parametrize("name", ["application", "applicationset"])
def test_argo_cd_is_pointed_at_overlays_that_are_there(name: str) -> None:
    (one,) = yaml.safe_load_all((DEPLOY / "k3s" / "argocd" / f"{name}.yaml").read_text())
    spec = one["spec"] if one["kind"] == "Application" else one["spec"]["template"]["spec"]
    path = spec["source"]["path"]
    assert path.startswith("deploy/k3s/overlays/")
    assert "{{" in path or (DEPLOY.parent / path / "kustomization.yaml").is_file()
    assert spec["source"]["targetRevision"] not in ("HEAD", "main")
