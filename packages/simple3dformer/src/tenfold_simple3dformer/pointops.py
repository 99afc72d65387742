"""Sampling and neighbourhoods of point clouds (section 2.7), vectorised over the batch and chunked over the centres.

Distances are sums of squared coordinate differences, never the dot-product expansion, and never below float32.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_shared.errors import UserError

CHUNK = 1 << 23
"""Distances held at a time (32 MB in float32): neighbour search splits its centres so that no more exist at once."""


def _wide(xyz: Tensor) -> Tensor:
    return xyz.float() if xyz.dtype in (torch.float16, torch.bfloat16) else xyz


def squared_distances(a: Float[Tensor, "b s 3"], b: Float[Tensor, "b n 3"]) -> Float[Tensor, "b s n"]:
    """Sum over the coordinates of (a - b)^2, one coordinate at a time: no (S, N, 3) tensor."""
    a, b = _wide(a), _wide(b)
    total = (a[:, :, None, 0] - b[:, None, :, 0]).square()
    for axis in range(1, a.shape[-1]):
        difference = a[:, :, None, axis] - b[:, None, :, axis]
        total = total.addcmul_(difference, difference) if not difference.requires_grad else total + difference.square()
    return total


def gather_points(values: Float[Tensor, "b n c"], index: Int[Tensor, "b *s"]) -> Float[Tensor, "b *s c"]:
    """The rows of each cloud that its indices name."""
    flat = index.flatten(1)
    rows = values.gather(1, flat[:, :, None].expand(-1, -1, values.shape[-1]))
    return rows.view(*index.shape, values.shape[-1])


@torch.no_grad()
def farthest_point_sampling(
    xyz: Float[Tensor, "b n 3"],
    count: int,
    start: Int[Tensor, " b"] | Literal["first", "random"] = "first",
) -> Int[Tensor, "b s"]:
    """Indices of ``count`` points, each the farthest from those before it (squared distances start at 1e10).

    Args:
        xyz: coordinates.
        count: points to take. When that is all of them and the start is ``first``, the order is kept as it is: the
            set is the same, and nothing downstream depends on its order.
        start: the first index of each cloud: given, 0, or uniformly random (as the released code does, in evaluation too).

    A cloud with fewer distinct points than ``count`` gives duplicates, never an error.

    Raises:
        UserError: more points are asked for than there are.

    """
    batch, n, _ = xyz.shape
    if not 0 < count <= n:
        raise UserError(f"cannot sample {count} of {n} points: give clouds of at least {count} points")
    if isinstance(start, str):
        if start == "first" and count == n:
            return torch.arange(n, device=xyz.device).expand(batch, n)
        picked = torch.zeros(batch, dtype=torch.long, device=xyz.device)
        if start == "random":
            picked = torch.randint(n, (batch,), device=xyz.device)
    else:
        picked = start.to(xyz.device, torch.long)
    planes = _wide(xyz).transpose(1, 2).contiguous()  # (B, 3, N): long inner loops
    nearest = planes.new_full((batch, n), 1e10)
    difference, squared = torch.empty_like(planes), torch.empty_like(nearest)
    chosen = torch.empty(batch, count, dtype=torch.long, device=xyz.device)
    where = picked[:, None, None]
    for step in range(count):
        chosen[:, step] = where[:, 0, 0]
        if step + 1 == count:
            break
        torch.sub(planes, planes.gather(2, where.expand(-1, 3, 1)), out=difference)
        torch.sum(difference.square_(), 1, out=squared)
        torch.minimum(nearest, squared, out=nearest)
        where = nearest.argmax(1)[:, None, None]
    return chosen


def _chunks(centres: Tensor, points: Tensor) -> tuple[Tensor, ...]:
    rows = max(1, CHUNK // max(1, points.shape[0] * points.shape[1]))
    return centres.split(rows, 1)


@torch.no_grad()
def nearest_neighbours(
    centres: Float[Tensor, "b s 3"], xyz: Float[Tensor, "b n 3"], k: int
) -> tuple[Float[Tensor, "b s m"], Int[Tensor, "b s m"]]:
    """Squared distances and indices of the k nearest points of each centre, nearest first, the centre itself included.

    A cloud of fewer than k points gives all of them.
    """
    have = min(k, xyz.shape[1])
    parts = [
        squared_distances(part, xyz).topk(have, dim=2, largest=False, sorted=True) for part in _chunks(centres, xyz)
    ]
    distance, index = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
    return distance, index


@torch.no_grad()
def ball_query(
    centres: Float[Tensor, "b s 3"], xyz: Float[Tensor, "b n 3"], radius: float, k: int
) -> Int[Tensor, "b s k"]:
    """The k smallest indices within the radius of each centre, padded with the first of them.

    A centre that is one of the points always has one. Another centre without any gets index 0.
    """
    n = xyz.shape[1]
    have = min(k, n)
    indices = torch.arange(n, device=xyz.device, dtype=torch.int32)
    found = []
    for part in _chunks(centres, xyz):
        outside = squared_distances(part, xyz) > radius**2
        ranked = indices.expand(outside.shape).masked_fill(outside, n)
        found.append(ranked.topk(have, dim=2, largest=False, sorted=True).values)
    index = torch.cat(found, 1).long()
    first = index[:, :, :1].clamp(max=n - 1) * (index[:, :, :1] < n)
    index = torch.where(index == n, first.expand_as(index), index)
    return torch.cat([index, first.expand(-1, -1, k - have)], 2) if have < k else index


def interpolation_weights(
    fine: Float[Tensor, "b n 3"], coarse: Float[Tensor, "b s 3"]
) -> tuple[Float[Tensor, "b n k"], Int[Tensor, "b n k"]]:
    """Weights 1 / (d^2 + 1e-8), normalised, of the three nearest coarse points (d^2 is the squared distance)."""
    distance, index = nearest_neighbours(fine, coarse, min(3, coarse.shape[1]))
    inverse = 1.0 / (distance + 1e-8)
    return inverse / inverse.sum(2, keepdim=True), index


def interpolate(
    fine: Float[Tensor, "b n 3"], coarse: Float[Tensor, "b s 3"], features: Float[Tensor, "b s c"]
) -> Float[Tensor, "b n c"]:
    """Features of the coarse points carried to the fine ones; a single coarse point is repeated."""
    if coarse.shape[1] == 1:
        return features.expand(-1, fine.shape[1], -1)
    weights, index = interpolation_weights(fine, coarse)
    return (gather_points(features, index) * weights[..., None].to(features.dtype)).sum(2)


def normalise_points(xyz: Float[Tensor, "*b n 3"]) -> Float[Tensor, "*b n 3"]:
    """Centred on the mean and divided by the largest radius; a cloud of one place stays at the origin."""
    centred = xyz - xyz.mean(-2, keepdim=True)
    radius = centred.square().sum(-1).amax(-1).sqrt()[..., None, None]
    return centred / radius.clamp(min=torch.finfo(xyz.dtype).tiny)


def batch_clouds(clouds: Sequence[Float[Tensor, "_n c"]], count: int) -> Float[Tensor, "b p c"]:
    """Clouds of any sizes as one batch: larger ones are thinned by farthest-point sampling, smaller ones repeat points.

    A cloud's rows do not depend on the others in the batch. `spread` carries results back to all of its points.

    Raises:
        UserError: a cloud is empty, or has a coordinate that is not finite.

    """
    rows = []
    for cloud in clouds:
        check_points(cloud)
        if len(cloud) > count:
            rows.append(cloud[farthest_point_sampling(cloud[None, :, :3], count)[0]])
        else:
            rows.append(cloud[torch.arange(count, device=cloud.device) % len(cloud)])
    return torch.stack(rows)


def spread(
    clouds: Sequence[Float[Tensor, "_n c"]], batch: Float[Tensor, "b p c"], values: Float[Tensor, "b p k"]
) -> list[Float[Tensor, "_n k"]]:
    """Values of the points of a batch, carried to every point of the clouds that it was made of, by the nearest."""
    return [
        row[nearest_neighbours(cloud[None, :, :3], places[None, :, :3], 1)[1][0, :, 0]]
        for cloud, places, row in zip(clouds, batch, values, strict=True)
    ]


def check_points(points: Float[Tensor, "*b n c"], *, least: int = 1) -> None:
    """Refuse what no network can take.

    Raises:
        UserError: too few points, or a coordinate that is not finite (the first such row is named).

    """
    if points.shape[-2] < least:
        raise UserError(f"a cloud of {points.shape[-2]} points is too small: at least {least} are needed")
    bad = ~torch.isfinite(points).all(-1)
    if bad.any():
        row = int(bad.reshape(-1, points.shape[-2]).any(0).nonzero()[0])
        raise UserError(f"row {row} of the cloud has a coordinate that is not finite; remove such rows first")
