"""Projection of sample points into the source views and sampling of colours and features there (section 2.3)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import grid_sample

from tenfold_gnt.cameras import full_precision, intrinsics_of, pose_of

SMALLEST_DEPTH = 1e-8
LARGEST_PIXEL = 1e6
SMALLEST_LENGTH = 1e-6


class SourceViews(NamedTuple):
    """Source images with what is computed from their cameras once.

    Attributes:
        images: [views, 3, H, W] in [0, 1].
        projection: K inv(c2w), world to homogeneous pixels, [views, 4, 4].
        centres: camera centres, [views, 3].
        height: of the first source camera, whose bounds all views are tested against.
        width: of the first source camera.

    """

    images: Float[Tensor, "views 3 height width"]
    projection: Float[Tensor, "views 4 4"]
    centres: Float[Tensor, "views 3"]
    height: int
    width: int


def source_views(images: Float[Tensor, "views height width 3"], cameras: Float[Tensor, "views 34"]) -> SourceViews:
    """Images and cameras of the sources, with the poses inverted once.

    Raises:
        ValueError: no view.

    """
    if len(images) == 0:
        raise ValueError("rendering needs at least one source view, got none")
    poses = pose_of(cameras)
    with full_precision(cameras):
        projection = intrinsics_of(cameras) @ torch.linalg.inv(poses)
    return SourceViews(images.permute(0, 3, 1, 2), projection, poses[:, :3, 3], images.shape[1], images.shape[2])


class ViewSamples(NamedTuple):
    """What the source views show at sample points.

    Attributes:
        rgb_feat: colours, then features, [rays, samples, views, 3 + channels].
        ray_diff: relative directions (difference, cosine), [rays, samples, views, 4].
        mask: 1 where the point lies in front of the view and inside its image, else 0, [rays, samples, views, 1].

    """

    rgb_feat: Float[Tensor, "rays samples views channels"]
    ray_diff: Float[Tensor, "rays samples views 4"]
    mask: Float[Tensor, "rays samples views 1"]


def project(
    points: Float[Tensor, "*points 3"], projection: Float[Tensor, "views 4 4"]
) -> tuple[Float[Tensor, "views *points 2"], Bool[Tensor, "views *points"]]:
    """Pixel positions (u, v) in every view, and whether the point lies in front of it.

    Positions are q_xy / max(q_z, 1e-8) with q = K inv(c2w) [p, 1], clamped to ±1e6.
    """
    with full_precision(points):
        homogeneous = torch.einsum("vij,...j->v...i", projection[:, :3, :3], points)
    homogeneous = homogeneous + projection[:, :3, 3].view(-1, *[1] * (points.ndim - 1), 3)
    pixels = homogeneous[..., :2] / homogeneous[..., 2:].clamp(min=SMALLEST_DEPTH)
    return pixels.clamp(-LARGEST_PIXEL, LARGEST_PIXEL), homogeneous[..., 2] > 0


def inside(pixels: Float[Tensor, "*points 2"], height: int, width: int) -> Bool[Tensor, "*points"]:
    """Whether pixel positions lie in 0 <= u <= W - 1 and 0 <= v <= H - 1."""
    u, v = pixels.unbind(-1)
    return (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)


def relative_directions(
    points: Float[Tensor, "*points 3"], target: Float[Tensor, "3"], centres: Float[Tensor, "views 3"]
) -> Float[Tensor, "*points views 4"]:
    """(δ / max(‖δ‖, 1e-6), a·b) for directions a, b from a point to the target's and a source's camera, δ = a - b."""
    to_target = target - points
    to_target = to_target / (to_target.norm(dim=-1, keepdim=True) + SMALLEST_LENGTH)
    to_source = centres - points[..., None, :]
    to_source = to_source / (to_source.norm(dim=-1, keepdim=True) + SMALLEST_LENGTH)
    to_target = to_target[..., None, :]
    difference = to_target - to_source
    direction = difference / difference.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_LENGTH)
    return torch.cat([direction, (to_target * to_source).sum(-1, keepdim=True)], -1)


def sample_views(
    points: Float[Tensor, "rays samples 3"],
    target: Float[Tensor, "3"],
    sources: SourceViews,
    features: Float[Tensor, "views channels h w"],
) -> ViewSamples:
    """Colours, features, relative directions and mask of every point in every source view.

    Args:
        points: sample points in the world.
        target: centre of the target camera.
        sources: the source views.
        features: their feature maps, of any size: they are sampled at the same *normalised* position as the images.

    Returns:
        The samples; bilinear with zeros outside, corners aligned. Gradients reach `features` only.

    """
    rays, samples = points.shape[:2]
    pixels, in_front = project(points.detach(), sources.projection)
    size = pixels.new_tensor([sources.width - 1.0, sources.height - 1.0])
    grid = (2 * pixels / size - 1).flatten(1, 2)[:, :, None]
    colours = grid_sample(sources.images, grid, align_corners=True)[..., 0]
    # Positions in half precision would be off by a good part of a map's pixel: the maps are brought to theirs.
    precise = torch.promote_types(features.dtype, torch.float32)
    maps = grid_sample(features.to(precise), grid.to(precise), align_corners=True)[..., 0]
    # One packed copy to [points, views, channels]: everything after it reads whole rows.
    rgb_feat = torch.cat([colours.to(maps.dtype), maps], 1).permute(2, 0, 1).contiguous()
    mask = (inside(pixels, sources.height, sources.width) & in_front).permute(1, 2, 0)
    directions = relative_directions(points.detach(), target, sources.centres)
    return ViewSamples(rgb_feat.unflatten(0, (rays, samples)), directions, mask[..., None].to(points.dtype))
