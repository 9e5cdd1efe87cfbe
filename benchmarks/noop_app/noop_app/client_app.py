"""A client that returns the arrays that it received."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from noop_app.size import work

app = ClientApp()


@app.train()
def on_train(message: Message, context: Context) -> Message:  # noqa: ARG001  # Flower's signature
    work()
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)
