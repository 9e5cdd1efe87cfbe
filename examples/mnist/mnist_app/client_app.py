"""Training and evaluation on a client."""

import logging
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from mnist_app import data
from mnist_app.task import Net, evaluate, train

app = ClientApp()
log = logging.getLogger("mnist_app")
partitions: dict[tuple[object, ...], tuple[np.ndarray, np.ndarray]] = {}


@app.train()
def on_train(message: Message, context: Context) -> Message:
    config, settings = message.content["config"], context.run_config
    inputs, labels = add_captured(*own_partition(context), context)
    model = load_model(message)
    loss = train(
        model,
        inputs,
        labels,
        epochs=int(settings["local-epochs"]),
        batch_size=int(settings["batch-size"]),
        lr=float(config["lr"]),
        proximal_mu=float(config.get("proximal-mu", 0.0)),
    )
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(labels)})
    return reply(message, arrays=ArrayRecord(model.state_dict()), metrics=metrics)


@app.evaluate()
def on_evaluate(message: Message, context: Context) -> Message:
    number, of = partition_of(context)
    inputs, labels = data.evaluation_set(str(context.run_config["data"]), part=number, of=of)
    loss, accuracy = evaluate(load_model(message), inputs, labels)
    metrics = MetricRecord({"eval_loss": loss, "eval_accuracy": accuracy, "num-examples": len(labels)})
    return reply(message, metrics=metrics)


def load_model(message: Message) -> torch.nn.Module:
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model


def reply(message: Message, **records: ArrayRecord | MetricRecord) -> Message:
    return Message(content=RecordDict(dict(records)), reply_to=message)


def partition_of(context: Context) -> tuple[int, int]:
    """Return the number of this client, and the number of clients."""
    config = context.node_config
    return int(config.get("partition-id", 0)), int(config.get("num-partitions", 1))


def own_partition(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Return the training data of this client, which a process reads only once."""
    settings = context.run_config
    key = (*partition_of(context), settings["data"], settings["alpha"], settings["max-samples"])
    if key not in partitions:
        partitions.clear()  # a process that simulates many clients holds only one partition
        number, of = partition_of(context)
        partitions[key] = data.partition(
            number,
            of,
            data=str(settings["data"]),
            alpha=float(settings["alpha"]),
            max_samples=int(settings["max-samples"]),
        )
    return partitions[key]


def add_captured(inputs: np.ndarray, labels: np.ndarray, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Append the captured data of the device, if there are any."""
    file = Path(str(context.node_config.get("captured-data", "")))
    if not file.is_file():
        return inputs, labels
    with np.load(file, allow_pickle=False) as captured:
        new_inputs = captured["inputs"].astype(np.float32)
        new_labels = captured["labels"].astype(np.int64)
    if new_inputs.shape[1:] != inputs.shape[1:]:
        log.warning(
            "Ignoring captured data of shape %s: samples have shape %s",
            new_inputs.shape[1:],
            inputs.shape[1:],
        )
        return inputs, labels
    return np.concatenate([inputs, new_inputs]), np.concatenate([labels, new_labels])
