"""What a profile changes in the configuration of a real device."""

from pathlib import Path
from typing import Any

import pytest
from support.federation import FED, tiny_task

from fedbus.app.composition.agents import AgentConfig, ClientConfig
from fedbus.app.composition.emulated_device import DRAWN_MESSAGES, EmulatedDevice, emulate_device
from fedbus.bus.credentials import BusAccess
from fedbus.contracts.client import ClientStart
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.run import RunPlan
from fedbus.simulation.profiles.conditions import Conditions
from fedbus.simulation.profiles.errors import ProfileError
from fedbus.simulation.profiles.schema import Profile


def profile_of(groups: dict[str, Any]) -> Profile:
    return Profile.model_validate({"groups": groups})


def emulate(
    groups: dict[str, Any], url: str = "nats://user:secret@nats.example:4333", **options: Any
) -> EmulatedDevice:
    device = emulate_device(url, "c1", profile_of(groups), **options)
    device.listener.close()
    return device


def test_agents_connect_to_the_proxy(tmp_path: Path) -> None:
    device = emulate_device("tls://user:secret@nats.example:4333", "c1", profile_of({"all": {"delay": 3}}))
    config = ClientConfig(
        AgentConfig("tls://user:secret@nats.example:4333", FED, tmp_path, tiny_task(tmp_path)),
        client_id("c1"),
    )
    port = device.listener.getsockname()[1]
    with device.listener:
        emulated = device.apply_to(config)
    assert emulated.agent_config.nats_url == f"tls://user:secret@127.0.0.1:{port}"
    assert emulated.agent_config.access.connect_options() == {"tls_hostname": "nats.example"}
    assert emulated.agent_config.process_config().bus_access == BusAccess(proxied_host="nats.example")
    assert device.server == ("nats.example", 4333)


async def test_trainer_gets_the_delays_of_its_run(tmp_path: Path) -> None:
    device = emulate({"all": {"delay": {"distribution": "uniform", "min-s": 1, "max-s": 5}}})
    config = ClientConfig(
        AgentConfig("nats://n:1", FED, tmp_path, tiny_task(tmp_path)),
        client_id("c1"),
        conditions=device.trainer_conditions,
    )
    start = ClientStart(task="tiny", client="c1", run="tiny-1", plan=RunPlan())
    conditions = (await config.trainer_config(start)).conditions
    assert conditions == device.trainer_conditions("tiny-1")
    simulated = Conditions(
        profile_of({"all": {"delay": {"distribution": "uniform", "min-s": 1, "max-s": 5}}}), ["c1"]
    )
    expected = [simulated.exchange("c1", number, sent_at=0.0).delay_s for number in range(DRAWN_MESSAGES)]
    assert list(conditions.delays_s) == expected
    assert device.trainer_conditions("tiny-2").delays_s != conditions.delays_s


def test_work_is_never_shorter_than_measured() -> None:
    conditions = emulate({"all": {"training": {"seconds": 2.0}}}).trainer_conditions("tiny-1")
    assert conditions.training.work_s(7, 0.5, 10) == 2.0
    assert conditions.training.work_s(7, 3.0, 10) == 3.0
    assert conditions.evaluation.work_s(7, 0.5, 10) == 0.5
    slow = emulate({"all": {"training": {"slowdown": 4}}}).trainer_conditions("tiny-1")
    assert (slow.training.work_s(0, 0.5, 10), slow.evaluation.work_s(0, 0.5, 10)) == (2.0, 2.0)


def test_work_by_samples() -> None:
    conditions = emulate(
        {"all": {"training": {"seconds-per-sample": 0.1, "slowdown": 2}}}
    ).trainer_conditions("tiny-1")
    assert conditions.training.work_s(0, 0.5, 10) == 2.0


def test_lost_messages_are_those_of_the_simulation() -> None:
    groups = {"all": {"loss": {"probability": 0.3, "then": "drop"}}}
    conditions = emulate(groups).trainer_conditions("tiny-1")
    simulated = Conditions(profile_of(groups), ["c1"])
    for number in range(50):
        lost = conditions.loses_message(number) or conditions.loses_reply(number)
        assert lost == simulated.exchange("c1", number, sent_at=0.0).is_lost


@pytest.mark.parametrize(
    ("groups", "options", "text"),
    [
        ({"slow": {}}, {"group": "fast"}, "the profile has no group 'fast'. Its groups are: slow"),
        ({"slow": {}}, {"url": "nats://a:1,nats://b:1"}, "is not the URL of one nats-server"),
        ({"slow": {"count": 1}}, {}, "Choose its group: slow"),
    ],
)
def test_device_that_a_profile_does_not_fit(
    groups: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ProfileError, match=text):
        emulate(groups, **options)


def test_group_of_a_device_is_the_one_that_was_chosen() -> None:
    groups = {"slow": {"share": 0.5, "delay": 9}, "fast": {}}
    assert emulate(groups, group="slow").conditions.group.delay is not None
    assert emulate(groups, group="").conditions.group.delay is None
