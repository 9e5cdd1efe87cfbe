"""A ClientApp that trains by adding one. It does not import torch, so a training process starts fast."""

import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    config, number = context.run_config, int(context.node_config.get("partition-id", 0))
    current = message.content.config_records["config"]["server-round"]
    if number == config["dies"] and current == config["dies-in"]:
        os._exit(3)
    if number == config["raises"]:
        raise ValueError("the run config makes this client fail")
    assert isinstance(current, int)
    while is_held(str(config["hold"]), current):
        time.sleep(0.01)
    time.sleep(float(config["slow-s"] if number == config["slow"] else config["pause-s"]))
    step = 1.0
    trained = message.content.array_records["arrays"].items()
    arrays = ArrayRecord({name: Array(array.numpy() + np.float32(step)) for name, array in trained})
    metrics = MetricRecord({"num-examples": 10 * (number + 1), "train_loss": 1.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def is_held(file: str, current_round: int) -> bool:
    """Return whether the trainings of this round wait: *file* has the first round that does."""
    return bool(file) and Path(file).exists() and current_round >= int(Path(file).read_text())


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
