"""Debug logging of method calls: entry, exit, duration, and the exception if there is one.

    @log_method_calls
    class InferenceAgent: ...

    → InferenceAgent._begin  arguments=['InferStart']
    ← InferenceAgent._begin  outcome=returned seconds=0.012

Only the types of the arguments are logged, never their values. Above the debug level, a call costs one comparison.
"""

import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import structlog

LOGGER: Final = "fedbus.method_calls"

log = structlog.get_logger(LOGGER)
_switch: Final = logging.getLogger(LOGGER)
T = TypeVar("T", bound=type)


def log_method_calls(agent: T) -> T:
    """Log the calls of all methods that the class itself defines, except properties and dunder methods."""
    for name, method in list(vars(agent).items()):
        if (
            inspect.isfunction(method)
            and not name.startswith("__")
            and not inspect.isasyncgenfunction(method)
        ):
            wrapped = _wrap_async(method) if inspect.iscoroutinefunction(method) else _wrap_sync(method)
            setattr(agent, name, wrapped)
    return agent


def _wrap_async(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def logged(*args: Any, **kwargs: Any) -> Any:
        if not _switch.isEnabledFor(logging.DEBUG):
            return await method(*args, **kwargs)
        start = _log_entry(method, args)
        outcome = "returned"
        try:
            return await method(*args, **kwargs)
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            _log_exit(method, start, outcome)

    return logged


def _wrap_sync(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def logged(*args: Any, **kwargs: Any) -> Any:
        if not _switch.isEnabledFor(logging.DEBUG):
            return method(*args, **kwargs)
        start = _log_entry(method, args)
        outcome = "returned"
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            _log_exit(method, start, outcome)

    return logged


def _log_entry(method: Callable[..., Any], args: tuple[Any, ...]) -> float:
    step = f"→ {method.__qualname__}"
    log.debug(step, arguments=[type(one).__name__ for one in args[1:]])
    return time.monotonic()


def _log_exit(method: Callable[..., Any], start: float, outcome: str) -> None:
    step = f"← {method.__qualname__}"
    log.debug(step, outcome=outcome, seconds=round(time.monotonic() - start, 6))
