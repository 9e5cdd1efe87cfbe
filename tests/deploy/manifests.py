"""The files under deploy/ as tests look at them."""

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
    """All objects of *overlay*, as kustomize makes them."""
    said = subprocess.run(
        ["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True, timeout=60
    )
    return tuple(one for one in yaml.safe_load_all(said.stdout) if one)


def objects_of_kind(objects: tuple[Object, ...], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def pods(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Everything that pods are made of, with the name of whom it belongs to."""
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] == "PodTemplate":
            yield name, one["template"]
        elif "template" in one.get("spec", {}):
            yield name, one["spec"]["template"]


def containers(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    for name, pod in pods(objects):
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            yield f"{name}/{container['name']}", container


def role_of(words: list[str]) -> Role:
    """As whom the bus must know a process of the server's side that runs ``fedbus`` with *words*."""
    agents = ["gateway"] if words[0] == "gateway" else words[1].split(",")
    (role,) = (one for one in (*SERVER_ROLES, Role.GATEWAY) if set(agents) <= set(ROLE_AGENTS[one]))
    return role


def has_fixed_tag(image: str) -> bool:
    """Whether *image* says which one it means: a version or a digest, and nothing that moves."""
    _, _, tag = image.rpartition("/")[2].partition(":")
    return "@sha256:" in image or (any(digit.isdigit() for digit in tag) and tag not in ("latest", "stable"))
