"""Aggregation: the table ``[tool.fedbus.aggregation]``."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

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


class AggregationMode(StrEnum):
    """When a run aggregates, and what it does with updates of older models."""

    SYNC = "sync"
    DEADLINE = "deadline"
    BUFFERED = "buffered"
    ASYNC = "async"


class StalenessFunction(StrEnum):
    """The weight of an update by its staleness *s*: the number of aggregations since its client got the model.

    Xie et al., "Asynchronous Federated Optimization", 2019, https://arxiv.org/abs/1903.03934, section 5.2.
    """

    CONSTANT = "constant"
    POLYNOMIAL = "polynomial"
    HINGE = "hinge"


LateUpdates = Literal["merge", "drop"]

_PARAMETERS: Final = {
    StrategyName.FEDAVG: set[str](),
    StrategyName.FEDPROX: {"proximal_mu"},
    StrategyName.FEDADAM: {"eta", "beta_1", "beta_2", "tau"},
    StrategyName.FEDMEDIAN: set[str](),
    StrategyName.TRIMMED_MEAN: {"trim_share"},
    StrategyName.KRUM: {"malicious_clients", "select_clients"},
}
"""The parameters of each strategy, by field name."""

MODE_FIELDS: Final = frozenset(
    {"mode", "deadline_s", "min_updates", "late", "buffer_size", "alpha"}
    | {"staleness", "staleness_a", "staleness_b", "max_staleness"}
)
"""The fields of the aggregation mode, which all libraries but `flower-superlink` have."""


class AggregationTable(ConfigSection):
    """How the updates of a round become the next model: `strategy` and its parameters are those of the library
    `functions`, `method` is for `flower`. See [aggregation modes](aggregation.md).
    """

    mode: AggregationMode = AggregationMode.SYNC
    """When a run aggregates. ``sync``: when all clients have answered. ``deadline``: at the latest after `deadline-s`.
    ``buffered``: after each `buffer-size` updates, while the clients train continuously. ``async``: after each
    update."""
    deadline_s: float = Field(default=60.0, gt=0)
    """`deadline`: the time after which a round ends with the updates that it has, at least `min-updates`."""
    min_updates: int = Field(default=1, ge=1)
    """`deadline`: the number of updates without which the deadline does not end a round."""
    late: LateUpdates = "merge"
    """`deadline`: ``merge`` a late update into the next round, with a weight by its staleness, or ``drop`` it."""
    buffer_size: int = Field(default=10, ge=1)
    """`buffered`: the number of updates in an aggregation."""
    alpha: float = Field(default=0.6, gt=0, le=1)
    """`async`: the share of an update without staleness in the next model."""
    staleness: StalenessFunction = StalenessFunction.POLYNOMIAL
    """The weight of an update of a model that is *s* aggregations old. ``polynomial``: (1 + s)^-a. ``hinge``: 1 up to
    `staleness-b`, then 1 / (a · (s - b) + 1). ``constant``: 1."""
    staleness_a: float | None = Field(default=None, gt=0)
    """*a* of the weight. Default: 0.5 for ``polynomial``, which is 1 / √(1 + s), and 10 for ``hinge``."""
    staleness_b: int = Field(default=4, ge=0)
    """*b* of ``hinge``."""
    max_staleness: int | None = Field(default=None, ge=0)
    """The staleness above which an update is dropped. Default: no limit."""

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

    @property
    def merges_late(self) -> bool:
        """Whether the update of an older model can be a part of an aggregation."""
        drops = self.mode is AggregationMode.DEADLINE and self.late == "drop"
        return self.mode is not AggregationMode.SYNC and not drops

    def override(self, values: Mapping[str, bool | int | float | str]) -> Self:
        """Return the table with the *values* of a run, by key.

        Raises:
            ValueError: a key is unknown, or a value is invalid. The text is one line.

        """
        own = {field.alias or name: getattr(self, name) for name, field in type(self).model_fields.items()}
        try:
            return type(self).model_validate({**own, **values}) if values else self
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                known = ", ".join(
                    sorted(field.alias or name for name, field in type(self).model_fields.items())
                )
                raise ValueError(
                    f"`{key}` is not a key of [tool.fedbus.aggregation]. Use one of {known}"
                ) from None
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"`{key}` = {values.get(key)!r}: {reason}" if key else reason) from None

    @classmethod
    def check_overrides(cls, values: Mapping[str, bool | int | float | str]) -> None:
        """Check keys and values for any task. Raises ValueError as `override` does."""
        for key, value in values.items():
            name = key.replace("-", "_")
            owners = [strategy for strategy, names in _PARAMETERS.items() if name in names]
            cls(strategy=owners[0] if owners else StrategyName.FEDAVG).override({key: value})

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
