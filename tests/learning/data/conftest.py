"""Each test has its own FEDBUS_HOME, whose cache is empty, and its own folder of data sets."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    monkeypatch.setenv("FEDBUS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDBUS_DATA_DIR", str(directory))
    return directory
