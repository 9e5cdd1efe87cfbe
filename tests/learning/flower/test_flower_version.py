"""A version of Flower without a name that fedbus uses is one clear error when the library is opened."""

import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import flwr.app.message.message
import pytest
from flwr.app import Metadata
from flwr.app.message.typeddict import TypedDict
from flwr.serverapp.strategy import FedAvg

from fedbus.learning.flower import flower_version, private_api
from fedbus.learning.flower.flower_version import UnsupportedFlower


def import_private_api() -> None:
    """Execute the module again, without a change of the imported one."""
    runpy.run_path(str(private_api.__file__))


def test_a_missing_private_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(flwr.app.message.message, "make_message")
    with pytest.raises(UnsupportedFlower) as error:
        import_private_api()
    supported = flower_version.supported_versions()
    assert str(error.value) == (
        f"Flower {version('flwr')} has no flwr.app.message.message.make_message, which fedbus uses "
        f"(supported: flwr {supported}). Install a supported version: pip install 'flwr{supported}'"
    )


def test_a_missing_private_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FedAvg, "_check_and_log_replies")
    with pytest.raises(UnsupportedFlower, match=r"has no flwr\.\S+\.FedAvg\._check_and_log_replies, which"):
        import_private_api()


@pytest.mark.parametrize(
    ("owner", "name", "place"),
    [
        (TypedDict, "_data", r"flwr\.\S+\._SyncedDict\._data"),
        (Metadata, "_message_id", r"flwr\.\S+\.Metadata\._message_id"),
    ],
)
def test_a_missing_private_value_is_named(
    owner: Any, name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = owner.__init__

    def rename(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self.__dict__["renamed"] = self.__dict__.pop(name)

    monkeypatch.setattr(owner, "__init__", rename)
    with pytest.raises(UnsupportedFlower, match=f"has no {place}, which"):
        import_private_api()


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.supercore.task_identity", None)
    with pytest.raises(UnsupportedFlower, match=r"has no flwr\.supercore\.task_identity, which"):
        import_private_api()


def test_an_absent_flower_is_reported_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_not_found(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(flower_version, "version", raise_not_found)
    assert str(UnsupportedFlower("flwr")).startswith("Flower is not installed: ")


def test_the_supported_versions_come_from_the_requirements_of_fedbus() -> None:
    assert flower_version.supported_versions()
