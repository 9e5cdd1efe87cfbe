"""A linear model with three inputs and four outputs, whose weights are zero at first."""

import torch


class Net(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 4)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)
