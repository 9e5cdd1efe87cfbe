"""Aggregation: the table ``[tool.fedbus.aggregation]``."""

from enum import StrEnum
from typing import Any, Final, Literal, Self, get_args

from pydantic import Field, model_validator

from fedbus.contracts.task.base import ConfigSection

Method = Literal["streaming", "stock"]


class StrategyName(StrEnum):
    """The aggregation strategies of the library `functions`."""

    FEDAVG = "fedavg"
    FEDPROX = "fedprox"
    FEDADAM = "fedadam"
    FEDMEDIAN = "fedmedian"
    TRIMMED_MEAN = "trimmed-mean"
    KRUM = "krum"


_PARAMETERS: Final = {
    StrategyName.FEDAVG: set[str](),
    StrategyName.FEDPROX: {"proximal_mu"},
    StrategyName.FEDADAM: {"eta", "beta_1", "beta_2", "tau"},
    StrategyName.FEDMEDIAN: set[str](),
    StrategyName.TRIMMED_MEAN: {"trim_share"},
    StrategyName.KRUM: {"malicious_clients", "select_clients"},
}
"""The parameters of each strategy, by field name."""


class AggregationTable(ConfigSection):
    """How the updates of a round become the next model. *method* applies to `flower`, all other keys to `functions`."""

    method: Method = "streaming"
    """``streaming``: add updates to the sum as they arrive, if the strategy computes a weighted mean. ``stock``: use
    the strategy's own aggregation."""
    strategy: StrategyName = StrategyName.FEDAVG
    """``fedavg``, ``fedprox``, ``fedadam``, ``fedmedian``, ``trimmed-mean`` or ``krum``. A module with a function
    ``aggregate`` aggregates itself."""
    proximal_mu: float = Field(default=0.1, ge=0)
    """FedProx: the factor of the proximal term. ``train`` finds it in its config."""
    eta: float = Field(default=0.1, gt=0)
    """FedAdam: the learning rate of the server."""
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    """FedAdam: the decay of the first moment."""
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    """FedAdam: the decay of the second moment."""
    tau: float = Field(default=1e-3, gt=0)
    """FedAdam: the degree of adaptivity. A smaller value adapts more."""
    trim_share: float = Field(default=0.2, ge=0, lt=0.5)
    """Trimmed mean: the share of updates that is cut off at each end."""
    malicious_clients: int = Field(default=0, ge=0)
    """Krum: the number of clients that may be malicious."""
    select_clients: int = Field(default=1, ge=1)
    """Krum: the number of updates that are selected and averaged. More than 1: multi-Krum."""
    fraction_train: float = Field(default=1.0, gt=0, le=1)
    """The share of the connected clients that train in a round, chosen at random."""
    fraction_evaluate: float = Field(default=1.0, ge=0, le=1)
    """The share of the connected clients that evaluate the new model after a round. 0: none."""
    min_clients: int = Field(default=1, ge=1)
    """The minimum number of clients in a round. With fewer connected clients, the round waits for `recruit-s`, and then
    the run fails."""

    @model_validator(mode="before")
    @classmethod
    def _accept_method(cls, value: Any) -> Any:
        """Accept ``aggregation = "stock"``, the short form of a table with this *method*."""
        if not isinstance(value, str):
            return value
        if value not in get_args(Method):
            raise ValueError(f"must be one of {', '.join(get_args(Method))}, or a table")
        return {"method": value}

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        """Refuse a parameter of another strategy, which would have no effect."""
        for strategy, names in _PARAMETERS.items():
            for name in sorted(names - _PARAMETERS[self.strategy]):
                # not `model_fields_set`: a table that has been serialised sets all of them
                if getattr(self, name) != type(self).model_fields[name].default:
                    key = name.replace("_", "-")
                    raise ValueError(f"`{key}` has no effect: it belongs to strategy {strategy.value!r}")
        return self
