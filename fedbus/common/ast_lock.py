"""Parse Python in one thread at a time, where the interpreter does not support more.

Before Python 3.11.8, two threads in `ast.parse` at the same time may fail with "SystemError: AST constructor recursion
depth mismatch" (https://github.com/python/cpython/issues/106905): the parser keeps its depth in a variable of the
process, and the garbage collector, which may run in the parser, switches threads. `numpy.load` and
`inspect.signature` parse, too, so that this affects the code of tasks. `fedbus` installs the lock when it is imported.
"""

import ast
import functools
import os
import sys
from threading import RLock
from typing import Any, Final

NEEDS_LOCK: Final = sys.version_info < (3, 11, 8)


def install_ast_lock() -> None:
    """Let `ast.parse` of this process run in one thread at a time, if this version of Python needs it."""
    if not NEEDS_LOCK or hasattr(ast.parse, "__wrapped__"):
        return
    parse, lock = ast.parse, RLock()

    @functools.wraps(parse)
    def parse_alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return parse(*args, **kwargs)

    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    vars(ast)["parse"] = parse_alone
