"""What an agent under test has received."""

from fedbus.bus.streams import consumer_name, stream_for
from fedbus.contracts.agent_names import AgentName
from support.federation import TASK, FederationHarness


async def has_consumed_all(fed: FederationHarness, owner: str, agent: AgentName) -> bool:
    """Return whether *agent* of *owner* has handled all messages to it that are stored."""
    name = consumer_name(owner, TASK, agent)
    info = await fed.bus._js.consumer_info(stream_for(fed.bus.fed, agent), name)
    return not info.num_pending and not info.num_ack_pending
