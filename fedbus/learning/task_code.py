"""Loads a task's own code: resolves references ``module:name`` in the task's directory.

The task's own libraries are installed next to that directory. They come last on `sys.path`, so that they never
replace a library of this machine.
"""

import difflib
import importlib
import sys
from pathlib import Path
from threading import RLock
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, TypeVar

from fedbus.common.garbage_collection import rare_garbage_collections
from fedbus.contracts.task.task import LIBRARIES_SUFFIX
from fedbus.learning.library import BadTask

__all__ = [
    "BadTask",
    "describe_error",
    "format_error",
    "load",
    "load_function",
    "load_instance",
    "load_module",
]

T = TypeVar("T")

_task_roots: set[str] = set()
"""The task directories from which this process has imported modules."""
_import_lock = RLock()
"""`sys.path` and `sys.modules` belong to the whole process, in which several agents may load code at the same time."""


def load(path: Path, reference: str) -> Any:
    """Import *reference* (``module:name``) from the task at *path*, and return the object.

    Raises:
        BadTask: the reference is malformed, the module cannot be imported, or it has no such name.

    """
    module_name, colon, names = reference.partition(":")
    if not (module_name and colon and names):
        raise BadTask(f"{reference!r} is not a valid reference. Write module:name")
    target: Any = load_module(path, module_name)
    for name in names.split("."):
        if not hasattr(target, name):
            raise BadTask(
                f"{_module_file(target, path)} has no {name!r}, which {reference!r} names{_suggest_names(target, name)}"
            )
        target = getattr(target, name)
    return target


def load_instance(path: Path, reference: str, expected: type[T]) -> T:
    """Load an object of the class *expected*. Raises BadTask."""
    value = load(path, reference)
    if not isinstance(value, expected):
        raise BadTask(f"{reference!r} is of type {type(value).__name__}, expected {expected.__name__}")
    return value


def load_function(path: Path, reference: str) -> Any:
    """Load a function or class of the task, such as its model builder. Raises BadTask."""
    function = load(path, reference)
    if not callable(function):
        raise BadTask(f"{reference!r} is of type {type(function).__name__}, which is not callable")
    return function


def load_module(path: Path, name: str) -> ModuleType:
    """Import the module *name* of the task at *path*. Raises BadTask."""
    with _import_lock, rare_garbage_collections():
        return _import_module(path, name)


def _import_module(path: Path, name: str) -> ModuleType:
    if not path.is_dir():
        raise BadTask(f"no task at {path}: it is not a directory")
    _put_first_on_path(str(path.resolve()), name.partition(".")[0])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise BadTask(
                f"{path} has no module {name!r}: {name.replace('.', '/')}.py does not exist"
            ) from None
        place = _place_of(error, path)
        raise BadTask(
            f"module {name!r} of {path} imports {error.name!r}, which is not installed{place}"
        ) from None
    except (Exception, SystemExit) as error:
        raise BadTask(
            f"module {name!r} of {path} cannot be imported: {describe_error(error, path)}"
        ) from error


def _put_first_on_path(root: str, package: str) -> None:
    """Put *root* first on `sys.path`, and unload the modules of another task or version that has this *package*."""
    own, others = root + LIBRARIES_SUFFIX, {other + LIBRARIES_SUFFIX for other in _task_roots - {root}}
    rest = [entry for entry in sys.path if entry not in {root, own, *others}]
    path = [root, *rest, *([own] if Path(own).is_dir() else [])]
    if sys.path != path:
        sys.path[:] = path
        importlib.invalidate_caches()
    file = getattr(sys.modules.get(package), "__file__", None)
    other = next(
        (other for other in _task_roots if file and other != root and Path(file).is_relative_to(other)),
        None,
    )
    _task_roots.add(root)
    if other:
        sys.path[:] = [entry for entry in sys.path if entry != other]
        _forget_modules_in(other, other + LIBRARIES_SUFFIX)


def _forget_modules_in(*directories: str) -> None:
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if any(file.is_relative_to(directory) for directory in directories):
            del sys.modules[name]


def _module_file(target: Any, path: Path) -> str:
    file = getattr(target, "__file__", None)
    return str(file or f"{getattr(target, '__name__', target)} in {path}")


def _suggest_names(target: Any, name: str) -> str:
    """List the public names of *target*, the closest to *name* first."""
    public = [key for key in vars(target) if not key.startswith("_")] if hasattr(target, "__dict__") else []
    close = difflib.get_close_matches(name, public, n=3, cutoff=0.5)
    own = [key for key in public if _is_own(target, key)]
    names = close + [key for key in sorted(own) if key not in close]
    return f"; it has {', '.join(names[:8])}" if names else ""


def _is_own(module: Any, name: str) -> bool:
    """Return whether the module defines *name*, or it is an object of an imported class."""
    value = getattr(module, name)
    origin = getattr(value, "__module__", "")
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return bool(origin == getattr(module, "__name__", ""))
    return bool(origin) and not isinstance(value, ModuleType)


def format_error(error: BaseException) -> str:
    """Format *error* as one line: its type and message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def describe_error(error: BaseException, path: Path) -> str:
    """Format *error* as one line, with the innermost line of the task at *path* that raised it, if there is one.

    For example ``KeyError: 'coef' (my_app/task.py:31)``. The notes of *error* follow.
    """
    notes = "".join(f"; {' '.join(note.split())}" for note in getattr(error, "__notes__", ()))
    return f"{format_error(error)}{_place_of(error, path)}{notes}"


def _place_of(error: BaseException, path: Path) -> str:
    root, place, traceback = path.resolve(), "", error.__traceback__
    while traceback is not None:
        file = Path(traceback.tb_frame.f_code.co_filename)
        if file.is_relative_to(root):
            place = f" ({file.relative_to(root)}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place
