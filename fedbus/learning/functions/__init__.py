"""The training library `functions`: plain functions over NumPy arrays, without Flower and without torch.

A task names one module with ``load``, ``train`` and ``evaluate``. Task code may import from this package:

    from fedbus.learning.functions import proximal_gradient
"""

from fedbus.learning.functions.proximal import proximal_gradient, proximal_term

__all__ = ["proximal_gradient", "proximal_term"]
