"""The framework's own depthwise convolution: cuDNN or a native kernel on GPUs, oneDNN on CPUs. The reference."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WANTS_CONTIGUOUS = False


def supports(x: Tensor, kernel_size: tuple[int, int]) -> bool:
    """Always: this is the fallback."""
    return True


def correlate(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 kh kw"],
    bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """One grouped `conv2d` with padding (kh // 2, kw // 2)."""
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])


def kernel_gradient(
    x: Float[Tensor, "batch channels height width"],
    grad: Float[Tensor, "batch channels height width"],
    kernel_size: tuple[int, int],
) -> Float[Tensor, "channels 1 kh kw"]:
    """The framework's backward-weights kernel."""
    channels = x.shape[1]
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    return torch.nn.grad.conv2d_weight(x, (channels, 1, *kernel_size), grad, padding=padding, groups=channels)
