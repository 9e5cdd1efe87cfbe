"""The examples of docs/libraries.md run."""

import re
import tomllib
from pathlib import Path

import numpy as np

from fedbus.contracts.task.aggregation import AggregationTable, StrategyName
from fedbus.contracts.task.task import TaskTable
from fedbus.learning.functions.signatures import SHAPES

from .local_run import LocalRun, make_task

DOCS = Path(__file__).parents[3] / "docs"
GUIDE = (DOCS / "libraries.md").read_text()
MODES = (DOCS / "aggregation.md").read_text()
CHAPTER = GUIDE[GUIDE.index("## `functions`") : GUIDE.index("## `flower-superlink`")]

MY_DATA = """

def my_data(partition_id, num_partitions):
    random = np.random.default_rng(partition_id)
    inputs = random.normal(size=(100, 4))
    return inputs, inputs @ np.array([1.0, 2.0, 3.0, 4.0]) + 5.0
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", CHAPTER, re.DOTALL)


def test_the_functions_of_the_guide_learn(tmp_path: Path) -> None:
    (functions, *_) = blocks("python")
    task = make_task(tmp_path, functions + MY_DATA, "[tool.fedbus.config]\nlocal-epochs = 20\nlr = 0.1\n")
    run = LocalRun(task, rounds=5)
    assert run.final is not None
    np.testing.assert_allclose(run.final["coef"], [1, 2, 3, 4], atol=0.05)
    np.testing.assert_allclose(run.final["bias"], [5], atol=0.05)
    assert run.metric("eval_loss")[-1] < 0.01


def test_the_tables_of_the_guide_are_valid() -> None:
    for block in blocks("toml"):
        TaskTable.model_validate(tomllib.loads(block)["tool"]["fedbus"])


def test_the_guide_names_each_function_and_strategy() -> None:
    assert [name for name in SHAPES if f"| `{name}` |" not in CHAPTER] == []
    assert [name for name in StrategyName if f"| `{name.value}`" not in CHAPTER] == []
    keys = {str(field.alias) for field in AggregationTable.model_fields.values()} - {"method", "strategy"}
    assert [key for key in sorted(keys) if f"`{key}`" not in CHAPTER + MODES] == []
