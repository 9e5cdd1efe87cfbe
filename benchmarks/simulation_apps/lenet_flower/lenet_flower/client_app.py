"""The client: the template of Flower's quick start, with one model for all messages of a process."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lenet_flower.task import LeNet, load_data, train

app = ClientApp()
model = LeNet()


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """Train the model of the message on the data of the client."""
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = load_data(int(context.node_config["partition-id"]))
    loss = train(model, images, labels, float(context.run_config["lr"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(images)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
