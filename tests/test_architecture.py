"""Imports point downward, and each foreign library has its one place. Read off every file, imports in functions too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fedbus"
MODULES = sorted(ROOT.rglob("*.py"))
IN_THE_MIDDLE = {"domain", "bus", "stores", "learning"}

MAY_USE = {
    "contracts": set[str](),
    "domain": {"contracts"},
    "bus": {"contracts"},
    "stores": {"contracts"},
    "learning": {"contracts"},
    "agents": {"contracts", *IN_THE_MIDDLE},
    "app": {"contracts", *IN_THE_MIDDLE, "agents"},
}

ONLY_IN = {
    "flwr": {"learning"},
    "torch": {"learning"},
    "nats": {"bus"},
    "aiobotocore": {"stores"},
    "botocore": {"stores"},
    "typer": {"app"},
    "click": {"app"},
    "rich": {"app"},
}
"""A library, and the packages that may import it."""

PURE = {"contracts", "domain"}
MAKES_IMPURE = {
    "asyncio",
    "socket",
    "subprocess",
    "threading",
    "pathlib",
    "sqlite3",
    "aiohttp",
    "urllib",
    "random",
}

each_module = pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def package_of(module: Path) -> str:
    """The package a module belongs to; nothing for `fedbus` itself."""
    return module.relative_to(ROOT).parts[0] if module.parent != ROOT else ""


def imported_by(module: Path) -> Iterator[str]:
    """All that *module* imports, wherever in it, by whole names; by `importlib` too, where the name is written out."""
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.ImportFrom(module=name, names=names, level=level):
                assert level == 0, f"{module}: a relative import hides where it goes"
                yield from (f"{name}.{alias.name}" for alias in names)
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def packages_used_by(module: Path) -> set[str]:
    parts = [name.split(".") for name in imported_by(module)]
    return {name[1] for name in parts if name[0] == "fedbus" and len(name) > 1 and (ROOT / name[1]).is_dir()}


@each_module
def test_imports_point_downward(module: Path) -> None:
    package = package_of(module)
    allowed = MAY_USE[package] if package else set()
    assert packages_used_by(module) - {package} <= allowed


@each_module
def test_a_library_is_imported_in_its_one_place(module: Path) -> None:
    libraries = {name.split(".")[0] for name in imported_by(module)}
    for library in libraries & ONLY_IN.keys():
        assert package_of(module) in ONLY_IN[library], f"{library} in {module.relative_to(ROOT)}"


@each_module
def test_what_decides_does_not_act(module: Path) -> None:
    if package_of(module) in PURE:
        assert not {name.split(".")[0] for name in imported_by(module)} & MAKES_IMPURE
        assert not [
            node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.AsyncFunctionDef)
        ]


@each_module
def test_git_is_run_in_stores_alone(module: Path) -> None:
    """A list or call of arguments that begins with "git"."""
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case (
                ast.List(elts=[ast.Constant(value="git"), *_])
                | ast.Tuple(elts=[ast.Constant(value="git"), *_])
                | ast.Call(args=[ast.Constant(value="git"), ast.Constant(), *_])
            ):
                assert package_of(module) == "stores", f"{module.relative_to(ROOT)}, line {node.lineno}"


AGENTS = {path.name for path in (ROOT / "agents").iterdir() if (path / "agent.py").is_file()}


@each_module
def test_no_agent_knows_another(module: Path) -> None:
    if package_of(module) != "agents":
        return
    used = {name.split(".")[2] for name in imported_by(module) if name.startswith("fedbus.agents.")}
    own = module.relative_to(ROOT / "agents").parts[0].removesuffix(".py")
    assert not (used - {own}) & AGENTS


DECIDES_ONLY = {
    "agents/server_manager": {
        "code_rollout",
        "effects",
        "events",
        "machine",
        "model_availability",
        "model_promotion",
        "records",
        "training_run",
    },
}
"""Modules of an agent that decide, and leave it to the others to act."""


@pytest.mark.parametrize(
    "module",
    [ROOT / package / f"{name}.py" for package, names in DECIDES_ONLY.items() for name in sorted(names)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_decisions_of_an_agent_are_pure(module: Path) -> None:
    own = {
        f"fedbus.agents.{module.parent.name}.{name}" for name in DECIDES_ONLY[f"agents/{module.parent.name}"]
    }
    imported = {name.rpartition(".")[0] or name for name in imported_by(module)}
    ours = {name for name in imported if name.startswith("fedbus.")}
    assert {name for name in ours if name.split(".")[1] not in PURE} <= own
    assert not {name.split(".")[0] for name in imported_by(module)} & {*MAKES_IMPURE, "structlog", "time"}
    assert not [
        node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.AsyncFunctionDef)
    ]


@each_module
def test_flower_is_imported_by_its_adapter_alone(module: Path) -> None:
    if module.relative_to(ROOT).parts[:2] != ("learning", "flower"):
        assert "flwr" not in {name.split(".")[0] for name in imported_by(module)}


def test_every_package_has_its_place() -> None:
    found = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert found == MAY_USE.keys()


def test_every_module_says_what_it_is_for() -> None:
    silent = [path for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent
