"""VGG with four poolings for 32x32 and 64x64 pictures and a small head (section 3)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

STAGES = {
    "11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "16": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class VGG(nn.Module):
    """VGG-11 and VGG-16: 3x3 convolutions without bias, 2x2 average, then 2048-256-256-classes.

    Args:
        depth: "11" or "16".
        num_classes: width of the head.
        batch_norm: batch normalisation after every convolution.

    """

    def __init__(self, depth: Literal["11", "16"], num_classes: int = 10, *, batch_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for number, stage in enumerate(STAGES[depth]):
            if number:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))
