"""Scores (section 9): of colours per image, of depth, and of occlusion."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from tenfold_shared.errors import UserError

PSNR_FLOOR = 1e-6


def mse(
    image: Float[Tensor, "*size 3"], truth: Float[Tensor, "*size 3"], mask: Float[Tensor, "*size"] | None = None
) -> Float[Tensor, ""]:
    """Mean squared error over pixels and channels, or over the pixels where `mask` is 1."""
    if mask is None:
        return (image - truth).square().mean()
    return ((image - truth).square() * mask[..., None]).sum() / (mask.sum() * image.shape[-1] + 1e-6)


def psnr(
    image: Float[Tensor, "*size 3"], truth: Float[Tensor, "*size 3"], mask: Float[Tensor, "*size"] | None = None
) -> Float[Tensor, ""]:
    """-10 log10(MSE + 1e-6) in dB: at most 60. Images in [0, 1]; with a mask, the foreground score."""
    return -10 * torch.log10(mse(image, truth, mask) + PSNR_FLOOR)


def ssim(image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> Float[Tensor, ""]:
    """Structural similarity in the published convention: 11 x 11 Gaussian of σ 1.5, zero padding, mean over all pixels.

    Libraries crop or reflect at the border instead and give other values there.
    """
    offset = torch.arange(11, dtype=torch.float32) - 5
    line = torch.exp(-(offset**2) / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line[None]).to(image).expand(image.shape[-1], 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x.permute(2, 0, 1)[None], window, padding=5, groups=x.shape[-1])

    mean, mean2 = blur(image), blur(truth)
    variance, variance2 = blur(image * image) - mean**2, blur(truth * truth) - mean2**2
    covariance = blur(image * truth) - mean * mean2
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean * mean2 + c1) / (mean**2 + mean2**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance + variance2 + c2)).mean()


def lpips(
    image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"], *, as_published: bool = False
) -> Float[Tensor, ""]:
    """LPIPS with VGG on images in [0, 1].

    Args:
        image: the rendering.
        truth: the photograph.
        as_published: pass [0, 1] where the network expects [-1, 1], as the published numbers were made (`lpips_01`).

    Raises:
        UserError: the weights are not there and cannot be fetched.

    """
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity  # noqa: PLC0415 - heavy

    first, second = (x.permute(2, 0, 1)[None].float().clamp(0, 1) for x in (image, truth))
    # torchmetrics maps [0, 1] to [-1, 1] only if it is told to.
    try:
        return learned_perceptual_image_patch_similarity(first, second, net_type="vgg", normalize=not as_published)
    except OSError as error:
        raise UserError(
            f"LPIPS needs torchvision's VGG weights, which are not in {torch.hub.get_dir()}/checkpoints and cannot be "
            f"fetched ({error}): put vgg16-397923af.pth there, or leave LPIPS out"
        ) from error


def depth_scores(
    depth: Float[Tensor, "*size"], truth: Float[Tensor, "*size"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean absolute error and correlation on the pixels where `truth` is finite.

    The error alone says little: weights spread evenly predict the middle of the range and score well. Print it beside
    that of an untrained network and of a constant (`constant_depth_error`).
    """
    hit = truth.isfinite()
    found, true = depth[hit], truth[hit].to(depth)
    centred, centred_true = found - found.mean(), true - true.mean()
    scale = (centred.square().sum() * centred_true.square().sum()).sqrt().clamp(min=torch.finfo(depth.dtype).tiny)
    return (found - true).abs().mean(), (centred * centred_true).sum() / scale


def constant_depth_error(truth: Float[Tensor, "*size"]) -> Float[Tensor, ""]:
    """The smallest mean absolute error that a constant depth can have."""
    true = truth[truth.isfinite()]
    return (true - true.median()).abs().mean()


def visible_share(chosen_views: Tensor, visibility: Bool[Tensor, "points views"]) -> Float[Tensor, ""]:
    """Share of surface points whose most attended view (int64 [points]) truly sees them."""
    return visibility.gather(1, chosen_views[:, None]).float().mean()
