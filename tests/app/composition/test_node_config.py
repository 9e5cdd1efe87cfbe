"""Parsing and validation of the node config of a device."""

import pytest

from fedbus.app.cli.options import parse_node_config
from fedbus.app.failures import CliError, ExitCode


@pytest.mark.parametrize("partition", [0, 2])
def test_a_partition_id_below_the_number_is_accepted(partition: int) -> None:
    text = f"partition-id={partition} num-partitions=3 site=lab"
    assert parse_node_config(text) == {"partition-id": partition, "num-partitions": 3, "site": "lab"}


@pytest.mark.parametrize(
    "text", ["partition-id=3 num-partitions=3", '{"partition-id": -1, "num-partitions": 3}']
)
def test_a_partition_id_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(CliError, match="must be less than num-partitions=3") as error:
        parse_node_config(text)
    assert error.value.code is ExitCode.USAGE


@pytest.mark.parametrize(
    "text", ["", "partition-id=7", "num-partitions=3", "partition-id=first num-partitions=3"]
)
def test_other_node_configs_are_not_checked(text: str) -> None:
    parse_node_config(text)
