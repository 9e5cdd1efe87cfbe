"""The settings of a simulation."""

from pathlib import Path

import pytest
from simulation.tiny_tasks import write_task

from fedbus.simulation.settings import BadSettings, SimulationSettings, client_name


def test_clients_have_names_in_the_order_of_their_partitions(tmp_path: Path) -> None:
    settings = SimulationSettings(task=write_task(tmp_path, "functions"), clients=12_000)
    assert settings.client_names == sorted(settings.client_names)
    assert client_name(7, 10) == "client-0007"
    assert client_name(7, 12_000) == "client-00007"
    assert settings.shared_node_config["num-partitions"] == 12_000


@pytest.mark.parametrize(("name", "value"), [("clients", 0), ("cohort", 11), ("workers", 0), ("rounds", -1)])
def test_settings_name_what_is_wrong(tmp_path: Path, name: str, value: int) -> None:
    task = write_task(tmp_path, "functions")
    with pytest.raises(BadSettings, match=f"{name}.*{value}"):
        SimulationSettings(**{"task": task, "clients": 10, name: value})  # type: ignore[arg-type]  # a value of any field
