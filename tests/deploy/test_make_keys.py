"""The Secrets of `make-keys`: each pod has the credentials of its role, checked with a real NATS and S3."""

import asyncio
import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml
from deploy.manifests import DEPLOY, Object, containers, objects_of_kind, pods, render, role_of
from support.cli import FedbusCli
from support.ports import free_port
from support.trusted_bus import ConfiguredNatsServer
from support.waiting import eventually

from fedbus.app.local.seaweedfs import INTERNAL_PORTS, _remove_sockets, find_seaweedfs
from fedbus.app.provision.federation import Federation
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import BusError
from fedbus.contracts.credentials import parse_user
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.permissions import ROLE_AGENTS, Role

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
OBJECTS = render(DEPLOY / "k3s" / "overlays" / "all-in-one") if shutil.which("kubectl") else ()
FED = FederationId("hospital")
Secrets = dict[str, dict[str, bytes]]


def make_keys(directory: Path, *clients: str) -> Secrets:
    """Run `make-keys` and return its Secrets by name, decoded."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEDBUS")}
    result = subprocess.run(
        [DEPLOY / "k3s" / "make-keys", directory, "tls://nats:4222", *clients],
        env=clean | {"PATH": programs, "FEDBUS_FEDERATION": FED},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return {secret["metadata"]["name"]: decode(secret) for secret in yaml.safe_load_all(result.stdout)}


def decode(secret: Object) -> dict[str, bytes]:
    return {name: base64.b64decode(text) for name, text in secret["data"].items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation") / "a hospital"


@pytest.fixture(scope="module")
def secrets(directory: Path) -> Secrets:
    directory.mkdir()
    return make_keys(directory, "client-0", "client-1")


@pytest.fixture
def mounted_secrets(secrets: Secrets, tmp_path: Path) -> Path:
    """Write the Secrets as a kubelet mounts them, each in a directory."""
    for name, files in secrets.items():
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o600)
    return tmp_path


def keys_of(pod: Object) -> str:
    """Return the name of the Secret in the keys volume of *pod*."""
    (name,) = (
        volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if volume["name"] == "keys"
    )
    return str(name)


def server_pods() -> dict[str, tuple[Role, str]]:
    """Return the role and the Secret of each server-side pod that connects to the bus."""
    deployments = {
        name: (role_of(pod["spec"]["containers"][0]["args"]), keys_of(pod))
        for name, pod in pods(OBJECTS)
        if name.startswith("Deployment/")
    }
    (job,) = (keys_of(pod) for name, pod in pods(OBJECTS) if name.startswith("PodTemplate/"))
    return deployments | {"PodTemplate/flower-server": (Role.FLOWER_SERVER, job)}


def test_each_mounted_secret_has_the_files_that_its_pod_uses(secrets: Secrets) -> None:
    for name, pod in pods(OBJECTS):
        for volume in pod["spec"].get("volumes", []):
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets, name
    for name, pod in pods(OBJECTS):
        if any(volume["name"] == "keys" for volume in pod["spec"]["volumes"]):
            container = pod["spec"]["containers"][0]
            texts = [variable.get("value", "") for variable in container.get("env", [])]
            texts += container.get("command", [])
            files = {path for text in texts for path in re.findall(r"/keys/([\w.-]+)", text)}
            assert files <= secrets[keys_of(pod)].keys(), name


def test_each_server_side_pod_has_the_credentials_of_its_role(secrets: Secrets, directory: Path) -> None:
    signed_by = {role: Federation.open(directory / "trust")._signing_key(role).public for role in Role}
    for name, (role, keys) in server_pods().items():
        claims = parse_user(secrets[keys]["bus.creds"].decode())
        assert (claims.name, claims.iss) == (role, signed_by[role]), name


def test_only_users_of_the_s3_have_its_key(secrets: Secrets) -> None:
    assert {name for name, files in secrets.items() if "s3-credentials" in files} == {
        "fedbus-server-manager-keys",
        "fedbus-flower-server-keys",
        "fedbus-dashboard-keys",
    }


def test_a_client_has_only_its_own_credentials(secrets: Secrets) -> None:
    mounts = 0
    for name, container in containers(OBJECTS):
        for mount in container["volumeMounts"]:
            if mount["name"] == "kits":
                mounts += 1
                path = mount.get("subPath") or mount["subPathExpr"].replace("$(POD_NAME)", "client-1")
                assert path in ("ca.pem", "client-1.creds"), name
                assert path in secrets["fedbus-kits"], name
    assert mounts == 6


def test_a_second_run_keeps_the_keys_and_adds_the_new_client(secrets: Secrets, directory: Path) -> None:
    second = make_keys(directory, "client-2")
    kits, previous_kits = second.pop("fedbus-kits"), secrets["fedbus-kits"]
    assert {name: kits[name] for name in previous_kits} == previous_kits
    assert parse_user(kits["client-2.creds"].decode()).name == "client-2"
    assert {name: files for name, files in second.items() if name != "fedbus-nats"} == {
        name: files for name, files in secrets.items() if name not in ("fedbus-kits", "fedbus-nats")
    }


@asynccontextmanager
async def run_bus(mounted_secrets: Path) -> AsyncIterator[str]:
    """Run a nats-server with the configuration in its Secret, with local directories and ports."""
    port = free_port()
    (mounted_secrets / "fedbus-nats-tls").rename(mounted_secrets / "tls")
    text = (mounted_secrets / "fedbus-nats" / "nats.conf").read_text()
    for deployed, local in {
        '"/data/': f'"{mounted_secrets}/',
        "0.0.0.0:4222": f"127.0.0.1:{port}",
        "0.0.0.0:7422": f"127.0.0.1:{free_port()}",
        "127.0.0.1:8222": f"127.0.0.1:{free_port()}",
    }.items():
        assert deployed in text
        text = text.replace(deployed, local)
    config = mounted_secrets / "nats.conf"
    config.write_text(text)
    server = ConfiguredNatsServer(config, port)
    await server.start()
    try:
        yield f"tls://localhost:{port}"
    finally:
        await server.stop()


async def test_nats_accepts_each_pod_with_the_role_of_its_agent(
    mounted_secrets: Path,
) -> None:
    def access(secret: str, creds: str = "bus.creds") -> BusAccess:
        return BusAccess(mounted_secrets / secret / creds, mounted_secrets / secret / "ca.pem")

    async with run_bus(mounted_secrets) as url:
        manager = Identity(FED, "server-manager")
        async with Bus.connect(url, manager, access=access("fedbus-server-manager-keys")) as bus:
            await bus.create_streams()

        for role, keys in sorted(set(server_pods().values())):
            async with Bus.connect(url, Identity(FED, ROLE_AGENTS[role][0]), access=access(keys)) as bus:
                assert await bus.list_streams(), role

        client = Identity(FED, "client-manager", "client-0")
        async with Bus.connect(url, client, access=access("fedbus-kits", "client-0.creds")):
            pass

        scheduler_access = access("fedbus-workflow-scheduler-keys")
        async with Bus.connect(url, Identity(FED, "gateway"), access=scheduler_access) as bus:
            with pytest.raises(BusError, match="permission denied"):
                await bus.list_streams()


@asynccontextmanager
async def run_s3(mounted_secrets: Path) -> AsyncIterator[str]:
    """Run SeaweedFS with the command of its pod, with local directories and ports; yield its endpoint."""
    (pod,) = (item for item in objects_of_kind(OBJECTS, "StatefulSet") if item["metadata"]["name"] == "s3")
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    port, data = free_port(), mounted_secrets / "data"
    data.mkdir()
    command = [
        argument.replace("/keys/", f"{mounted_secrets}/fedbus-s3-keys/")
        .replace("=/data", f"={data}")
        .replace("=8333", f"={port}")
        .replace("0.0.0.0", "127.0.0.1")
        for argument in container["command"][1:]
    ]
    ports = {name: free_port() for name in INTERNAL_PORTS}
    port_options = [f"-{name}={number}" for name, number in ports.items()]
    with (mounted_secrets / "weed.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            find_seaweedfs(), *command, *port_options, stdout=log, stderr=log, cwd=data
        )
    try:
        yield f"https://localhost:{port}"
    finally:
        process.terminate()
        await process.wait()
        _remove_sockets([port, *ports.values()])


async def test_the_bucket_job_creates_the_bucket_over_tls(mounted_secrets: Path) -> None:
    (job,) = objects_of_kind(OBJECTS, "Job")
    pod = job["spec"]["template"]
    keys = mounted_secrets / keys_of(pod)
    async with run_s3(mounted_secrets) as endpoint:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS")}
        fedbus = FedbusCli(mounted_secrets / "home")
        fedbus.environment = clean | {
            "FEDBUS_HOME": str(mounted_secrets / "home"),
            "FEDBUS_CA": str(keys / "ca.pem"),
            "FEDBUS_S3_CREDENTIALS": str(keys / "s3-credentials"),
            "FEDBUS_STORE": f"s3://fedbus/models?endpoint={endpoint}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        arguments = pod["spec"]["containers"][0]["args"]

        async def is_error(text: str) -> bool:
            return text in (await fedbus("model", "ls", "--task", "mnist")).err

        await eventually(lambda: is_error("there is no bucket fedbus"), within_s=60)
        for _ in range(2):
            result = await fedbus(*arguments)
            assert (result.code, result.out.strip()) == (0, "bucket fedbus exists"), result.err
        assert not await is_error("there is no bucket")

        http_endpoint = endpoint.replace("https", "http")
        fedbus.environment["FEDBUS_STORE"] = f"s3://fedbus/models?endpoint={http_endpoint}"
        assert await is_error("cannot use")
