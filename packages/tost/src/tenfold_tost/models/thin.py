"""Thin residual networks of depth 6n + 2 (section 3): the paper's ResNet-32 and ResNet-104."""

import math

from jaxtyping import Float
from torch import Tensor, nn

from tenfold_tost.activations import activation as make_activation

BOTTLENECK_FROM = 54  # depth from which the released network has bottleneck blocks, with n as for basic ones


class ThinBlock(nn.Module):
    """Basic block, or bottleneck with four times the width, with `downsample` where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int, activation: str, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        self.bottleneck = bottleneck
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.act = make_activation(activation)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """One residual update."""
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(self.act(y)))
        return self.act(y + (x if self.downsample is None else self.downsample(x)))


class ThinResNet(nn.Module):
    """oresnet20, 32, 44, 56, 104, 110: widths 16, 32, 64, n blocks a stage.

    Args:
        depth: 6 n + 2.
        num_classes: width of the head.
        activation: its name.

    Raises:
        ValueError: another depth.

    """

    def __init__(self, depth: int, num_classes: int = 10, activation: str = "relu") -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"A thin ResNet has depth 6 n + 2, got {depth}.")
        bottleneck = depth >= BOTTLENECK_FROM
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, width in enumerate((16, 32, 64), 1):
            layers: list[nn.Module] = []
            for i in range((depth - 2) // 6):
                layers.append(ThinBlock(inputs, width, 2 if stage > 1 and i == 0 else 1, activation, bottleneck))
                inputs = 4 * width if bottleneck else width
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, num_classes)
        self.act = make_activation(activation)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(
                    module.weight, 0.0, math.sqrt(2.0 / (math.prod(module.kernel_size) * module.out_channels))
                )

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = self.act(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))
