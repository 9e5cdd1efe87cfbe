"""Access to the manifests under deploy/ for tests."""

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from fedbus.contracts.permissions import ROLE_AGENTS, SERVER_ROLES, Role

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
OVERLAYS: Final = sorted(path.parent for path in (DEPLOY / "k3s" / "overlays").glob("*/kustomization.yaml"))
CONSTRAINTS: Final = dict(
    line.split("==", 1) for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)
Object = dict[str, Any]


@cache
def render(overlay: Path) -> tuple[Object, ...]:
    """Render all objects of *overlay* with kustomize."""
    result = subprocess.run(
        ["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True, timeout=60
    )
    return tuple(document for document in yaml.safe_load_all(result.stdout) if document)


def objects_of_kind(objects: tuple[Object, ...], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def pods(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Yield each pod template with the name of its owner."""
    for item in objects:
        name = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "PodTemplate":
            yield name, item["template"]
        elif "template" in item.get("spec", {}):
            yield name, item["spec"]["template"]


def containers(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    for name, pod in pods(objects):
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            yield f"{name}/{container['name']}", container


def role_of(arguments: list[str]) -> Role:
    """Return the role that a process of the server side needs if it runs ``fedbus`` with *arguments*."""
    agents = ["gateway"] if arguments[0] == "gateway" else arguments[1].split(",")
    (match,) = (role for role in (*SERVER_ROLES, Role.GATEWAY) if set(agents) <= set(ROLE_AGENTS[role]))
    return match


def has_fixed_tag(image: str) -> bool:
    """Return whether *image* is pinned to a version or a digest."""
    _, _, tag = image.rpartition("/")[2].partition(":")
    return "@sha256:" in image or (any(digit.isdigit() for digit in tag) and tag not in ("latest", "stable"))
