"""Which networks the engine takes, and how it refuses the others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Written(nn.Module):
    """A forward that is written down with its layers: two convolutions of 2 x 4 x 4 maps, linear layers, others."""

    def __init__(self, forward: Callable[["Written", Tensor], Tensor]):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1)
        self.linear, self.head = nn.Linear(32, 3), nn.Linear(4, 3)
        self.norm = nn.BatchNorm2d(2)
        self.norm.running_mean.fill_(0.5)
        self.drop, self.relu = nn.Dropout(), nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2, divisor_override=1)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def again(m: Written, change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A change of a layer's output, and the output itself once more."""
    y = m.conv1(x)
    return m.linear((m.conv2(change(y)) + y).flatten(1))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.linear(F.pad(x, (1, 1, 0, 0), value=1.0)[:, :, :, 1:5].flatten(1)), "pads with constant 1"),
        (lambda m, x: m.linear(F.pad(x, (1, 1, 1, 1), "reflect").flatten(1)), "pads with reflect"),
        (lambda m, x: m.linear(F.pad(x, (-1, 1, 0, 0)).flatten(1)), r"pads by \(-1, 1, 0, 0\)"),
        (lambda m, x: m.linear(F.pad(x, (1, 0)).flatten(1)), r"pads by \(1, 0\)"),
        (lambda m, x: m.linear(x.flatten(1))[:, [2, 1, 0]], "calls getitem"),
        (lambda m, x: m.linear(m.pool(x).flatten(1)), "divisor_override"),
        (lambda m, x: m.linear(F.avg_pool2d(x, 2, divisor_override=1).flatten(1)), "divisor_override"),
        (lambda m, x: again(m, m.relu, x), "overwrites, in place"),
        (lambda m, x: again(m, lambda y: y.relu_(), x), "overwrites, in place"),
        (lambda m, x: again(m, lambda y: F.relu(y, inplace=True), x), "overwrites, in place"),
        (lambda m, x: again(m, lambda y: y.add_(m.conv2(x)), x), "overwrites, in place"),
        (lambda m, x: m.head(x).flatten(1), "no vectors"),
        (lambda m, x: m.head(x.view(-1, 4)), r"shape \(2, 4, 4\) the shape \(4,\)"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(forward, message: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=message):
        trace(Written(forward), (2, 4, 4))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: again(m, lambda y: m.norm(m.drop(y)), x),
        lambda m, x: m.linear(m.norm(m.drop(m.conv1(x))).flatten(1)),
        lambda m, x: m.linear(m.relu(m.conv1(x)).view(x.shape[0], -1)),
        lambda m, x: m.linear(torch.flatten(m.relu(m.conv1(x)), start_dim=1)),
        lambda m, x: m.linear((m.conv1(x).relu_() + x).reshape(x.size(0), -1)),
        lambda m, x: m.linear(F.pad(m.conv1(x), pad=(0, 0, 0, 0)).flatten(1)),
    ],
)
def test_other_ways_to_write_a_forward(forward) -> None:
    model = Written(forward).double().eval()
    x = torch.rand(2, 2, 4, 4).double()
    graph = trace(model, (2, 4, 4))
    torch.testing.assert_close(graph(x), model(x.clone()).detach())


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(UserError, match="no weights"):
        trace(nn.Sequential(nn.Flatten()), (2, 2))
