"""Image and surface metrics with the released conventions (section 9)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

USED = 1024
"""Signals whose supports are compared with all others at a time."""


def psnr(preds: Float[Tensor, "batch *shape"], targets: Float[Tensor, "batch *shape"]) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each image in dB for a range of 1, over all its entries, nothing clamped."""
    return -10 * torch.log10((preds - targets).square().flatten(1).mean(dim=1))


def ssim(
    preds: Float[Tensor, "batch channels height width"],
    targets: Float[Tensor, "batch channels height width"],
    *,
    window: int = 11,
    sigma: float = 1.5,
) -> Float[Tensor, " batch"]:
    """Structural similarity of each image for a range of 1: Gaussian window, zero padding, borders included.

    Libraries crop or reflect at the border, which changes the value; the released figures are zero padded.
    """
    channels = preds.shape[1]
    offsets = torch.arange(window, dtype=preds.dtype, device=preds.device) - window // 2
    profile = torch.exp(-offsets.square() / (2 * sigma**2))
    profile = profile / profile.sum()
    kernel = torch.outer(profile, profile).expand(channels, 1, window, window)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=window // 2, groups=channels)

    mean_x, mean_y = blur(preds), blur(targets)
    var_x = blur(preds.square()) - mean_x.square()
    var_y = blur(targets.square()) - mean_y.square()
    covariance = blur(preds * targets) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(dim=1)


def lpips(
    preds: Float[Tensor, "batch channels height width"],
    targets: Float[Tensor, "batch channels height width"],
    *,
    released: bool = False,
) -> Float[Tensor, " batch"]:
    """LPIPS of each image with AlexNet, grey as three equal channels (section 9).

    Args:
        preds: images, clamped to [0, 1].
        targets: images in [0, 1].
        released: pass them as they are, where the network expects [-1, 1], as the released figures have it.

    Raises:
        ValueError: the images are too small for AlexNet, or its weights are not there and cannot be fetched.

    """
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity  # noqa: PLC0415 - heavy

    if min(targets.shape[2:]) < 32:
        raise ValueError(f"LPIPS takes images of 32 pixels or more, got {targets.shape[2]}×{targets.shape[3]}")
    pairs = [x.float().clamp(0, 1).expand(-1, 3, -1, -1) for x in (preds, targets)]
    try:
        each = [
            learned_perceptual_image_patch_similarity(a[None], b[None], net_type="alex", normalize=not released)
            for a, b in zip(*pairs, strict=True)
        ]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"LPIPS needs AlexNet's weights, which cannot be fetched ({error}): leave --lpips out"
        ) from error
    return torch.stack(each)


class SurfaceDistance(NamedTuple):
    """Agreement of two sampled surfaces."""

    chamfer: Float[Tensor, ""]
    """mean of the two mean nearest-neighbour distances (not squared)"""
    hausdorff: Float[Tensor, ""]
    """largest nearest-neighbour distance either way"""
    normal_consistency: Float[Tensor, ""] | None
    """mean |cos| between a normal and that of the nearest neighbour, both ways averaged"""


def surface_distance(
    points: Float[Tensor, "n 3"],
    other: Float[Tensor, "m 3"],
    normals: Float[Tensor, "n 3"] | None = None,
    other_normals: Float[Tensor, "m 3"] | None = None,
) -> SurfaceDistance:
    """Chamfer and Hausdorff distance and normal consistency (section 9); memory is bounded by chunks of points.

    Raises:
        ValueError: one of the sets is empty, as when a mesh has no surface.

    """
    if not len(points) or not len(other):
        raise ValueError("a surface has no points to compare: the field does not cross level 0")
    there, nearest_there = _nearest(points, other)
    back, nearest_back = _nearest(other, points)
    consistency = None
    if normals is not None and other_normals is not None:
        forward = F.cosine_similarity(normals, other_normals[nearest_there], dim=-1).abs().mean()
        backward = F.cosine_similarity(other_normals, normals[nearest_back], dim=-1).abs().mean()
        consistency = (forward + backward) / 2
    return SurfaceDistance((there.mean() + back.mean()) / 2, torch.maximum(there.max(), back.max()), consistency)


def _nearest(queries: Tensor, points: Tensor, entries: int = 1 << 24) -> tuple[Tensor, Tensor]:
    rows = max(1, entries // len(points))
    exact = "donot_use_mm_for_euclid_dist"  # the product form loses the digits of close points
    found = [torch.cdist(part, points, compute_mode=exact).min(dim=1) for part in queries.split(rows)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def atom_usage(codes: Float[Tensor, "signals experts"]) -> tuple[Float[Tensor, " experts"], Float[Tensor, ""]]:
    """Fraction of the signals that use each atom, and the mean overlap (Jaccard index) of two signals' supports."""
    used = (codes != 0).to(codes.dtype)
    sizes = used.sum(dim=1)
    total = -(sizes > 0).sum().to(used.dtype)  # a signal with itself
    for part, size in zip(used.split(USED), sizes.split(USED), strict=True):
        common = part @ used.T
        total = total + (common / (size[:, None] + sizes[None] - common).clamp(min=1)).sum()
    return used.mean(dim=0), total / max(len(codes) * (len(codes) - 1), 1)
