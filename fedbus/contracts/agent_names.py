"""The names of the agents on the bus: in subjects, consumers, permissions and the ``ce-source`` header."""

from enum import StrEnum


class AgentName(StrEnum):
    """The name of an agent, or of a part of an agent that has its own consumer."""

    # server side
    SERVER_MANAGER = "server-manager"
    WORKFLOW_SCHEDULER = "workflow-scheduler"
    WORKFLOW_SCHEDULER_INPUTS = "workflow-scheduler-news"
    """The workflow scheduler's consumer of the events that its triggers depend on."""
    FLOWER_SERVER = "flower-server"
    FLOWER_SERVER_GRID = "flower-server-grid"
    """The consumer of a run's server session."""
    REGISTRAR = "registrar"
    TRAINING_MONITOR = "training-monitor"
    GATEWAY = "gateway"
    # one client
    CLIENT_MANAGER = "client-manager"
    FLOWER_CLIENT = "flower-client"
    TRAINER = "trainer"
    INFERENCE = "inference"
    DEVICE_MONITOR = "device-monitor"
    # a person or program with credentials of its own
    USER = "user"
