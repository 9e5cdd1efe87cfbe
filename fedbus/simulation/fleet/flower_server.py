"""The flower server of a simulated fleet: the real agent, with simulated model builders and checks of code."""

from fedbus.agents.flower_server.agent import FlowerServer
from fedbus.contracts.code import CheckCode, CodeChecked
from fedbus.contracts.flower_server import InitModel, ModelInitialised
from fedbus.contracts.message import Body
from fedbus.simulation.fleet.server_session import ARCHITECTURE, store_generation


class SimulatedFlowerServer(FlowerServer):
    """Builds first models and checks code without a process."""

    async def _init_model(self, request: InitModel) -> Body:
        artifact = await store_generation(self._models, 0, f"initial model of {request.code_version}")
        return ModelInitialised(artifact=artifact)

    async def _check_code(self, request: CheckCode) -> Body:  # noqa: ARG002
        return CodeChecked(architecture=ARCHITECTURE)
