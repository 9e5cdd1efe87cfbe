"""The training library `functions`: plain functions over NumPy arrays, without Flower and without torch.

A task names one module with ``load``, ``train`` and ``evaluate``. Task code may import from this package:

    from fedbus.learning.functions import Update, proximal_gradient
"""

from fedbus.learning.functions.proximal import proximal_gradient, proximal_term
from fedbus.learning.functions.updates import Update

__all__ = ["Update", "proximal_gradient", "proximal_term"]
