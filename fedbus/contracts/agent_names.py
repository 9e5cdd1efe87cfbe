"""The names of the agents on the bus: in subjects, consumers, permissions and the ``ce-source`` header."""

from enum import StrEnum


class AgentName(StrEnum):
    """Every name under which an agent publishes, or reads by a consumer of its own."""

    # server side
    SERVER_MANAGER = "server-manager"
    WORKFLOW_SCHEDULER = "workflow-scheduler"
    WORKFLOW_SCHEDULER_NEWS = "workflow-scheduler-news"
    """The workflow scheduler's consumer of what its triggers depend on."""
    FLOWER_SERVER = "flower-server"
    FLOWER_SERVER_GRID = "flower-server-grid"
    """The consumer of a run's ServerApp process."""
    REGISTRAR = "registrar"
    TRAINING_MONITOR = "training-monitor"
    GATEWAY = "gateway"
    # one client
    CLIENT_MANAGER = "client-manager"
    FLOWER_CLIENT = "flower-client"
    TRAINER = "trainer"
    INFERENCE = "inference"
    DEVICE_MONITOR = "device-monitor"
    # a person at a terminal
    USER = "user"
