"""Residual networks: the three families of section 3."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, relu


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding and without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class OptionAShortcut(nn.Module):
    """Parameter-free shortcut: every second pixel, and zeros for the new channels, half of them on each side."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch wider half_h half_w"]:
        """The subsampled and widened picture."""
        return pad(x[:, :, ::2, ::2], [0, 0, 0, 0, self.before, self.after])


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, ReLU."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """One residual update."""
        y = relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 to four times the width, plus shortcut, ReLU."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """One residual update."""
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return relu(y + self.shortcut(x))


class SmallCifarResNet(nn.Module):
    """resnet20s, 32s, 44s, 56s: widths 16, 32, 64, option-A shortcuts, Kaiming-normal convolutions and head.

    Args:
        blocks: residual blocks in each of the three stages.
        num_classes: width of the head.

    """

    def __init__(self, blocks: Sequence[int], num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks[0], 1)
        self.layer2 = self._stage(16, 32, blocks[1], 2)
        self.layer3 = self._stage(32, 64, blocks[2], 2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = nn.Identity() if inputs == width and stride == 1 else OptionAShortcut(width - inputs)
        rest = (BasicBlock(width, width, 1, nn.Identity()) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(inputs, width, stride, first), *rest)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class CifarResNet(nn.Module):
    """resnet18, 34, 50 with a 3x3 stem for 32x32 and 64x64 pictures: widths 64-512, 1x1-convolution shortcuts.

    Args:
        blocks: residual blocks in each of the four stages.
        num_classes: width of the head.
        bottleneck: bottleneck blocks instead of basic ones.

    """

    def __init__(self, blocks: Sequence[int], num_classes: int = 10, *, bottleneck: bool = False) -> None:
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._stage(block, 64, 64, blocks[0], 1)
        self.layer2 = self._stage(block, 64 * block.expansion, 128, blocks[1], 2)
        self.layer3 = self._stage(block, 128 * block.expansion, 256, blocks[2], 2)
        self.layer4 = self._stage(block, 256 * block.expansion, 512, blocks[3], 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512 * block.expansion, num_classes)

    @staticmethod
    def _stage(
        block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, blocks: int, stride: int
    ) -> nn.Sequential:
        outputs = width * block.expansion
        stages = []
        for i in range(blocks):
            s = stride if i == 0 else 1
            shortcut: nn.Module = nn.Identity()
            if s != 1 or inputs != outputs:
                shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, s, bias=False), nn.BatchNorm2d(outputs))
            stages.append(block(inputs, width, s, shortcut))
            inputs = outputs
        return nn.Sequential(*stages)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(torch.flatten(self.pool(x), 1))


def imagenet_resnet(name: Literal["resnet18", "resnet34", "resnet50"], num_classes: int = 1000) -> nn.Module:
    """ResNet18, 34, 50 with the 7x7 ImageNet stem: torchvision's, whose layout and initialisation the paper uses."""
    from torchvision.models import get_model  # noqa: PLC0415  (the other architectures do not need torchvision)

    return get_model(name, weights=None, num_classes=num_classes)
