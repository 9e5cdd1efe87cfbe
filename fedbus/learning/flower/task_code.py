"""A task's own code: what ``module:name`` refers to, imported from the task's directory.

What the task had installed for itself lies beside that directory, and is looked at last: it can stand
in the place of nothing that this machine has.
"""

import difflib
import importlib
import sys
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedbus.contracts.task.task import LIBRARIES_SUFFIX

_task_roots: set[str] = set()
"""The task directories that modules were imported from so far."""
_import_lock = RLock()
"""Where modules are looked for is the whole process's: several agents in one may load at the same time."""


class BadTask(Exception):
    """The task's code cannot be used; the text is one line that says what is wrong and where."""


def load(path: Path, reference: str) -> Any:
    """What *reference* (``module:name``) names in the task at *path*; raises BadTask."""
    module_name, colon, names = reference.partition(":")
    if not (module_name and colon and names):
        raise BadTask(f"{reference!r} is not a reference: write module:name")
    with _import_lock:
        found: Any = _import_module(path, module_name)
    for name in names.split("."):
        if not hasattr(found, name):
            raise BadTask(
                f"{_module_file(found, path)} has no {name!r}, which {reference!r} names{_suggest_names(found, name)}"
            )
        found = getattr(found, name)
    return found


def load_server_app(path: Path, reference: str) -> ServerApp:
    found: ServerApp = _check_type(load(path, reference), ServerApp, reference)
    return found


def load_client_app(path: Path, reference: str) -> ClientApp:
    found: ClientApp = _check_type(load(path, reference), ClientApp, reference)
    return found


def load_function(path: Path, reference: str) -> Any:
    """A function or class of the task, such as its model builder."""
    found = load(path, reference)
    if not callable(found):
        raise BadTask(f"{reference!r} is {type(found).__name__}, and should be something to call")
    return found


def _import_module(path: Path, name: str) -> ModuleType:
    if not path.is_dir():
        raise BadTask(f"there is no task at {path}")
    _put_first_on_path(str(path.resolve()), name.partition(".")[0])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise BadTask(
                f"{path} has no module {name!r}: there is no {name.replace('.', '/')}.py in it"
            ) from None
        raise BadTask(f"module {name!r} of {path} needs {error.name!r}, which is not installed") from None
    except Exception as error:
        raise BadTask(f"module {name!r} of {path} cannot be imported: {format_error(error)}") from error


def _put_first_on_path(root: str, package: str) -> None:
    """Make *root* where modules are looked for first; forget a module of this name from another task or version."""
    own, others = root + LIBRARIES_SUFFIX, {one + LIBRARIES_SUFFIX for one in _task_roots - {root}}
    rest = [entry for entry in sys.path if entry not in {root, own, *others}]
    path = [root, *rest, *([own] if Path(own).is_dir() else [])]
    if sys.path != path:
        sys.path[:] = path
        importlib.invalidate_caches()
    file = getattr(sys.modules.get(package), "__file__", None)
    other = next(
        (one for one in _task_roots if file and one != root and Path(file).is_relative_to(one)), None
    )
    _task_roots.add(root)
    if other:
        sys.path[:] = [entry for entry in sys.path if entry != other]
        _forget_modules_in(other, other + LIBRARIES_SUFFIX)


def _forget_modules_in(*directories: str) -> None:
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if any(file.is_relative_to(one) for one in directories):
            del sys.modules[name]


def _check_type(found: Any, kind: type[Any], reference: str) -> Any:
    if not isinstance(found, kind):
        raise BadTask(f"{reference!r} is of type {type(found).__name__}, and should be a {kind.__name__}")
    return found


def _module_file(found: Any, path: Path) -> str:
    where = getattr(found, "__file__", None)
    return str(where or f"{getattr(found, '__name__', found)} in {path}")


def _suggest_names(found: Any, name: str) -> str:
    """What there is, nearest names first."""
    public = [one for one in vars(found) if not one.startswith("_")] if hasattr(found, "__dict__") else []
    near = difflib.get_close_matches(name, public, n=3, cutoff=0.5)
    own = [one for one in public if _is_own(found, one)]
    names = near + [one for one in sorted(own) if one not in near]
    return f"; it has {', '.join(names[:8])}" if names else ""


def _is_own(module: Any, name: str) -> bool:
    value = getattr(module, name)
    return not isinstance(value, ModuleType) and getattr(value, "__module__", "") in {
        getattr(module, "__name__", ""),
        ClientApp.__module__,
        ServerApp.__module__,
    }


def format_error(error: BaseException) -> str:
    """*error* as one line: its kind and what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
