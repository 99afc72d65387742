"""Scores of pictures (section 9): range [0, 1], no crop, no mask."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Picture = Float[Tensor, "height width 3"]


def mse(image: Float[Tensor, "*size 3"], truth: Float[Tensor, "*size 3"]) -> Float[Tensor, ""]:
    """Mean squared error over pixels and channels."""
    return (image - truth).square().mean()


def psnr(error: Tensor) -> Tensor:
    """-10 log10 of a mean squared error, in dB."""
    return -10 * torch.log10(error)


def psnr_of_mean_mse(errors: Sequence[float] | Tensor) -> float:
    """The released total over views: the PSNR of the mean of their errors, not the mean of their PSNRs."""
    return float(psnr(torch.as_tensor(errors, dtype=torch.float64).mean()))


def psnr_mean(errors: Sequence[float] | Tensor) -> float:
    """The mean of the views' PSNRs, as most papers report."""
    return float(psnr(torch.as_tensor(errors, dtype=torch.float64)).mean())


def ssim(image: Picture, truth: Picture, *, window: int = 11, sigma: float = 1.5) -> Float[Tensor, ""]:
    """The released SSIM: 11 x 11 Gaussian of σ 1.5 (built in single precision), zero padding, mean over all pixels.

    `ssim_standard` is the usual one; values differ at the border.
    """
    offset = torch.arange(window, dtype=torch.float32) - window // 2
    line = torch.exp(-offset.square() / (2 * sigma**2))
    line = line / line.sum()
    channels = image.shape[-1]
    kernel = torch.outer(line, line).to(image).expand(channels, 1, window, window)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x.movedim(-1, 0)[None], kernel, padding=window // 2, groups=channels)

    mean, mean2 = blur(image), blur(truth)
    variance, variance2 = blur(image.square()) - mean.square(), blur(truth.square()) - mean2.square()
    covariance = blur(image * truth) - mean * mean2
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean * mean2 + c1) / (mean.square() + mean2.square() + c1)
    return (luminance * (2 * covariance + c2) / (variance + variance2 + c2)).mean()


def ssim_standard(image: Picture, truth: Picture) -> Float[Tensor, ""]:
    """Torchmetrics' SSIM on the clipped rendering."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: PLC0415 - heavy

    first, second = (x.movedim(-1, 0)[None].clamp(0, 1) for x in (image, truth))
    score = structural_similarity_index_measure(first, second, data_range=1.0)
    assert isinstance(score, Tensor)
    return score


def lpips(image: Picture, truth: Picture, *, reference: bool = False) -> Float[Tensor, ""]:
    """LPIPS with AlexNet; `reference` passes [0, 1] where the network expects [-1, 1], as the released code does.

    Raises:
        RuntimeError: the network's weights are not there and cannot be fetched.

    """
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity  # noqa: PLC0415 - heavy

    first, second = (x.movedim(-1, 0)[None].float().clamp(0, 1) for x in (image, truth))
    # torchmetrics maps [0, 1] to [-1, 1] only if it is told to
    return learned_perceptual_image_patch_similarity(first, second, net_type="alex", normalize=not reference)
