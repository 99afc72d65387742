"""Direct convolution in the shapes that CPU libraries have fast kernels for.

oneDNN runs a tall depthwise kernel by a vectorised direct loop that skips the taps outside the map, but falls back to
im2col and a matrix product for wide kernels and for every backward-weights pass of this size. The caller has turned
wide kernels into tall ones; the weight gradient is here turned into a forward convolution.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WANTS_CONTIGUOUS = True


def supports(x: Tensor, kernel_size: tuple[int, int]) -> bool:
    """Any floating-point input."""
    return True


def correlate(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 kh kw"],
    bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """One grouped convolution on a contiguous map: in channels-last the direct kernel takes twice as long."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x.contiguous(), weight.contiguous(), bias, padding=padding, groups=x.shape[1])


def kernel_gradient(
    x: Float[Tensor, "batch channels height width"],
    grad: Float[Tensor, "batch channels height width"],
    kernel_size: tuple[int, int],
) -> Float[Tensor, "channels 1 kh kw"]:
    """The weight gradient as a depthwise convolution of `batch * channels` maps with as many kernels.

    `dK[c,i,j] = sum_b sum_hw x[b,c,h+i-kh//2,w+j-kw//2] grad[b,c,h,w]` is, for every (b, c), the correlation of a map
    with its output gradient as the kernel, read at kh x kw positions.
    """
    batch, channels, height, width = x.shape
    dtype = x.dtype
    if not batch:
        return x.new_zeros(channels, 1, *kernel_size)
    if dtype in {torch.float16, torch.bfloat16}:
        x, grad = x.float(), grad.float()  # per-image results rounded to half precision would spoil their sum
    maps = x.reshape(1, batch * channels, height, width)
    kernels = grad.reshape(batch * channels, 1, height, width)
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    per_image = F.conv2d(maps, kernels, padding=padding, groups=batch * channels)
    return per_image.view(batch, channels, 1, *kernel_size).sum(0).to(dtype)
