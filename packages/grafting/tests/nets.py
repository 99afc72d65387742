"""Random networks of every supported part, and slow references."""

import torch
from torch import Tensor, nn

from tenfold_grafting.grafting import GraftedReLU, activation_shapes, graft
from tenfold_grafting.intervals import Box


class Branches(nn.Module):
    """A residual network with batch norm, an asymmetric pad, a 1 x 1 shortcut and an average pool."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 0, 0, 1))
        self.conv1 = nn.Conv2d(2, channels, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        self.relu3 = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(self.pad(x))))
        y = self.relu2(self.norm2(self.conv2(x)))
        x = self.relu3(self.conv3(y) + self.shortcut(x))
        return self.head(self.flatten(self.pool(x)))


def random_network(seed: int, kind: str, grafted: bool = False) -> tuple[nn.Module, tuple[int, ...]]:
    """A double-precision network and its input's shape."""
    torch.manual_seed(seed)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(
            nn.Flatten(),
            nn.Linear(5, 9),
            nn.ReLU(),
            nn.Linear(9, 8),
            nn.ReLU(),
            nn.Linear(8, 7),
            nn.ReLU(),
            nn.Linear(7, 3),
        )
        shape: tuple[int, ...] = (5,)
    elif kind == "conv":
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, 1, 0), nn.ReLU(), nn.Conv2d(5, 4, 2, 1, 1, groups=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 3),
        )  # fmt: skip
        shape = (2, 7, 7)
    else:
        model, shape = Branches(), (2, 8, 8)
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    if grafted:
        masks = {name: (torch.rand(s) < 0.5).double() for name, s in activation_shapes(model, shape).items()}
        model = graft(model, masks)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, GraftedReLU):
                    module.slope.uniform_(-0.8, 0.8)
                    module.bias.uniform_(-0.3, 0.3)
    return model.eval(), shape


def random_box(seed: int, shape: tuple[int, ...], radius: float = 0.15, batch: int = 2) -> Box:
    """Boxes that are not all of one width."""
    draws = torch.Generator().manual_seed(seed)
    centre = torch.rand((batch, *shape), generator=draws, dtype=torch.float64)
    width = radius * torch.rand((batch, *shape), generator=draws, dtype=torch.float64)
    return Box(centre - width, centre + width)


def corners_and_points(box: Box, count: int, seed: int = 0) -> Tensor:
    """Random points of the boxes, half of them corners, [batch, count, *shape]."""
    draws = torch.Generator().manual_seed(seed)
    share = torch.rand((len(box), count, *box.lower.shape[1:]), generator=draws, dtype=torch.float64)
    share[:, : count // 2] = share[:, : count // 2].round()
    return box.lower[:, None] + share * (box.upper - box.lower)[:, None]
