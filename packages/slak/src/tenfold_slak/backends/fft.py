"""Convolution by the two-dimensional Fourier transform: cost independent of the kernel, the form for dense 51x51 ones.

A "same" output needs transforms of length H + k // 2 only: the circular wrap-around pollutes samples that are not kept.
"""

import torch
from jaxtyping import Float
from torch import Tensor

WANTS_CONTIGUOUS = False


def supports(x: Tensor, kernel_size: tuple[int, int]) -> bool:
    """Any floating-point input; half precision is transformed in float32."""
    return True


def _fast_length(length: int) -> int:
    """The smallest number >= length whose prime factors are 2, 3 and 5, even so that the real transform is fast."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and length % 2 == 0:
            return length
        length += 1


def _transform_size(x: Tensor, kernel_size: tuple[int, int]) -> tuple[int, int]:
    return _fast_length(x.shape[2] + kernel_size[0] // 2), _fast_length(x.shape[3] + kernel_size[1] // 2)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def correlate(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 kh kw"],
    bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """`irfft(rfft(x) * conj(rfft(centred kernel)))`: the kernel's centre is rolled to the origin."""
    kernel_size = (weight.shape[2], weight.shape[3])
    size = _transform_size(x, kernel_size)
    kernel = torch.zeros(x.shape[1], *size, dtype=_full(weight).dtype, device=x.device)
    kernel[:, : kernel_size[0], : kernel_size[1]] = _full(weight)[:, 0]
    kernel = kernel.roll((-(kernel_size[0] // 2), -(kernel_size[1] // 2)), (1, 2))
    spectrum = torch.fft.rfft2(_full(x), s=size) * torch.fft.rfft2(kernel).conj()
    y = torch.fft.irfft2(spectrum, s=size)[..., : x.shape[2], : x.shape[3]]
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y.to(x.dtype)


def kernel_gradient(
    x: Float[Tensor, "batch channels height width"],
    grad: Float[Tensor, "batch channels height width"],
    kernel_size: tuple[int, int],
) -> Float[Tensor, "channels 1 kh kw"]:
    """The correlation of x with the output gradient, at the lags -k//2 .. k//2 of both axes."""
    size = _transform_size(x, kernel_size)
    spectrum = torch.fft.rfft2(_full(x), s=size) * torch.fft.rfft2(_full(grad), s=size).conj()
    lags = torch.fft.irfft2(spectrum.sum(0), s=size)
    lags = lags.roll((kernel_size[0] // 2, kernel_size[1] // 2), (1, 2))
    return lags[:, None, : kernel_size[0], : kernel_size[1]].to(x.dtype)
