"""Flower's error about inconsistent replies names the clients."""

from pathlib import Path

import pytest
from learning.flower.memory_bus import CLIENT_APP, initial_model, open_memory_federation, render_server_app

from fedbus.learning.flower.server_app_host import ServerAppFailed

WITHOUT_B = """        if context.node_config["samples"] == 9:
            del arrays["b"]
"""


@pytest.mark.parametrize("method", ["streaming", "stock"])
async def test_inconsistent_replies_name_the_client_and_the_difference(tmp_path: Path, method: str) -> None:
    client = CLIENT_APP.replace("        metrics = {", f"{WITHOUT_B}        metrics = {{", 1)
    server = render_server_app("FedAvg()")
    async with open_memory_federation(tmp_path, server=server, client=client) as federation:
        for name, samples in {"c1": 1, "c2": 9, "c3": 1}.items():
            federation.add(name, step=1.0, samples=samples)
        reason = r"differing: c2\. c2 lacks 'b' in the ArrayRecord '\w+', unlike c\d"
        with pytest.raises(ServerAppFailed, match=reason):
            await federation.run(initial_model(), aggregation={"method": method})
