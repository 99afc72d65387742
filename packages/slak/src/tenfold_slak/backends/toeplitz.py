"""Convolution as a batch of matrix products: the tensor-core form.

For one channel, shifting the map by every column offset j of the kernel stacks kw maps into a (kw*H) x (B*W) matrix;
the long axis becomes a Toeplitz matrix of H x (kw*H). It needs kw*H multiply-adds an output where the direct form needs
kw*kh, so fewer once the kernel is longer than the map.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WANTS_CONTIGUOUS = False


def supports(x: Tensor, kernel_size: tuple[int, int]) -> bool:
    """Any floating-point input, while the kw-fold unfolded map stays affordable."""
    return min(kernel_size) <= 13


def toeplitz_matrices(
    weight: Float[Tensor, "channels 1 kh kw"], height: int
) -> Float[Tensor, "channels {height} kw {height}"]:
    """`T[c,h,j,g] = weight[c,0,g-h+kh//2,j]`, zero where the tap does not exist; rows h are outputs, g are inputs."""
    taps = weight[:, 0].transpose(1, 2)  # (channels, kw, kh)
    margin = height - 1 - taps.shape[-1] // 2  # pads or crops to 2*height - 1 taps, offset 0 in the middle
    windows = F.pad(taps, (margin, margin)).unfold(-1, height, 1)  # (channels, kw, start, height)
    return windows.flip(2).transpose(1, 2)  # output h reads the window that starts at height - 1 - h


def diagonal_sums(products: Float[Tensor, "*leading height height"], taps: int) -> Float[Tensor, "*leading {taps}"]:
    """`s[i] = sum_h products[h, h+i-taps//2]`: the adjoint of building a Toeplitz matrix. `taps` is odd.

    Rows are padded to 2*height - 1 entries and the whole re-read with rows one entry longer: each row moves one place
    to the left of the one before, which puts every diagonal into a column.
    """
    height = products.shape[-1]
    skewed = F.pad(F.pad(products, (height - 1, 0)).flatten(-2), (0, height)).unflatten(-1, (height, 2 * height))
    sums = skewed.sum(-2)[..., :-1]  # the diagonal g - h = d sits at index d + height - 1
    margin = taps // 2 - (height - 1)
    return F.pad(sums, (margin, margin))


def _unfolded(x: Tensor, kw: int) -> Tensor:
    """(channels, kw*H, B*W): row (j, g) holds `x[b, c, g, w + j - kw//2]`."""
    batch, channels, height, width = x.shape
    columns = F.pad(x, (kw // 2, kw // 2)).unfold(3, width, 1)  # (B, C, H, kw, W)
    return columns.permute(1, 3, 2, 0, 4).reshape(channels, kw * height, batch * width)


def _accumulated(a: Tensor, b: Tensor) -> Tensor:
    """`bmm` whose result keeps the float32 accumulator of half-precision products."""
    if a.dtype not in {torch.float16, torch.bfloat16}:
        return torch.bmm(a, b)
    if a.is_cuda:
        try:
            return torch.bmm(a, b, out_dtype=torch.float32)
        except TypeError:  # older than torch 2.8
            pass
    return torch.bmm(a.float(), b.float())


def correlate(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 kh kw"],
    bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """`Y[c] = T[c] @ unfolded[c]`, one `bmm` over the channels."""
    batch, channels, height, width = x.shape
    matrices = toeplitz_matrices(weight, height).reshape(channels, height, -1)
    y = torch.bmm(matrices, _unfolded(x, weight.shape[3]))
    y = y.view(channels, height, batch, width).permute(2, 0, 1, 3)
    return (y if bias is None else y + bias.view(-1, 1, 1)).contiguous()


def kernel_gradient(
    x: Float[Tensor, "batch channels height width"],
    grad: Float[Tensor, "batch channels height width"],
    kernel_size: tuple[int, int],
) -> Float[Tensor, "channels 1 kh kw"]:
    """`dT[c] = dY[c] @ unfolded[c]^T`, then the sums along the diagonals, accumulated in float32 or better."""
    batch, channels, height, width = x.shape
    rows = grad.permute(1, 2, 0, 3).reshape(channels, height, batch * width)
    products = _accumulated(rows, _unfolded(x, kernel_size[1]).transpose(1, 2))
    products = products.view(channels, height, kernel_size[1], height).transpose(1, 2)
    return diagonal_sums(products, kernel_size[0]).transpose(1, 2)[:, None].to(x.dtype)
