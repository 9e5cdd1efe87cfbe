"""Overrides of a task's run configuration, as values."""

import math

import pytest

from fedbus.contracts.run import Scalar
from fedbus.contracts.task.run_config import InvalidOverride, check_overrides

KNOWN: dict[str, Scalar] = {"lr": 0.5, "rounds": 3, "name": "resnet", "augment": True}


def test_an_integer_becomes_a_float_where_the_task_has_one() -> None:
    checked = check_overrides(KNOWN, {"lr": 1, "rounds": 2, "name": "vit", "augment": False})
    assert checked == {"lr": 1.0, "rounds": 2, "name": "vit", "augment": False}
    assert type(checked["lr"]) is float


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"lrr": 0.1}, "has no key `lrr`: did you mean `lr`?"),
        ({"lr": "0.1"}, "`lr` = '0.1': use a finite number; the task has 0.5"),
        ({"lr": math.nan}, "`lr` = nan: use a finite number; the task has 0.5"),
        ({"lr": -math.inf}, "`lr` = -inf: use a finite number; the task has 0.5"),
        ({"lr": True}, "`lr` = true: use a finite number; the task has 0.5"),
        ({"rounds": 2.0}, "`rounds` = 2.0: use an integer; the task has 3"),
        ({"rounds": True}, "`rounds` = true: use an integer; the task has 3"),
        ({"augment": 1}, "`augment` = 1: use true or false; the task has true"),
        (
            {"name": 5},
            "`name` = 5: use a text, in quotes inside the option's value: name='5'; the task has 'resnet'",
        ),
    ],
)
def test_an_override_that_does_not_fit_is_refused(overrides: dict[str, Scalar], reason: str) -> None:
    with pytest.raises(InvalidOverride) as caught:
        check_overrides(KNOWN, {"rounds": 1, **overrides})
    assert str(caught.value).endswith(reason)
