"""The examples of docs/data.md run."""

import re
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from learning.functions.local_run import LocalRun, make_task
from support.data_files import write_mnist

from fedbus.learning.data import Partitioning
from fedbus.learning.data.partitioning import ALLOWED
from fedbus.learning.flower.private_api import set_process_identity

GUIDE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
FUNCTIONS, FLOWER_APP = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(autouse=True)
def mnist(data_dir: Path) -> None:
    write_mnist(data_dir / "mnist", [number % 10 for number in range(90)], test=20, size=28)


def test_the_functions_of_the_guide_learn(tmp_path: Path) -> None:
    task = make_task(tmp_path, FUNCTIONS, "[tool.fedbus.config]\nlr = 0.1\n")
    run = LocalRun(task, clients=3, rounds=3)
    assert run.metric("eval_accuracy")[-1] >= 0
    assert run.final is not None
    assert run.final["w"].any()


def test_the_flower_app_of_the_guide_gets_its_partition() -> None:
    names: dict[str, Any] = {}
    exec(FLOWER_APP, names)
    set_process_identity(1)
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    config: dict[str, bool | float | int | str] = {"partition-id": 1, "num-partitions": 3}
    reply = names["app"](message, Context(1, 1, node_config=config, state=RecordDict(), run_config={}))
    metrics = reply.content["metrics"]
    assert isinstance(metrics, MetricRecord)
    examples = metrics["num-examples"]
    assert isinstance(examples, int)
    assert 1 <= examples < 90


def test_the_guide_names_each_partition() -> None:
    table = GUIDE[GUIDE.index("## Partitions") :]
    assert [syntax for syntax, _ in ALLOWED if f"`{syntax}`" not in table] == []
    for text in re.findall(r"`((?:dirichlet|classes|sizes):[0-9a-z.:+]+)`", table):
        Partitioning.parse(text)
