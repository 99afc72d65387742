"""Oriented boxes: corners, angle bins, rotated overlap and GIoU (section 2.8).

Scene frame: x right, y forward, z up. Corners are made in the camera frame (x, -z, y). Sizes are full lengths.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CORNER_SIGNS = torch.tensor(
    [[1, 1, 1], [1, 1, -1], [-1, 1, -1], [-1, 1, 1], [1, -1, 1], [1, -1, -1], [-1, -1, -1], [-1, -1, 1]]
)
"""Signs of (l, h, w) of the eight corners, the +h face first."""


def to_camera(points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
    """(x, y, z) -> (x, -z, y)."""
    return torch.stack([points[..., 0], -points[..., 2], points[..., 1]], -1)


def box_corners(
    centre: Float[Tensor, "*b 3"], size: Float[Tensor, "*b 3"], angle: Float[Tensor, "*b"]
) -> Float[Tensor, "*b 8 3"]:
    """Corners in the camera frame of boxes (l, w, h) turned about the vertical by [[c, 0, s], [0, 1, 0], [-s, 0, c]]."""
    signs = CORNER_SIGNS.to(size)
    lhw = size[..., None, [0, 2, 1]] / 2 * signs
    c, s = angle.cos()[..., None], angle.sin()[..., None]
    x, y, z = lhw.unbind(-1)
    turned = torch.stack([c * x + s * z, y, -s * x + c * z], -1)
    return turned + to_camera(centre)[..., None, :]


def angle_to_bin(angle: Float[Tensor, "*b"], bins: int = 12) -> tuple[Int[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Bin and residual in radians; bins are centred on multiples of 2 pi / bins, so -eps and 2 pi - eps fall in one."""
    step = 2 * math.pi / bins
    shifted = torch.remainder(angle + step / 2, 2 * math.pi)
    index = (shifted / step).floor().clamp(max=bins - 1)
    return index.long(), shifted - (index * step + step / 2)


def bin_to_angle(logits: Float[Tensor, "*b k"], residual_normalised: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """2 pi / bins * argmax + residual * pi / bins (the residual's unit is half a bin), minus 2 pi when above pi."""
    bins = logits.shape[-1]
    index = logits.argmax(-1, keepdim=True)
    angle = 2 * math.pi / bins * index[..., 0] + residual_normalised.gather(-1, index)[..., 0] * (math.pi / bins)
    return torch.where(angle > math.pi, angle - 2 * math.pi, angle)


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Z of the cross product of plane vectors."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def polygon_area(polygon: Float[Tensor, "*b v 2"]) -> Float[Tensor, "*b"]:
    """Unsigned shoelace area; repeated vertices change nothing."""
    origin = polygon[..., :1, :]  # differences: far from the origin, products of coordinates lose digits
    a = polygon - origin
    return 0.5 * cross(a, a.roll(-1, -2)).sum(-1).abs()


def intersect_polygons(a: Float[Tensor, "*b v 2"], b: Float[Tensor, "*b w 2"]) -> Float[Tensor, "*b"]:
    """Area of the intersection of two convex polygons: a is clipped by every edge of b (Sutherland-Hodgman).

    All pairs at once: a polygon has a fixed number of slots, unused ones repeat a vertex. Differentiable.
    """
    orientation = cross(b[..., 1, :] - b[..., 0, :], b[..., 2, :] - b[..., 1, :]).sign()[..., None]
    polygon = a
    alive = torch.ones(a.shape[:-2], dtype=torch.bool, device=a.device)
    for i in range(b.shape[-2]):
        start, stop = b[..., i, :][..., None, :], b[..., (i + 1) % b.shape[-2], :][..., None, :]
        polygon, kept = _clip(polygon, cross(stop - start, polygon - start) * orientation)
        alive = alive & kept
    return torch.where(alive, polygon_area(polygon), 0.0)


def _clip(
    polygon: Float[Tensor, "*b v 2"], side: Float[Tensor, "*b v"]
) -> tuple[Float[Tensor, "*b u 2"], Bool[Tensor, "*b"]]:
    """The part of each polygon where ``side`` >= 0, with one slot more, and whether there is one."""
    following, side_after = polygon.roll(-1, -2), side.roll(-1, -1)
    inside = side >= 0
    crosses = inside != (side_after >= 0)
    share = side / torch.where(crosses, side - side_after, 1.0)
    crossing = polygon + share[..., None] * (following - polygon)
    slots = torch.stack([polygon, crossing], -2).flatten(-3, -2)
    used = torch.stack([inside, crosses], -1).flatten(-2)
    order = (~used).long().argsort(dim=-1, stable=True)[..., : polygon.shape[-2] + 1]
    slots = slots.gather(-2, order[..., None].expand(*order.shape, 2))
    used = used.gather(-1, order)
    return torch.where(used[..., None], slots, slots[..., :1, :]), used[..., 0]


def box_volumes(corners: Float[Tensor, "*b 8 3"]) -> Float[Tensor, "*b"]:
    """Product of the edges."""
    edges = [(corners[..., 0, :] - corners[..., i, :]).square().sum(-1).clamp(min=1e-12).sqrt() for i in (1, 3, 4)]
    return edges[0] * edges[1] * edges[2]


def intersection_volume(
    a: Float[Tensor, "*b 8 3"], b: Float[Tensor, "*b 8 3"], *, rotated: bool = True, released: bool = False
) -> Float[Tensor, "*b"]:
    """BEV polygon intersection times the overlap in height; axis-aligned hulls when not ``rotated``.

    ``released`` first looks, as 3DETR does, whether the boxes would overlap with their corners 0 and 2 as the largest and
    smallest of both axes, and takes pairs that would not as disjoint; of turned boxes it misses many.
    """
    height = (torch.minimum(a[..., 0, 1], b[..., 0, 1]) - torch.maximum(a[..., 4, 1], b[..., 4, 1])).clamp(min=0)
    first, second = a[..., :4, [0, 2]], b[..., :4, [0, 2]]
    if released:
        low = torch.maximum(first[..., 2, :], second[..., 2, :])
        high = torch.minimum(first[..., 0, :], second[..., 0, :])
    else:
        low = torch.maximum(first.amin(-2), second.amin(-2))
        high = torch.minimum(first.amax(-2), second.amax(-2))
    upright = (high - low).clamp(min=0).prod(-1)
    if not rotated:
        return upright * height
    return torch.where(upright > 0, intersect_polygons(first, second), 0.0) * height


def box_iou(a: Float[Tensor, "*b 8 3"], b: Float[Tensor, "*b 8 3"]) -> Float[Tensor, "*b"]:
    """Rotated 3D intersection over union of pairs of boxes."""
    inner = intersection_volume(a, b)
    union = box_volumes(a) + box_volumes(b) - inner
    return inner / union.clamp(min=1e-12)


def box_giou(
    a: Float[Tensor, "*b 8 3"], b: Float[Tensor, "*b 8 3"], *, rotated: bool = True, released: bool = False
) -> Float[Tensor, "*b"]:
    """IoU - (enclosing - union) / enclosing; the enclosing box is axis-aligned.

    ``released``: see `intersection_volume`. Pairs whose enclosing volume is at most 2e-8, or the sum of whose volumes is at most 4e-8, give 0.
    """
    inner = intersection_volume(a, b, rotated=rotated, released=released)
    total = box_volumes(a) + box_volumes(b)
    union = (total - inner).clamp(min=1e-12)
    enclosing = (torch.maximum(a.amax(-2), b.amax(-2)) - torch.minimum(a.amin(-2), b.amin(-2))).clamp(min=0).prod(-1)
    good = (enclosing > 2e-8) & (total > 4e-8)
    return torch.where(good, inner / union - 1 + union / enclosing.clamp(min=1e-12), 0.0)


def pairwise_giou(
    a: Float[Tensor, "b q 8 3"], b: Float[Tensor, "b g 8 3"], *, rotated: bool = True, released: bool = False
) -> Float[Tensor, "b q g"]:
    """GIoU of every box of a with every box of b."""
    shape = (*a.shape[:2], b.shape[1], 8, 3)
    return box_giou(a[:, :, None].expand(shape), b[:, None].expand(shape), rotated=rotated, released=released)
