"""Read, check and create task directories.

A task is a directory with an app in its ``pyproject.toml``. A ``[tool.fedbus]`` table is optional: its defaults make
a task of any app, with an id made of the project's name. The code of a task is never imported here: the source shows
whether a function exists. So a task can be checked without its dependencies and without trust in its code.
"""

import ast
import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from fedbus.contracts.identifiers import check_id
from fedbus.contracts.task.app import FindAppReader, Keys, LibraryUnusable, get_nested, missing_key_problem
from fedbus.contracts.task.base import ObjectReference
from fedbus.contracts.task.task import DEFAULT_LIBRARY, Task, TaskTable
from fedbus.stores.errors import StoreError
from fedbus.stores.tasks import git_version
from fedbus.stores.tasks.requirement_syntax import problem_with

PYPROJECT: Final = "pyproject.toml"
MAX_SOURCE_FILES: Final = 10_000
MAX_PYPROJECT_BYTES: Final = 1024 * 1024
MAX_DERIVED_ID_CHARS: Final = 48
"""The longest id that is made of a project's name. The ids of its runs are longer (limit 63)."""

_FEDBUS_TABLE: Final = ("tool", "fedbus")
_PROJECT_NAME: Final = ("project", "name")
_CODE_TABLE: Final = (*_FEDBUS_TABLE, "code")
_IGNORED_DIRECTORIES: Final = {"__pycache__", "build", "dist", "node_modules", "venv"}

_REFERENCE = TypeAdapter(ObjectReference)
_REFERENCES: Final[tuple[Keys, ...]] = (
    ("model",),
    ("predict",),
    ("samples",),
    ("serving", "holdout"),
    ("serving", "score"),
    ("capture", "training-data"),
    ("checks", "reference"),
)
"""The keys of the table that name a function or class of the task."""


@dataclass(frozen=True, order=True)
class Problem:
    """A problem of a task: file, line, description and advice."""

    file: str
    line: int
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}: {self.advice}"


class TaskInvalid(StoreError):
    """The task directory has problems."""

    def __init__(self, path: Path, problems: list[Problem]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{path} is not a valid task: {problems[0]}{more}")
        self.path = path
        self.problems = problems


def read_task(path: Path, libraries: FindAppReader, *, version: str = "") -> Task:
    """Read the task in the directory *path*, whose app one of the training *libraries* reads.

    *version* is the known code version, for a directory that is no Git work tree.

    Raises:
        TaskInvalid: the task has problems; it has all of them.

    """
    if problems := validate_task(path, libraries):
        raise TaskInvalid(path, problems)
    document = tomllib.loads((path / PYPROJECT).read_text(encoding="utf-8"))
    table = TaskTable.model_validate(_with_task_id(document, get_nested(document, _FEDBUS_TABLE) or {}))
    app = libraries(table.library).read_app(document, path)
    return Task(
        table=table,
        app=dict(app.references),
        app_rounds=app.rounds or 0,
        rounds_key=app.rounds_key,
        run_config=dict(app.run_config),
        code_version=version or code_version(path),
        path=str(path.resolve()),
    )


def code_version(path: Path) -> str:
    """Return the commit SHA if *path* is unchanged since HEAD, otherwise ``sha256:`` and the digest of its files."""
    try:
        if git_version.is_clean(path):
            return git_version.read_head(path)
        names = git_version.list_files(path)
    except git_version.GitFailed:
        names = []
    return f"sha256:{_compute_digest(path, names or list_source_files(path))}"


def content_version(path: Path) -> str:
    """Return ``sha256:`` and the digest of the files in *path*. A commit of other files does not change it."""
    return f"sha256:{_compute_digest(path, list_source_files(path))}"


def validate_task(path: Path, libraries: FindAppReader) -> list[Problem]:
    """Return all problems of the task in *path*, sorted by file and line. One of *libraries* reads its app."""
    pyproject = path / PYPROJECT
    if not path.is_dir():
        return [
            _problem_without_line(str(path), "the directory does not exist", "give the directory of a task")
        ]
    if not pyproject.is_file():
        return [
            _problem_without_line(
                PYPROJECT,
                f"{path} has none",
                "give the directory of an app, or create one with fedbus task new",
            )
        ]
    try:
        text = _read_bounded(pyproject)
        document = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        return [Problem(PYPROJECT, _line_named_in(error), "cannot be read", _first_line(error))]
    return sorted(_TaskValidator(path, document, _LineIndex(text), libraries).find_problems())


def create_task(path: Path, id: str, *, library: str = DEFAULT_LIBRARY) -> None:
    """Create a small runnable app for the training library *library* in *path*, as the task *id*.

    Raises:
        StoreError: the directory is not empty, or there is no template for the library.

    """
    check_id("task", id)
    if library not in (names := _list_templates()):
        raise StoreError(
            f"there is no template for the library {library!r}; choose one of {', '.join(names)}"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(f"{path} is not empty; choose a directory that does not exist")
    values = {"id": id, "package": _package_name(id)}
    for template, target in _render_templates(path, values["package"], library):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(template).substitute(values), encoding="utf-8")


# --- check ---


class _TaskValidator:
    """Finds the problems of one task."""

    def __init__(
        self, path: Path, document: Mapping[str, Any], lines: "_LineIndex", libraries: FindAppReader
    ) -> None:
        self._path = path
        self._libraries = libraries
        self._document = document
        self._lines = lines

    def find_problems(self) -> Iterator[Problem]:
        yield from self._check_app()
        yield from self._check_fedbus_table()

    def _check_app(self) -> Iterator[Problem]:
        """Yield the problems of the app that its library finds, and those of its references."""
        library = get_nested(self._document, (*_FEDBUS_TABLE, "library"))
        name = library if isinstance(library, str) and library else DEFAULT_LIBRARY
        try:
            app = self._libraries(name).read_app(self._document, self._path)
        except LibraryUnusable as error:
            what, _, advice = str(error).partition(". ")
            yield self._problem((*_FEDBUS_TABLE, "library"), what, advice or "install it")
            return
        for problem in app.problems:
            line = problem.line if problem.file else self._lines.find_line(problem.keys)
            yield Problem(problem.file or PYPROJECT, line, problem.what, problem.advice)
        for role, reference in app.references.items():
            yield from self._check_reference(app.places.get(role, (*_FEDBUS_TABLE, role)), reference)

    def _check_fedbus_table(self) -> Iterator[Problem]:
        table = get_nested(self._document, _FEDBUS_TABLE)
        if table is None:
            table = {}
        if not isinstance(table, dict):
            yield self._problem(
                _FEDBUS_TABLE,
                f"{_join_keys(_FEDBUS_TABLE)} is not a table",
                f"write a section [{_join_keys(_FEDBUS_TABLE)}]",
            )
            return
        try:
            TaskTable.model_validate(_with_task_id(self._document, table))
        except ValidationError as error:
            for detail in error.errors():
                yield self._table_problem(
                    tuple(map(str, detail["loc"])), detail["type"], detail["msg"], table
                )
        for keys in _REFERENCES:
            if _is_reference(value := get_nested(table, keys)):
                yield from self._check_reference((*_FEDBUS_TABLE, *keys), value)
        yield from self._check_code_table(table.get("code"))

    def _check_code_table(self, table: object) -> Iterator[Problem]:
        """Yield the problems of the check function and of the package requirements."""
        code = table if isinstance(table, dict) else {}
        if _is_reference(code.get("check")):
            yield from self._check_reference((*_CODE_TABLE, "check"), code["check"])
        install = code.get("install")
        for entry in install if isinstance(install, list) else ():
            if isinstance(entry, str) and (advice := problem_with(entry)):
                what = f"{entry!r} is not a package requirement"
                yield self._problem((*_CODE_TABLE, "install"), what, advice)

    def _table_problem(self, keys: Keys, kind: str, message: str, table: dict[str, Any]) -> Problem:
        """Describe a problem that pydantic found, by the keys of the table."""
        *parents, key = keys
        section = (*_FEDBUS_TABLE, *parents)
        if (section, key) == (_FEDBUS_TABLE, "task") and kind == "missing":
            return self._problem(
                _PROJECT_NAME,
                f"the task has no id: there is neither `task` in [{_join_keys(_FEDBUS_TABLE)}] nor a project name "
                "of which an id can be made",
                "set `name` in [project]",
            )
        if kind == "missing":
            problem = missing_key_problem(section, key, table)
            return self._problem(problem.keys, problem.what, problem.advice)
        if kind == "extra_forbidden":
            return self._problem(
                (*section, key), f"unknown key `{key}` in [{_join_keys(section)}]", _suggest_key(key, section)
            )
        value = get_nested(self._document, (*section, key))
        return self._problem(
            (*section, key),
            f"invalid value {value!r} of `{key}` in [{_join_keys(section)}]",
            _advice(key, message),
        )

    def _check_reference(self, keys: Keys, value: object) -> Iterator[Problem]:
        """Yield the problems of a reference: does the source define what *value* names?"""
        if not _is_reference(value):
            yield self._problem(
                keys, f"{keys[-1]} {value!r} is not a reference to a function or class", "write module:name"
            )
            return
        module, _, name = str(value).partition(":")
        source = _module_file(self._path, module)
        if source is None:
            expected = module.replace(".", "/") + ".py"
            yield self._problem(
                keys, f"{keys[-1]} {value!r} does not exist", f"create {expected}, or correct the name"
            )
            return
        try:
            tree = ast.parse(source.read_bytes(), filename=str(source))
        except (SyntaxError, ValueError) as error:
            file = str(source.relative_to(self._path))
            yield Problem(file, getattr(error, "lineno", None) or 1, "is not Python", _first_line(error))
            return
        if not _defines(tree, name):
            yield self._problem(
                keys, f"{keys[-1]} {value!r} does not exist", _describe_definitions(source, tree, name)
            )

    def _problem(self, keys: Keys, what: str, advice: str) -> Problem:
        return Problem(PYPROJECT, self._lines.find_line(keys), what, advice)


class _LineIndex:
    """The line numbers of the keys in a TOML file, which the parser does not report."""

    _SECTION = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$")
    _KEY = re.compile(r"^\s*([A-Za-z0-9_\-.\"']+)\s*=")

    def __init__(self, text: str) -> None:
        self._lines: dict[Keys, int] = {}
        section: Keys = ()
        for number, line in enumerate(text.splitlines(), start=1):
            if header := self._SECTION.match(line):
                section = _split_keys(header[1])
                self._lines.setdefault(section, number)
            elif entry := self._KEY.match(line):
                self._lines.setdefault(section + _split_keys(entry[1]), number)

    def find_line(self, keys: Keys) -> int:
        """Return the line of *keys*, or of the innermost section around it; 1 if there is none."""
        flat = tuple(part for key in keys for part in key.split("."))
        return next((self._lines[flat[:n]] for n in range(len(flat), 0, -1) if flat[:n] in self._lines), 1)


def _split_keys(dotted: str) -> Keys:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _join_keys(keys: Iterable[str]) -> str:
    return ".".join(keys)


def _problem_without_line(file: str, what: str, advice: str) -> Problem:
    return Problem(file, 1, what, advice)


def _suggest_key(key: str, section: Keys) -> str:
    names = _list_keys(section)
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(names)}"


def _list_keys(section: Keys) -> list[str]:
    """Return the valid keys of a section of the table."""
    model: Any = TaskTable
    for key in section[len(_FEDBUS_TABLE) :]:
        model = next(field.annotation for field in model.model_fields.values() if field.alias == key)
    return [str(field.alias) for field in model.model_fields.values()]


def _advice(key: str, message: str) -> str:
    if key in {keys[-1] for keys in _REFERENCES}:
        return "write module:name"
    if key == "task":
        return "use 1 to 63 lower-case letters, digits and hyphens, beginning with a letter or digit"
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _is_reference(value: object) -> bool:
    try:
        _REFERENCE.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


# --- definitions in the source ---


def _module_file(path: Path, module: str) -> Path | None:
    bare = path.joinpath(*module.split("."))
    return next((file for file in (bare.with_suffix(".py"), bare / "__init__.py") if file.is_file()), None)


def _defines(tree: ast.Module, name: str) -> bool:
    names = set(_iter_defined_names(tree.body))
    return name.partition(".")[0] in names or "*" in names


def _iter_defined_names(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Yield the names that a module defines when it is imported, as far as its source shows."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (alias.asname or alias.name.split(".")[0] for alias in aliases)
            case ast.Assign(targets=targets):
                yield from _iter_assigned_names(targets)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                yield from _iter_assigned_names([target])
            case ast.If() | ast.Try() | ast.With() | ast.For() | ast.While():
                yield from _iter_defined_names(_iter_nested(statement))
            case _:
                pass


def _iter_assigned_names(targets: Iterable[ast.expr]) -> Iterator[str]:
    for target in targets:
        yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _iter_nested(statement: ast.stmt) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, ast.ExceptHandler):
            yield from child.body


def _describe_definitions(source: Path, tree: ast.Module, name: str) -> str:
    names = [key for key in dict.fromkeys(_iter_defined_names(tree.body)) if not key.startswith("_")]
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"{source.name} defines {', '.join(names[:8]) or 'nothing'}; define {name!r} there"


# --- files ---


def _with_task_id(document: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of the task with its id, which is made of the project's name if the table has none."""
    name = get_nested(document, _PROJECT_NAME)
    default = _task_id_of(name) if isinstance(name, str) else ""
    return {**({"task": default} if default else {}), **table}


def _task_id_of(name: str) -> str:
    """Make a task id of the name of a project: ``My_App 2.0`` is ``my-app-2-0``; empty if there is none."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(words)[:MAX_DERIVED_ID_CHARS].rstrip("-")


def _read_bounded(path: Path) -> str:
    if path.stat().st_size > MAX_PYPROJECT_BYTES:
        raise ValueError(f"the file is too large (limit {MAX_PYPROJECT_BYTES} bytes)")
    return path.read_text(encoding="utf-8")


def _line_named_in(error: Exception) -> int:
    match = re.search(r"at line (\d+)", str(error))
    return int(match[1]) if match else 1


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def list_source_files(path: Path) -> list[str]:
    """List the files of a directory that is not in a Git repository, without caches and build outputs."""

    def iter_files(directory: Path) -> Iterator[Path]:
        for entry in directory.iterdir():
            if (
                entry.name.startswith(".")
                or entry.name in _IGNORED_DIRECTORIES
                or entry.suffix in {".pyc", ".egg-info"}
            ):
                continue
            if entry.is_dir() and not entry.is_symlink():
                yield from iter_files(entry)
            else:
                yield entry

    return sorted(entry.relative_to(path).as_posix() for entry in iter_files(path))


def _compute_digest(path: Path, names: list[str]) -> str:
    """Compute the digest of the names and contents of all regular files."""
    if len(names) > MAX_SOURCE_FILES:
        raise StoreError(
            f"{path} has too many files (limit {MAX_SOURCE_FILES}); name the directory of the task only"
        )
    digest = hashlib.sha256()
    for name in names:
        file = path / name
        if file.is_file() and not file.is_symlink():
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()


# --- new task ---


def _package_name(id: str) -> str:
    name = id.replace("-", "_") + "_app"
    return name if name[0].isalpha() else f"task_{name}"


def _list_templates() -> list[str]:
    """Return the libraries for which there are templates, sorted."""
    folders = resources.files("fedbus.stores").joinpath("templates").iterdir()
    return sorted(folder.name for folder in folders if folder.is_dir())


def _render_templates(path: Path, package: str, library: str) -> Iterator[tuple[str, Path]]:
    """Yield the text and the target path of each template."""
    for template in resources.files("fedbus.stores").joinpath("templates", library).iterdir():
        if template.name.endswith(".tmpl"):
            name = template.name.removesuffix(".tmpl")
            folder = path / package if name.endswith(".py") else path
            yield template.read_text(encoding="utf-8"), folder / name
