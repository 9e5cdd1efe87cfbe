"""The limit of tasks that train at the same time on one device."""

import subprocess
import sys
from pathlib import Path

from fedbus.agents.client_manager.training_slots import TrainingSlots


def test_there_are_no_more_slots_than_the_limit(tmp_path: Path) -> None:
    slots = TrainingSlots(tmp_path, 2)
    first, second = slots.acquire("mnist-1"), slots.acquire("fashion-1")
    assert first
    assert second
    assert slots.acquire("cifar-1") is None
    assert sorted(slots.list_holders()) == ["fashion-1", "mnist-1"]


def test_a_released_slot_may_be_taken_by_another_task(tmp_path: Path) -> None:
    slots, others = TrainingSlots(tmp_path, 1), TrainingSlots(tmp_path, 1)
    slot = slots.acquire("mnist-1")
    assert slot
    assert others.acquire("fashion-1") is None
    slot.release()
    slot.release()  # a second call does nothing
    assert others.acquire("fashion-1")


HOLD = """
import signal, sys
from pathlib import Path
from fedbus.agents.client_manager.training_slots import TrainingSlots
slot = TrainingSlots(Path(sys.argv[1]), 1).acquire("mnist-1")
print("taken" if slot else "not taken", flush=True)
signal.pause()
"""


def test_a_killed_process_holds_no_slot(tmp_path: Path) -> None:
    slots = TrainingSlots(tmp_path, 1)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "taken\n"
        assert slots.acquire("fashion-1") is None
        process.kill()
    assert slots.acquire("fashion-1")
