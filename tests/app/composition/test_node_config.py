"""How a device's configuration is read, and what of it is refused before anything starts."""

import pytest

from fedbus.app.cli.options import parse_node_config
from fedbus.app.failures import CliError, ExitCode


@pytest.mark.parametrize("part", [0, 2])
def test_a_partition_id_below_the_number_is_accepted(part: int) -> None:
    given = f"partition-id={part} num-partitions=3 site=lab"
    assert parse_node_config(given) == {"partition-id": part, "num-partitions": 3, "site": "lab"}


@pytest.mark.parametrize(
    "given", ["partition-id=3 num-partitions=3", '{"partition-id": -1, "num-partitions": 3}']
)
def test_a_partition_id_out_of_range_is_refused(given: str) -> None:
    with pytest.raises(CliError, match="must be less than num-partitions=3") as refused:
        parse_node_config(given)
    assert refused.value.code is ExitCode.USAGE


@pytest.mark.parametrize(
    "given", ["", "partition-id=7", "num-partitions=3", "partition-id=first num-partitions=3"]
)
def test_other_node_configs_are_not_checked(given: str) -> None:
    parse_node_config(given)
