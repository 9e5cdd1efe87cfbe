"""The data that a transition may change. mypy checks the types in the code, the table checks each transition."""

from datetime import UTC, datetime
from typing import Any, get_type_hints

import pytest

from fedbus.contracts.client import CLIENT, ClientChanges, ClientEvent, FlClientChanges, InferenceChanges
from fedbus.contracts.code import CodeChanges
from fedbus.contracts.examples import FACTS, MODEL, PLAN, RESULT
from fedbus.contracts.lifecycle import NO_CHANGES, AnyLifecycle, IllegalChange
from fedbus.contracts.message import LifecycleData
from fedbus.contracts.run import RUN, RunChanges, RunEvent
from fedbus.contracts.scheduling import ScheduleChanges
from fedbus.contracts.server import SERVER, ServerChanges, ServerData, ServerEvent
from fedbus.contracts.transition import LIFECYCLES

CHANGES: dict[str, Any] = {
    "server": ServerChanges,
    "code": CodeChanges,
    "schedule": ScheduleChanges,
    "run": RunChanges,
    "client": ClientChanges,
    "fl_client": FlClientChanges,
    "inference": InferenceChanges,
}
MNIST = ServerData(task="mnist", model=MODEL)

each_lifecycle = pytest.mark.parametrize("lifecycle", LIFECYCLES.values(), ids=lambda one: one.kind)


def example(lifecycle: AnyLifecycle) -> LifecycleData:
    return next(one for one in FACTS if one.kind == lifecycle.kind)


@each_lifecycle
def test_changes_have_the_types_of_the_data(lifecycle: AnyLifecycle) -> None:
    of_data = get_type_hints(lifecycle.data, include_extras=True)
    of_changes = get_type_hints(CHANGES[lifecycle.kind], include_extras=True)
    assert of_changes == {name: of_data.get(name) for name in of_changes}


@each_lifecycle
def test_some_event_changes_each_field_that_may_change(lifecycle: AnyLifecycle) -> None:
    changed = {name for names in lifecycle.changes.values() for name in names}
    assert changed == set(get_type_hints(CHANGES[lifecycle.kind]))


@each_lifecycle
def test_the_key_of_an_entity_never_changes(lifecycle: AnyLifecycle) -> None:
    data = example(lifecycle)
    for event, names in lifecycle.changes.items():
        changed = lifecycle.change(event, data, {name: getattr(data, name) for name in names})
        assert changed.key == data.key
        assert {"kind", "task", "client"}.isdisjoint(names)


@each_lifecycle
def test_an_event_may_change_only_the_fields_of_its_table(lifecycle: AnyLifecycle) -> None:
    data = example(lifecycle)
    for event in lifecycle.events:
        for name in lifecycle.data.model_fields:
            changes = {name: getattr(data, name)}
            if name in lifecycle.changes.get(event, ()):
                assert lifecycle.change(event, data, changes) == data
            else:
                with pytest.raises(IllegalChange, match=f"event {event} may not change {name}"):
                    lifecycle.change(event, data, changes)


def test_a_change_does_not_modify_the_old_data() -> None:
    changed = SERVER.change(ServerEvent.ROUND_FINISHED, MNIST, {"round": 3, "last": RESULT})
    assert (changed.round, changed.last, changed.model) == (3, RESULT, MODEL)
    assert (MNIST.round, MNIST.last) == (0, None)


def test_without_changes_the_data_are_the_same_object() -> None:
    assert SERVER.change(ServerEvent.RUN_FAILED, MNIST, NO_CHANGES) is MNIST
    assert SERVER.change(ServerEvent.RUN_FAILED, MNIST, {}) is MNIST


def test_an_unknown_field_is_rejected() -> None:
    with pytest.raises(
        IllegalChange, match="model_ready changes code_versoin, which is not a field of the data"
    ):
        SERVER.change(ServerEvent.MODEL_READY, MNIST, {"code_versoin": "x"})  # type: ignore[typeddict-unknown-key]


def test_a_value_of_the_wrong_type_is_rejected() -> None:
    with pytest.raises(IllegalChange, match="round_finished sets round to a wrong value: Input should be"):
        SERVER.change(ServerEvent.ROUND_FINISHED, MNIST, {"round": "not a number"})  # type: ignore[typeddict-item]


def test_a_value_is_not_converted() -> None:
    with pytest.raises(IllegalChange, match="sets round to a wrong value"):
        SERVER.change(ServerEvent.ROUND_FINISHED, MNIST, {"round": "3"})  # type: ignore[typeddict-item]


def test_an_invalid_id_is_rejected() -> None:
    with pytest.raises(IllegalChange, match="sets run to a wrong value"):
        CLIENT.change(
            ClientEvent.CLIENT_START, CLIENT.data(task="mnist", client="c1"), {"run": "no id, with a blank"}
        )


def test_a_finished_round_may_not_change_the_champion() -> None:
    with pytest.raises(
        IllegalChange, match="round_finished may not change seal; it may change: checkpoint, co"
    ):
        SERVER.change(ServerEvent.ROUND_FINISHED, MNIST, {"seal": None})


def test_an_event_of_another_lifecycle_is_not_allowed() -> None:
    run = RUN.data(task="mnist", run="mnist-1", plan=PLAN, requested_at=datetime.now(UTC))
    assert not SERVER.allows(SERVER.initial, RunEvent.REQUESTED)  # type: ignore[arg-type]
    with pytest.raises(IllegalChange, match="cancelled may not change promoted; it may change: nothing"):
        RUN.change(RunEvent.CANCELLED, run, {"promoted": False})
