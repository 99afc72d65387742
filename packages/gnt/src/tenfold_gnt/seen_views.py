"""The views that see each point, packed (section 14): what a mask hides takes no part in attention over the views.

A masked view has weight 0 in the softmax, so leaving it out is exact. Points are sorted by how many views see them;
those with equally many form a group, in which attention is dense. A point that no view sees attends to all alike.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DENSE = 0.9
"""Above this share of visible pairs of a point and a view the packing costs more than it saves."""


class SeenViews(NamedTuple):
    """The visible pairs of a point and a view, the points sorted by how many views see them.

    Attributes:
        features: of the pairs, [pairs, width].
        ray_diff: relative directions of the pairs, [pairs, 4].
        pairs: where each was in [points, views], flat.
        points: where each pair's point was.
        back: for every point its place among the sorted ones.
        groups: for groups of equally many views (points, views), in order.
        blind: whether the first group is that of the points that no view sees, with all views of each.

    """

    features: Float[Tensor, "pairs width"]
    ray_diff: Float[Tensor, "pairs 4"]
    pairs: Int[Tensor, " pairs"]
    points: Int[Tensor, " pairs"]
    back: Int[Tensor, " points"]
    groups: list[tuple[int, int]]
    blind: bool

    def split(self, of_pairs: Float[Tensor, "pairs columns"]) -> list[Float[Tensor, "points views columns"]]:
        """A group after the other."""
        parts = of_pairs.split([points * views for points, views in self.groups])
        return [part.view(*group, -1) for part, group in zip(parts, self.groups, strict=True)]


def seen_views(
    features: Float[Tensor, "*points views width"],
    ray_diff: Float[Tensor, "*points views 4"],
    mask: Float[Tensor, "*points views 1"],
) -> SeenViews | None:
    """Pack what the mask leaves; None where packing is of no use: most pairs are visible, the groups' sizes would have
    to be waited for (on a GPU), or shapes must not depend on values (when compiling).
    """
    if mask.device.type != "cpu" or not mask.numel() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    views = mask.shape[-2]
    seen = mask.reshape(-1, views) != 0
    counts = seen.sum(1)
    blind = counts == 0
    seen |= blind[:, None]
    if int(seen.sum()) > DENSE * seen.numel():
        return None
    order = counts.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    sizes = counts.bincount(minlength=views + 1).tolist()
    groups = [(size, count or views) for count, size in enumerate(sizes) if size]
    pairs = _pairs(seen, order)
    return SeenViews(
        _TakeRows.apply(features.flatten(0, -2), pairs),
        ray_diff.flatten(0, -2).index_select(0, pairs),
        pairs,
        pairs // views,
        back,
        groups,
        sizes[0] > 0,
    )


def _pairs(seen: Bool[Tensor, "points views"], order: Int[Tensor, " points"]) -> Int[Tensor, " pairs"]:
    """Flat places of the visible pairs, point after point in the given order."""
    place, view = seen.index_select(0, order).nonzero().unbind(1)
    return order.index_select(0, place) * seen.shape[1] + view


class _TakeRows(torch.autograd.Function):
    """Rows of a matrix, none of them twice: the gradient is copied to its place, not added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.total, gradient.shape[1]).index_copy_(0, rows, gradient), None
