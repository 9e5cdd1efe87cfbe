"""Python source that several threads parse at the same time."""

import ast
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import pytest

from fedbus.common.ast_lock import NEEDS_LOCK, install_ast_lock

SOURCE = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }"


@contextmanager
def another_thread_parses_at_each_collection(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Collect garbage at each allocation of this thread, and let the thread of *pool* parse meanwhile."""
    this_thread, threshold, is_blocked = threading.get_ident(), gc.get_threshold(), False

    def parse_elsewhere(phase: str, info: dict[str, Any]) -> None:
        nonlocal is_blocked
        if threading.get_ident() != this_thread or phase != "start" or is_blocked:
            return
        try:
            pool.submit(ast.parse, SOURCE).result(timeout=0.5)
        except TimeoutError:
            is_blocked = True  # the lock works; or the machine is slow, and this test passes without it

    gc.callbacks.append(parse_elsewhere)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(parse_elsewhere)


@pytest.mark.parametrize("function", ["literal_eval", "parse"])
def test_two_threads_parse_at_the_same_time(function: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ast.parse, SOURCE).result()
        with another_thread_parses_at_each_collection(pool):
            getattr(ast, function)(SOURCE)


def test_two_threads_load_arrays_at_the_same_time() -> None:
    content = BytesIO()
    np.save(content, np.ones((2, 2), np.float32))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ast.parse, SOURCE).result()
        with another_thread_parses_at_each_collection(pool):
            content.seek(0)
            array = np.load(content)
    assert array.shape == (2, 2)


def test_parse_keeps_its_arguments_and_errors() -> None:
    assert isinstance(ast.parse("1", mode="eval"), ast.Expression)
    with pytest.raises(SyntaxError):
        ast.parse("1 +", "file.py")


@pytest.mark.skipif(not NEEDS_LOCK, reason="this version of Python needs no lock")
def test_the_lock_is_installed_once_by_the_import_of_fedbus() -> None:
    before = ast.parse
    install_ast_lock()
    assert ast.parse is before
    program = "import fedbus, ast; raise SystemExit(not hasattr(ast.parse, '__wrapped__'))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.skipif(not NEEDS_LOCK, reason="this version of Python needs no lock")
def test_a_fork_during_a_parse_leaves_the_lock_free() -> None:
    program = f"""
import fedbus, ast, gc, os, signal, sys, threading
inside, forked = threading.Event(), threading.Event()
def wait(phase, info):
    if sys._getframe(1).f_code.co_name == "parse":
        inside.set()
        forked.wait(0.5)
gc.callbacks.append(wait)
def parse():
    gc.set_threshold(1)
    ast.parse({SOURCE!r})
thread = threading.Thread(target=parse)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    ast.parse("1")
    os._exit(0)
forked.set()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
