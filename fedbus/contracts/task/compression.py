"""Compression of updates: the table ``[tool.fedbus.compression]``."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from fedbus.contracts.task.base import ConfigSection

CompressionMethod = Literal["none", "bf16", "int8", "top-k"]


class CompressionTable(ConfigSection):
    """How a client encodes its updates. The server side decodes them before the strategy gets them."""

    method: CompressionMethod = "none"
    """``bf16``: half the bytes of float32; ``int8``: a quarter; ``top-k``: only the largest changes. ``compression =
    "int8"`` is the short form of a table with this method."""
    share: float = Field(default=0.01, gt=0, le=0.5)
    """top-k: the share of an array's values that is sent."""
    error_feedback: bool = True
    """int8, top-k: the client adds what an encoding lost to its next update."""

    @model_validator(mode="before")
    @classmethod
    def _accept_method(cls, value: Any) -> Any:
        """Accept ``compression = "int8"``, the short form of a table with this *method*."""
        if not isinstance(value, str):
            return value
        if value not in get_args(CompressionMethod):
            raise ValueError(f"must be one of {', '.join(get_args(CompressionMethod))}, or a table")
        return {"method": value}

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        """Refuse a share for another method, which would have no effect."""
        if self.method != "top-k" and self.share != type(self).model_fields["share"].default:
            raise ValueError("`share` has no effect: it belongs to method 'top-k'")
        return self
