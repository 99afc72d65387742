"""The framework's own depthwise convolution: cuDNN or a native kernel on GPUs, oneDNN on CPUs. The reference.

It differentiates itself, so it has no `kernel_gradient`.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
