"""The small network of the embedded digits experiment (section 12)."""

from jaxtyping import Float
from torch import Tensor, nn


class DigitsCNN(nn.Sequential):
    """Three 3x3 convolutions (16, 32, 32 filters; stride 1, 2, 2) with BN and ReLU, global mean, linear head.

    14,288 prunable weights with 10 classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        layers: list[nn.Module] = []
        for inputs, width, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
            layers += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))

    def forward(self, input: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return super().forward(input)
