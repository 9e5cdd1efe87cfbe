"""Three numbers in, four out. All weights begin at zero."""

import torch


class Net(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 4)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)
