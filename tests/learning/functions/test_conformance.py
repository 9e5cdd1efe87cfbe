"""The library functions passes the suite of training libraries."""

from pathlib import Path

from fedbus.learning.conformance import FAILS, LibrarySuite

PYPROJECT = """
[tool.fedbus]
library = "functions"
functions = "{package}.functions"
"""

FUNCTIONS = f"""
import numpy as np

def initial(config):
    return {{"w": np.zeros(3, np.float32)}}

def load(partition_id):
    return partition_id

def train(weights, number, config, state):
    if number == {FAILS}:
        raise RuntimeError("no data")
    state["count"] = state.get("count", 0) + 1
    weights["w"] += number + 1
    return weights, {{"loss": 1 / (number + 1), "count": state["count"]}}, 30 if number == 0 else 10

def evaluate(weights, number, config):
    return {{"loss": 10 - weights["w"].mean()}}, 5
"""


class TestFunctions(LibrarySuite):
    library = "functions"

    def write_app(self, directory: Path, package: str) -> None:
        (directory / package).mkdir()
        (directory / "pyproject.toml").write_text(PYPROJECT.format(package=package))
        (directory / package / "__init__.py").touch()
        (directory / package / "functions.py").write_text(FUNCTIONS)
