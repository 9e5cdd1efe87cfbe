"""Imports point downward, each third-party library is used in one package, and class names are unique.

The tests read the source of every file, with imports inside functions. Each test collects all violations of its rule
and prints them as `file:line: violation`.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[1]
ROOT: Final = REPOSITORY / "fedbus"
TASKS: Final = ROOT / "simulation" / "experiments" / "apps"
"""The tasks of the experiments: data, which fedbus loads as the code of a user."""
MODULES: Final = sorted(module for module in ROOT.rglob("*.py") if not module.is_relative_to(TASKS))
MIDDLE_LAYERS: Final = {"domain", "bus", "stores", "learning"}

ALLOWED_IMPORTS: Final = {
    "common": set[str](),
    "contracts": {"common"},
    "domain": {"contracts"},
    "bus": {"common", "contracts"},
    "stores": {"common", "contracts"},
    "learning": {"common", "contracts"},
    "agents": {"common", "contracts", *MIDDLE_LAYERS},
    "simulation": {"common", "contracts", *MIDDLE_LAYERS, "agents"},
    "app": {"common", "contracts", *MIDDLE_LAYERS, "agents", "simulation"},
}

ALLOWED_IMPORTS_OF_ROOT: Final = {"__init__.py": {"common"}, "__main__.py": {"app"}}
"""The same for a module of `fedbus` itself."""

AGENTS: Final = {
    "server_manager",
    "workflow_scheduler",
    "flower_server",
    "client_manager",
    "flower_client",
    "inference",
    "gateway",
    "device_monitor",
    "training_monitor",
}
"""The packages of `fedbus.agents`, besides `common`, which all of them share."""

LIBRARY_OWNERS: Final = {
    "flwr": ("learning/flower", "learning/flower_superlink"),
    "torch": ("learning",),
    "nats": ("bus",),
    "ray": ("simulation/ray",),
    "aiobotocore": ("stores",),
    "botocore": ("stores",),
    "typer": ("app",),
    "click": ("app",),
    "rich": ("app",),
}
"""A library, and the packages that may import it."""

PURE: Final = {"contracts", "domain"}
IO_MODULES: Final = {
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

PURE_MODULES: Final = {
    "common": {"machine"},
    "client_manager": {
        "code_choice",
        "effects",
        "events",
        "machine",
        "model_choice",
        "records",
        "run_choice",
        "steps",
    },
    "server_manager": {
        "code_rollout",
        "effects",
        "events",
        "machine",
        "model_availability",
        "model_promotion",
        "records",
        "recruiting",
        "training_run",
    },
    "workflow_scheduler": {
        "effects",
        "events",
        "machine",
        "records",
        "runs",
        "schedule",
        "trigger_inputs",
    },
}
"""The modules of each agent that decide without I/O."""

SHARED_CLASS_NAMES: Final[dict[str, str]] = {}
"""A class name that may occur more than once, and the reason."""

MODULE_PATH: Final = re.compile(r"\bfedbus(?:\.[a-z_]\w*){2,}")

IMPORT_IN_A_STRING: Final = re.compile(r"^\s*from (fedbus[\w.]*) import ([\w, ]+)", re.MULTILINE)

FLOWER_PACKAGE: Final = re.compile(r"\bflwr\b(?!-datasets)")
FLOWER: Final = re.compile(r"\bflwr\b|Flower(?!\s*(?:[Ss]erver|[Cc]lient))")
"""The library, apart from the agents `flower-server` and `flower-client`, whose names are on the wire."""

Violations = Iterator[str]


# --- reading the source -------------------------------------------------------------------------


@cache
def tree_of(module: Path) -> ast.Module:
    return ast.parse(module.read_text())


def location(module: Path, node: ast.AST | None = None) -> str:
    """The path of the file in the repository, with the line of *node*."""
    path = str(module.relative_to(REPOSITORY))
    return path if node is None else f"{path}:{getattr(node, 'lineno', 1)}"


def package_of(module: Path) -> str:
    """The package below `fedbus` that a module belongs to; empty for `fedbus` itself."""
    return module.relative_to(ROOT).parts[0] if module.parent != ROOT else ""


def agent_of(module: Path) -> str:
    """The package or module below `fedbus.agents` that a module belongs to; empty for `fedbus.agents` itself."""
    parts = module.relative_to(ROOT / "agents").with_suffix("").parts
    return parts[0] if parts != ("__init__",) else ""


@cache
def imports_of(module: Path) -> list[tuple[str, ast.AST]]:
    """All absolute names that *module* imports, through `importlib` too where the name is a literal."""
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.ImportFrom(module=str(name), names=names, level=0):
                found += [(f"{name}.{alias.name}", node) for alias in names]
            case ast.Import(names=names):
                found += [(alias.name, node) for alias in names]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found.append((name, node))
            case _:
                pass
    return found


def packages_used_by(module: Path) -> Iterator[tuple[str, ast.AST]]:
    for name, node in imports_of(module):
        top, _, rest = name.partition(".")
        package = rest.partition(".")[0]
        if top == "fedbus" and package and (ROOT / package).is_dir():
            yield package, node


def docstrings_of(tree: ast.Module) -> set[ast.AST]:
    """The string statements of *tree*: docstrings of modules, classes, functions and attributes."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def assert_none(violations: Violations) -> None:
    found = sorted(violations)
    assert not found, "\n  ".join([f"{len(found)} violations:", *found])


# --- the rules ------------------------------------------------------------------------------------


def test_imports_are_absolute() -> None:
    assert_none(
        f"{location(module, node)}: relative import"
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ImportFrom) and node.level
    )


def test_imports_point_downward() -> None:
    def violations() -> Violations:
        for module in MODULES:
            own = package_of(module)
            allowed = ALLOWED_IMPORTS[own] | {own} if own else ALLOWED_IMPORTS_OF_ROOT.get(module.name, set())
            for used, node in packages_used_by(module):
                if used not in allowed:
                    yield f"{location(module, node)}: {own or 'fedbus'} imports {used}"

    assert_none(violations())


def test_each_library_is_imported_in_one_package() -> None:
    def violations() -> Violations:
        for module in MODULES:
            for name, node in imports_of(module):
                library = name.partition(".")[0]
                packages = LIBRARY_OWNERS.get(library, ())
                if packages and not any(ROOT / package in module.parents for package in packages):
                    yield f"{location(module, node)}: {library} outside fedbus/{', '.join(packages)}"

    assert_none(violations())


def test_contracts_and_domain_do_no_io() -> None:
    def violations() -> Violations:
        for module in MODULES:
            if package_of(module) not in PURE:
                continue
            for name, node in imports_of(module):
                if (library := name.partition(".")[0]) in IO_MODULES:
                    yield f"{location(module, node)}: imports {library}"
            for node in ast.walk(tree_of(module)):
                if isinstance(node, ast.AsyncFunctionDef):
                    yield f"{location(module, node)}: async def {node.name}"

    assert_none(violations())


def test_the_decisions_of_an_agent_do_no_io() -> None:
    def violations() -> Violations:
        for agent, names in PURE_MODULES.items():
            own = {
                "fedbus.agents.common.machine",
                *(f"fedbus.agents.{agent}.{name}" for name in names),
            }
            for module in (ROOT / "agents" / agent / f"{name}.py" for name in names):
                for name, node in imports_of(module):
                    is_pure = name.split(".")[:2] in [["fedbus", package] for package in PURE]
                    if name.startswith("fedbus.") and not is_pure and name.rpartition(".")[0] not in own:
                        yield f"{location(module, node)}: imports {name}"
                    if name.partition(".")[0] in {*IO_MODULES, "structlog", "time"}:
                        yield f"{location(module, node)}: imports {name}"
                for node in ast.walk(tree_of(module)):
                    if isinstance(node, ast.AsyncFunctionDef):
                        yield f"{location(module, node)}: async function {node.name}"

    assert_none(violations())


def test_only_stores_runs_git() -> None:
    """A list, tuple or call of arguments that begins with "git" is a git command."""

    def violations() -> Violations:
        for module in MODULES:
            for node in ast.walk(tree_of(module)):
                match node:
                    case (
                        ast.List(elts=[ast.Constant(value="git"), *_])
                        | ast.Tuple(elts=[ast.Constant(value="git"), *_])
                        | ast.Call(args=[ast.Constant(value="git"), ast.Constant(), *_])
                    ) if package_of(module) != "stores":
                        yield f"{location(module, node)}: git command"

    assert_none(violations())


def test_no_agent_imports_another() -> None:
    """Each agent may import `agents/common`; `agents/common` imports no agent."""

    def violations() -> Violations:
        for module in MODULES:
            if package_of(module) != "agents":
                continue
            own = agent_of(module)
            for name, node in imports_of(module):
                if not name.startswith("fedbus.agents."):
                    continue
                used = name.split(".")[2]
                if used not in {own, "common"}:
                    yield f"{location(module, node)}: {own or 'agents'} imports {used}"

    assert_none(violations())


def test_only_the_adapters_of_flower_name_it() -> None:
    """Any training library runs behind the interface of `fedbus.learning.library`; two agents have Flower's name."""

    def violations() -> Violations:
        for module in MODULES:
            if module.relative_to(ROOT).as_posix().startswith("learning/flower"):
                continue
            text = module.read_text()
            names = FLOWER if package_of(module) != "learning" else FLOWER_PACKAGE
            for match in names.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                yield f"{location(module)}:{line}: {match[0]!r}"

    assert_none(violations())


def test_every_agent_is_a_package() -> None:
    found = {path.name for path in (ROOT / "agents").iterdir() if path.suffix == ".py" or is_package(path)}
    assert found == {"__init__.py", "common", *AGENTS}


def test_only_app_names_modules_in_strings() -> None:
    """An import checker does not see a module path in a string, so only the package that wires has them."""

    def violations() -> Violations:
        for module in MODULES:
            if package_of(module) == "app":
                continue
            tree = tree_of(module)
            docstrings = docstrings_of(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                    for path in filter(is_module, MODULE_PATH.findall(node.value)):
                        yield f"{location(module, node)}: {path!r}"

    assert_none(violations())


def test_programs_in_strings_import_what_exists() -> None:
    """A test may run a program that is a string; neither a rename nor mypy sees its imports."""

    def violations() -> Violations:
        for module in sorted((REPOSITORY / "tests").rglob("*.py")):
            for node in ast.walk(tree_of(module)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for name, members in IMPORT_IN_A_STRING.findall(node.value):
                        for member in filter(None, re.split(r"[,\s]+", members)):
                            if not exists(name, member):
                                yield f"{location(module, node)}: from {name} import {member}"

    assert_none(violations())


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for top in ("fedbus", "tests", "benchmarks"):
        for module in sorted((REPOSITORY / top).rglob("*.py")):
            for node in ast.walk(tree_of(module)):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(location(module, node))
    repeated = {name: found for name, found in places.items() if len(found) > 1}
    assert_none(
        f"{name}: {', '.join(found)}" for name, found in repeated.items() if name not in SHARED_CLASS_NAMES
    )
    assert SHARED_CLASS_NAMES.keys() <= repeated.keys(), "an exception that is no longer needed"


def test_every_package_has_a_layer() -> None:
    assert {path.name for path in ROOT.iterdir() if is_package(path)} == ALLOWED_IMPORTS.keys()


def test_every_module_has_a_docstring() -> None:
    assert_none(location(module) for module in MODULES if not ast.get_docstring(tree_of(module)))


def exists(module: str, member: str) -> bool:
    try:
        return hasattr(import_module(module), member) or find_spec(f"{module}.{member}") is not None
    except ModuleNotFoundError:
        return False


def is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


def is_module(dotted: str) -> bool:
    """Whether *dotted*, or its longest part with more than two names, is a module of fedbus."""
    names = dotted.split(".")
    candidates = [REPOSITORY.joinpath(*names[:length]) for length in range(3, len(names) + 1)]
    return any(path.with_suffix(".py").is_file() or is_package(path) for path in candidates)
