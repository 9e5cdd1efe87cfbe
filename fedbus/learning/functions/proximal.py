"""FedProx's proximal term, for training in plain NumPy.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, https://arxiv.org/abs/1812.06127. A client
minimises ``F(w) + mu / 2 · ‖w - w_global‖²``, so each gradient step adds ``mu · (w - w_global)``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedbus.learning.functions.updates import check_same_arrays

Array = np.ndarray[Any, Any]


def proximal_term(
    weights: Mapping[str, Array], global_weights: Mapping[str, Array], proximal_mu: float
) -> float:
    """Return ``mu / 2 · ‖w - w_global‖²`` over all arrays of *weights*: add it to the loss.

    Raises:
        ValueError: the arrays differ in their names or shapes.

    """
    check_same_arrays(weights, global_weights)
    squares = (
        np.square(np.subtract(array, global_weights[name], dtype=np.float64)).sum()
        for name, array in weights.items()
    )
    return float(proximal_mu / 2 * sum(squares))


def proximal_gradient(
    weights: Mapping[str, Array], global_weights: Mapping[str, Array], proximal_mu: float
) -> dict[str, Array]:
    """Return ``mu · (w - w_global)`` for each array, in its shape and dtype: add it to the gradient.

    Raises:
        ValueError: the arrays differ in their names or shapes.

    """
    check_same_arrays(weights, global_weights)
    return {
        name: (proximal_mu * (array - global_weights[name])).astype(array.dtype, copy=False)
        for name, array in weights.items()
    }
