"""The networks of the release's mask folder (section 3): pixels in [0, 1] come in and are normalised inside."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Normalize(nn.Module):
    """(x - mean) / std by channel, with both as buffers in the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """The normalised pictures."""
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class WidenBySubsampling(nn.Module):
    """Option-A shortcut: every second pixel, and zeros for the new channels, half of them on each side."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch wider half_h half_w"]:
        """The subsampled and widened picture."""
        before = self.new_channels // 2
        return pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))


class ZooBlock(nn.Module):
    """Basic block with ReLU; `downsample` is a projection, a subsampling, or None."""

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """One residual update."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class OptionAResNet(nn.Module):
    """resnet20s, 32s, 44s, 56s, 110s: widths 16, 32, 64, parameter-free shortcuts, Kaiming-normal weights.

    Args:
        blocks: residual blocks in each of the three stages.
        num_classes: width of the head.

    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        inputs = 16
        for stage, width in enumerate((16, 32, 64), 1):
            first = WidenBySubsampling(width - inputs) if width != inputs else None
            layers = [ZooBlock(inputs, width, 1 if first is None else 2, first)]
            layers += [ZooBlock(width, width, 1, None) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            inputs = width
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = self.relu(self.bn1(self.conv1(self.normalize(x))))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class ZooResNet(nn.Module):
    """ResNet-18 under torchvision's names with a 3x3 stem and without its pooling.

    Args:
        num_classes: width of the head.

    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        inputs = 64
        for stage, width in enumerate((64, 128, 256, 512), 1):
            projection = None
            if width != inputs:
                projection = nn.Sequential(nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            first = ZooBlock(inputs, width, 1 if projection is None else 2, projection)
            setattr(self, f"layer{stage}", nn.Sequential(first, ZooBlock(width, width, 1, None)))
            inputs = width
        self.fc = nn.Linear(512, num_classes)
        _kaiming_fan_out(self)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = self.relu(self.bn1(self.conv1(self.normalize(x))))
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class ZooVGG(nn.Module):
    """VGG-16 with batch norm, convolutions with bias, and one linear layer.

    Args:
        num_classes: width of the head.

    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for number, stage in enumerate(VGG16):
            if number:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)
        _kaiming_fan_out(self)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)
        self.normalize = Normalize()

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.classifier(self.features(self.normalize(x)).mean((2, 3)))


def _kaiming_fan_out(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
