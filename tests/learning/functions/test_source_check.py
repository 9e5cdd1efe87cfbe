"""A wrong function is found in the source, with its line, before anything is imported."""

from pathlib import Path

import pytest

from fedbus.learning.functions.signatures import FunctionName
from fedbus.learning.functions.source_check import ModuleSource, SourceProblem, read_module_source

VALID = """
import numpy as np

def load(partition_id, num_partitions):
    return None

def train(weights, data, config):
    if not weights:
        return weights, {}, 0
    return weights, {"loss": 1.0}, 10

def evaluate(weights, data, config, state):
    return {"loss": 1.0}, 10
"""


def read(directory: Path, text: str) -> ModuleSource:
    file = directory / "functions.py"
    file.write_text(text)
    return read_module_source(file)


def problem(directory: Path, text: str) -> SourceProblem:
    source = read(directory, text)
    assert len(source.problems) == 1, source.problems
    return source.problems[0]


def test_a_valid_module_has_no_problems(tmp_path: Path) -> None:
    source = read(tmp_path, VALID)
    assert source.problems == ()
    assert source.functions == {FunctionName.LOAD, FunctionName.TRAIN, FunctionName.EVALUATE}


@pytest.mark.parametrize(
    ("old", "new", "line", "what", "advice"),
    [
        ("def train", "def trian", 1, "does not define `train`", "did you mean `trian`?"),
        (
            "def evaluate",
            "def score_model",
            1,
            "does not define `evaluate`",
            "add def evaluate(weights, data, config)",
        ),
        (
            "def train(weights, data, config)",
            "def train(weights, data)",
            7,
            "`train` cannot be called",
            "write def train",
        ),
        (
            "def train(weights, data, config)",
            "def train(weights, data, config, lr)",
            7,
            "missing a required argument: 'lr'",
            "a last parameter `state` is optional",
        ),
        (
            "def train(weights, data, config)",
            "def train(weights, data, config, *, lr)",
            7,
            "missing a required",
            "write def train",
        ),
        ("def train(", "async def train(", 7, "`train` is a coroutine function", "write def"),
        (
            'return weights, {"loss": 1.0}, 10',
            "return weights, 10",
            10,
            "`train` returns 2 values instead of (weights, metrics, num_examples)",
            "write return weights, metrics, num_examples",
        ),
        ('return weights, {"loss": 1.0}, 10', "return", 10, "`train` returns no (weights", "write return"),
        (
            'return {"loss": 1.0}, 10',
            'return {"loss": 1.0}',
            13,
            "`evaluate` returns no (metrics",
            "write return",
        ),
        (
            "def load(partition_id, num_partitions)",
            "def load(client)",
            4,
            "`load` cannot be called as fedbus calls it (missing a required argument: 'client')",
            "with any of the parameters captured, config, node_config, num_partitions, partition_id",
        ),
        (
            "config, state)",
            "state, config)",
            12,
            "its parameter 'state' comes before 'config'",
            "write def evaluate",
        ),
        ("def load", "class load: ...\ndef other", 4, "`load` is a class", "write def load"),
        ("import numpy as np", "import numpy as", 2, "is not Python", "invalid syntax"),
    ],
)
def test_a_problem_names_its_line_and_what_to_do(
    tmp_path: Path, old: str, new: str, line: int, what: str, advice: str
) -> None:
    found = problem(tmp_path, VALID.replace(old, new, 1))
    assert found.line == line
    assert what in found.what
    assert advice in found.advice


@pytest.mark.parametrize(
    "changed",
    [
        ("def train(weights, data, config)", "def train(model, samples, settings, state=None, *, seed=1)"),
        ("def train(weights, data, config)", "def train(*args, **kwargs)"),
        ("def train(weights, data, config)", "@decorator\ndef train(x)"),
        ("def load(partition_id, num_partitions)", "def load(node_config, captured, config)"),
        ("def load(partition_id, num_partitions)", "def load()"),
        ("def load(partition_id, num_partitions)", "def load(**values)"),
        ("def load(partition_id, num_partitions):\n    return None", "from other import load"),
        ("def load(partition_id, num_partitions):\n    return None", "load = make_load()"),
        ("def load(partition_id, num_partitions):\n    return None", "if True:\n    def load(): return None"),
        ("return weights, {}, 0", "return result"),
        ("return weights, {}, 0", "def inner():\n            return 1, 2\n        return inner()"),
        ("import numpy as np", "def predict(weights, inputs): return inputs"),
    ],
)
def test_every_valid_form_is_accepted(tmp_path: Path, changed: tuple[str, str]) -> None:
    assert read(tmp_path, VALID.replace(*changed, 1)).problems == ()


def test_names_of_a_star_import_are_not_missed(tmp_path: Path) -> None:
    assert read(tmp_path, "from other import *\n").problems == ()
