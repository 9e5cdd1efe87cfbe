"""The processes of `fedbus up`."""

import os

import pytest

from fedbus.app.local.stack import thread_limits


@pytest.mark.parametrize(
    ("cores", "clients", "threads"), [(8, 3, "2"), (2, 3, "1"), (4, 1, "4"), (4, 0, "4")]
)
def test_clients_divide_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, clients: int, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert thread_limits(clients) == {"OMP_NUM_THREADS": threads}


def test_a_limit_of_the_user_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert thread_limits(3) == {}
