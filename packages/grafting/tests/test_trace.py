"""Which networks the engine takes, and how it refuses the others."""

import pytest
import torch
from torch import nn

from tenfold_grafting.graph import Normalise, UnsupportedOperationError, trace
from tenfold_grafting.networks import architecture, create_network
from tenfold_shared.errors import UserError


@pytest.mark.parametrize("name", ["cnn_b", "resnet2b", "resnet4b"])
def test_the_papers_networks_are_traced(name) -> None:
    model, shape = create_network(name).double().eval(), architecture(name).input_shape
    x = torch.rand(2, *shape).double()
    torch.testing.assert_close(trace(model, shape)(x), model(x).detach())


def test_refused_networks() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return torch.sigmoid(self.linear(x))

    with pytest.raises(UnsupportedOperationError, match=r"sigmoid.*after linear"):
        trace(Odd(), (3,))
    with pytest.raises(UnsupportedOperationError, match=r"MaxPool2d.*'1'"):
        trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)), (1, 4, 4))
    broken = nn.Sequential(nn.Linear(2, 2))
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"0\.weight are not finite"):
        trace(broken, (2,))
    with pytest.raises(UserError, match="positive standard deviations"):
        Normalise([0.0], [0.0])
    with pytest.raises(UserError, match="does not take inputs"):
        trace(nn.Sequential(nn.Linear(2, 2)), (3,))
