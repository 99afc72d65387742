"""The small network of the embedded digits experiment (section 12)."""

from jaxtyping import Float
from torch import Tensor, nn

from tenfold_tost.activations import activation as make_activation

WIDTHS = (16, 16, 32, 32, 32, 32)
STRIDES = (1, 1, 2, 1, 2, 1)


class DigitsNet(nn.Sequential):
    """Six units of 3x3 convolution, BN and ReLU, global mean, linear head; 34,704 convolution weights.

    Args:
        num_classes: width of the head.
        activation: its name.

    """

    def __init__(self, num_classes: int = 10, activation: str = "relu") -> None:
        layers: list[nn.Module] = []
        inputs = 1
        for width, stride in zip(WIDTHS, STRIDES, strict=True):
            layers += [
                nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                make_activation(activation),
            ]
            inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))

    def forward(self, input: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return super().forward(input)
