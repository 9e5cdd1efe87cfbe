"""Training and evaluation on a client."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbus.learning.data import ClientDataset, client_data
from scaffold_app import scaffold
from scaffold_app.model import batches, evaluate, make_model, to_tensors

app = ClientApp()


@app.train()
def on_train(message: Message, context: Context) -> Message:
    config = context.run_config
    inputs, labels = to_tensors(load_data(context).train)
    model = load_model(message)
    records = scaffold.train(
        model,
        batches(inputs, labels, size=int(config["batch-size"]), epochs=int(config["local-epochs"])),
        float(config["lr"]),
        message,
        context,
    )
    loss, _ = evaluate(model, inputs, labels)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(labels)})
    return Message(RecordDict({**records, "metrics": metrics}), reply_to=message)


@app.evaluate()
def on_evaluate(message: Message, context: Context) -> Message:
    inputs, labels = to_tensors(load_data(context).test)
    loss, accuracy = evaluate(load_model(message), inputs, labels)
    metrics = MetricRecord({"eval_loss": loss, "eval_accuracy": accuracy, "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def load_model(message: Message) -> nn.Module:
    state_dict = message.content["arrays"].to_torch_state_dict()
    model = make_model(state_dict["1.weight"].shape[1])
    model.load_state_dict(state_dict)
    return model


def load_data(context: Context) -> ClientDataset:
    """Return the samples of this client: by default, those of two classes."""
    config = context.run_config
    return client_data(str(config["data"]), context.node_config, partition=str(config["partition"]))
