"""The catalogue: all message classes, and the agents that publish and consume them.

The decoder, the subjects of the streams, the durable consumers, the permissions and the documentation are
derived from these tables.
"""

from collections.abc import Mapping
from typing import Final

from fedbus.contracts import (
    champion,
    client,
    code,
    device,
    flower_server,
    round_messages,
    run,
    server,
    serving,
    state_recall,
    subjects,
)
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Body, Family, Message, Request, type_name
from fedbus.contracts.transition import Transition

MESSAGES: Final[tuple[type[Message], ...]] = (
    # requests to the server side
    server.HealthCheck,
    server.GetServerInfo,
    server.Enroll,
    state_recall.GetLastTransition,
    server.OpenRun,
    server.CancelRun,
    flower_server.InitModel,
    flower_server.StartServer,
    flower_server.StopServer,
    flower_server.FindServer,
    run.StartRun,
    run.StopRun,
    champion.PromoteModel,
    champion.RollBackModel,
    champion.StartLineage,
    code.LookForCode,
    code.RollOutCode,
    code.RevertCode,
    code.CheckCode,
    # between the agents of the server side
    flower_server.ServerStarted,
    flower_server.BeginTraining,
    flower_server.RoundFinished,
    flower_server.RunFinished,
    flower_server.RunFailed,
    flower_server.ServerLost,
    # to all clients
    server.UpdateReady,
    server.ModelPublished,
    code.CodePublished,
    server.ServerClosed,
    # to one client
    round_messages.RoundMessage,
    # from one client
    client.ClientJoined,
    client.ClientDeclined,
    client.RoundReply,
    client.FinTrain,
    client.FailTrain,
    client.Heartbeat,
    device.DeviceReport,
    code.CodeReady,
    code.CodeRefused,
    serving.ModelPrepared,
    serving.ModelShadowed,
    serving.ModelCanaried,
    serving.ModelCommitted,
    serving.ModelRejected,
    serving.ModelRolledBack,
    serving.CapturePaused,
    serving.CaptureResumed,
    serving.DataCounted,
    serving.DataChecked,
    serving.DriftDetected,
    # between the agents of one client
    client.ClientStart,
    client.RoundStarted,
    client.InferStart,
    client.InferUpdate,
    client.InferReady,
    client.InferRefused,
    # transitions of all lifecycles
    Transition,
)

BY_TYPE: Final[Mapping[str, type[Message]]] = {type_name(kind): kind for kind in MESSAGES}

NO_BLOB_AGENTS: Final = frozenset(
    {AgentName.GATEWAY, AgentName.DEVICE_MONITOR, AgentName.TRAINING_MONITOR, AgentName.REGISTRAR}
)
"""Agents without permission for blob subjects. Users have none either."""

SERVER_AGENTS: Final = (
    AgentName.SERVER_MANAGER,
    AgentName.WORKFLOW_SCHEDULER,
    AgentName.FLOWER_SERVER,
    AgentName.REGISTRAR,
)
CLIENT_AGENTS: Final = (
    AgentName.CLIENT_MANAGER,
    AgentName.FLOWER_CLIENT,
    AgentName.INFERENCE,
    AgentName.DEVICE_MONITOR,
)

PUBLISHES: Final[Mapping[AgentName, tuple[type[Message], ...]]] = {
    AgentName.SERVER_MANAGER: (
        server.UpdateReady,
        server.ModelPublished,
        code.CodePublished,
        server.ServerClosed,
        flower_server.BeginTraining,
        flower_server.InitModel,
        flower_server.StartServer,
        flower_server.StopServer,
        flower_server.FindServer,
        code.CheckCode,
        run.StartRun,
    ),
    AgentName.WORKFLOW_SCHEDULER: (server.OpenRun, server.CancelRun),
    AgentName.FLOWER_SERVER: (
        flower_server.ServerStarted,
        flower_server.RoundFinished,
        flower_server.RunFinished,
        flower_server.RunFailed,
        flower_server.ServerLost,
        round_messages.RoundMessage,
    ),
    AgentName.CLIENT_MANAGER: (
        server.Enroll,
        state_recall.GetLastTransition,
        server.GetServerInfo,
        server.HealthCheck,
        client.ClientDeclined,
        client.ClientStart,
        client.InferStart,
        client.InferUpdate,
        code.CodeReady,
        code.CodeRefused,
    ),
    AgentName.FLOWER_CLIENT: (client.FinTrain, client.FailTrain, client.Heartbeat),
    AgentName.TRAINER: (client.ClientJoined, client.RoundStarted, client.RoundReply),
    AgentName.INFERENCE: (
        client.InferReady,
        client.InferRefused,
        serving.ModelPrepared,
        serving.ModelShadowed,
        serving.ModelCanaried,
        serving.ModelCommitted,
        serving.ModelRejected,
        serving.ModelRolledBack,
        serving.CapturePaused,
        serving.CaptureResumed,
        serving.DataCounted,
        serving.DataChecked,
        serving.DriftDetected,
    ),
    AgentName.DEVICE_MONITOR: (device.DeviceReport,),
    AgentName.USER: (
        run.StartRun,
        run.StopRun,
        champion.PromoteModel,
        champion.RollBackModel,
        champion.StartLineage,
        code.LookForCode,
        code.RollOutCode,
        code.RevertCode,
    ),
}
"""The messages that each agent publishes, without the transitions of its entities."""

SUBSCRIBES: Final[Mapping[AgentName, tuple[type[Message], ...]]] = {
    AgentName.SERVER_MANAGER: (
        flower_server.ServerStarted,
        flower_server.RoundFinished,
        flower_server.RunFinished,
        flower_server.RunFailed,
        flower_server.ServerLost,
        client.ClientJoined,
        client.FailTrain,
        code.CodeReady,
        code.CodeRefused,
    ),
    AgentName.FLOWER_SERVER_GRID: (
        flower_server.BeginTraining,
        client.ClientJoined,
        client.RoundReply,
        client.FailTrain,
    ),
    AgentName.WORKFLOW_SCHEDULER_INPUTS: (
        serving.DataCounted,
        serving.DataChecked,
        serving.DriftDetected,
        code.CodePublished,
    ),
    AgentName.CLIENT_MANAGER: (
        server.UpdateReady,
        server.ModelPublished,
        code.CodePublished,
        client.FinTrain,
        client.FailTrain,
        client.InferReady,
        client.InferRefused,
        serving.ModelRolledBack,
    ),
    AgentName.FLOWER_CLIENT: (client.ClientStart, client.RoundStarted, server.ServerClosed),
    AgentName.TRAINER: (round_messages.RoundMessage,),
    AgentName.INFERENCE: (client.InferStart, client.InferUpdate),
}
"""The messages that each agent consumes from the event stream."""

FOLLOWS_LIFECYCLES: Final[Mapping[AgentName, str]] = {AgentName.WORKFLOW_SCHEDULER: "server"}
"""The kind of lifecycle whose transitions an agent consumes."""

CLIENT_CONSUMERS: Final = (
    AgentName.CLIENT_MANAGER,
    AgentName.FLOWER_CLIENT,
    AgentName.TRAINER,
    AgentName.INFERENCE,
)
"""The agents of a client that have durable consumers. The server manager creates them when the client enrolls."""


def stream_subjects(fed: FederationId) -> list[str]:
    """Return the subjects of the event stream: all durable messages, and no requests."""
    return sorted(
        subjects.wildcard_for(fed, kind)
        for kind in MESSAGES
        if kind.durable and kind.family is not Family.LIFE
    )


def last_value_subjects(fed: FederationId) -> list[str]:
    """Return the subjects of the device stream, which stores the last message of each device."""
    return sorted(subjects.wildcard_for(fed, kind) for kind in MESSAGES if kind.keeps_last_value)


def subscribed_subjects(fed: FederationId, agent: AgentName, *, task: str, client: str = "*") -> list[str]:
    """Return the subjects that *agent* consumes for one *task*, and for one *client* if it is an agent of a client."""
    if agent in FOLLOWS_LIFECYCLES:
        return [subjects.lifecycle(fed, FOLLOWS_LIFECYCLES[agent], task)]
    return [subjects.wildcard_for(fed, kind, task=task, client=client) for kind in SUBSCRIBES[agent]]


def requests_answered_by(agent: str) -> list[type[Request[Body]]]:
    """Return the requests that *agent* answers."""
    return [kind for kind in MESSAGES if issubclass(kind, Request) and kind.responder == agent]
