"""Every step that an agent takes, told at debug: entering a method, leaving it, and how.

    @told_step_by_step
    class Inference: ...

    → Inference._begin(InferStart)
    ← Inference._begin after 0.012 s

Only names and the classes of what is passed are told, never contents. While the level is above debug a step
costs one comparison.
"""

import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import structlog

LOGGER: Final = "fedbus.steps"

log = structlog.get_logger(LOGGER)
_switch: Final = logging.getLogger(LOGGER)
T = TypeVar("T", bound=type)


def log_method_calls(agent: T) -> T:
    """Have all methods of the class told of; properties and what it inherits are not."""
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
    async def told(*args: Any, **kwargs: Any) -> Any:
        if not _switch.isEnabledFor(logging.DEBUG):
            return await method(*args, **kwargs)
        began = _log_entry(method, args)
        how = "left"
        try:
            return await method(*args, **kwargs)
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            _log_exit(method, began, how)

    return told


def _wrap_sync(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def told(*args: Any, **kwargs: Any) -> Any:
        if not _switch.isEnabledFor(logging.DEBUG):
            return method(*args, **kwargs)
        began = _log_entry(method, args)
        how = "left"
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            _log_exit(method, began, how)

    return told


def _log_entry(method: Callable[..., Any], args: tuple[Any, ...]) -> float:
    step = f"→ {method.__qualname__}"
    log.debug(step, given=[type(one).__name__ for one in args[1:]])
    return time.monotonic()


def _log_exit(method: Callable[..., Any], began: float, how: str) -> None:
    step = f"← {method.__qualname__}"
    log.debug(step, how=how, seconds=round(time.monotonic() - began, 6))
