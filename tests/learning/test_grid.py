"""Stock Flower strategies and apps, unmodified, over the Grid and a bus in memory."""

from pathlib import Path

import numpy as np
from learning.memory_bus import federation, model, server_app


async def test_fedavg_trains_and_every_round_is_told(tmp_path: Path) -> None:
    async with federation(tmp_path, server=server_app(evaluate_fn="centralized")) as fed:
        fed.add("c1", step=1, samples=30)
        fed.add("c2", step=2, samples=10)

        final = await fed.run(model())

    np.testing.assert_allclose(final["w"], np.full((4, 3), 2 * 1.25), rtol=1e-6)
    assert final["b"].dtype == np.float64
    assert [result.round for result in fed.results] == [0, 1, 2]
    assert [result.loss for result in fed.results] == [100.0, 99.0, 98.0]
    assert fed.results[1].participants == {"c1": 30, "c2": 10}
    assert fed.results[1].metrics["eval_loss"] == 10 - 1.25
    assert fed.results[2].metrics["train_seen"] == 2
