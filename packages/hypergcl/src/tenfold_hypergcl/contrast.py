"""Contrastive losses between the node representations of two views (section 2.4).

No similarity matrix is ever whole: the denominators of InfoNCE are summed block by block, and the gradient, known in closed form, goes
over the blocks again. A fixed budget of them is kept for it, so memory does not grow with the square of the nodes.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tenfold_hypergcl.products import multiply, stored

CACHED_BLOCK, DEVICE_BLOCK = 512, 8192
"""Rows and columns of one block of similarities: on a processor it fits a core's cache; a device is kept busy by a large one."""
KEPT_VALUES = 1 << 27
"""Values of similarity blocks (512 MiB in single precision) that may wait for the backward pass; further blocks are computed again."""
MIN_TEMPERATURE = 0.002
"""Below it ``exp(1 / t)`` leaves double precision, and the loss is a maximum in all but name."""


def _block_of(z: Tensor, block: int | None) -> int:
    return block or (CACHED_BLOCK if z.device.type == "cpu" else DEVICE_BLOCK)


def _blocks(rows: int, block: int) -> Iterator[tuple[slice, slice]]:
    """The blocks of the upper half of a symmetric matrix."""
    parts = [slice(i, min(i + block, rows)) for i in range(0, rows, block)]
    return itertools.combinations_with_replacement(parts, 2)


class _LogDenominators(torch.autograd.Function):
    """``log sum_{j != i} 2 ** (z_i . z_j)`` of every row ``i`` of both views' rows over one another, scaled by ``sqrt(log2(e) / t)``.

    A similarity of unit vectors is at most 1, so for the temperatures that come here ``exp(s / t)`` cannot overflow. The matrix is
    symmetric: only its upper half is computed, and serves both its rows and its columns. The first ``constant`` rows have no gradient.
    Powers of two are what a processor computes fastest.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, constant: int, block: int, kept_values: int) -> Tensor:
        sums, kept = z.new_zeros(z.shape[0]), []
        for rows, columns in _blocks(z.shape[0], block):
            e = _power_block(z, rows, columns)
            sums[rows] += e.sum(1)
            if rows != columns:
                sums[columns] += e.sum(0)
            if columns.stop > constant:
                kept_values -= e.numel()
                if kept_values >= 0:
                    kept.append(e)
        ctx.save_for_backward(z, sums, *kept)
        ctx.constant, ctx.block = constant, block
        return sums.log()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        z, sums, *blocks = ctx.saved_tensors
        kept = iter(blocks)
        # d loss / d z_i . z_j = (c_i + c_j) 2 ** (z_i . z_j): each pair is a term of both its rows.
        c = grad_outputs[0] * math.log(2) / sums
        grad, by_column = torch.zeros_like(z), z.new_zeros(z.shape[1], z.shape[0])
        turned = {start: stored(z[start : start + ctx.block].T) for start in range(0, z.shape[0], ctx.block)}
        with torch.autocast(z.device.type, enabled=False):
            for rows, columns in _blocks(z.shape[0], ctx.block):
                if columns.stop <= ctx.constant:
                    continue
                e = next(kept, None)
                weight = (c[rows, None] + c[None, columns]).mul_(_power_block(z, rows, columns) if e is None else e)
                if rows.stop > ctx.constant:
                    grad[rows] += multiply(weight, turned[columns.start])
                if rows != columns:
                    by_column[:, columns] += turned[rows.start] @ weight
        return grad.add_(by_column.T), None, None, None


def _power_block(z: Tensor, rows: slice, columns: slice) -> Tensor:
    e = multiply(z[rows], z[columns]).exp2_()
    return e.fill_diagonal_(0) if rows == columns else e


def info_nce_rows(
    z1: Float[Tensor, "nodes1 width"],
    z2: Float[Tensor, "nodes2 width"],
    temperature: float,
    common: tuple[Int[Tensor, "common"], Int[Tensor, "common"]] | None = None,
    block: int | None = None,
) -> tuple[Float[Tensor, "anchors"], Float[Tensor, "anchors"]]:
    """InfoNCE of every anchor in both directions, ``(l12, l21)`` (section 2.4).

    Each denominator has the anchor's similarities to all other nodes of its own view and to all nodes of the other view, the positive
    among them. For views on different nodes ``common`` holds the rows of the shared nodes in each view; these are the anchors.

    Raises:
        ValueError: for a temperature below 0.002, and for views of different sizes without ``common``.
    """
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"The temperature must be at least {MIN_TEMPERATURE}, not {temperature}.")
    if common is None and z1.shape[0] != z2.shape[0]:
        raise ValueError(f"The views have {z1.shape[0]} and {z2.shape[0]} nodes: name the common ones.")
    with torch.autocast(z1.device.type, enabled=False):
        # Half precision cannot hold sums over all nodes, nor single precision exp(1 / t) for the smallest temperatures.
        kind = torch.float64 if temperature < 1 / 40 else torch.promote_types(z1.dtype, torch.float32)
        a, b = F.normalize(z1.to(kind)), F.normalize(z2.to(kind))
        scaled = torch.cat([a, b]) * (math.log2(math.e) / temperature) ** 0.5
        kept_values = KEPT_VALUES if scaled.requires_grad else 0
        constant = 0 if a.requires_grad else a.shape[0]
        log_a, log_b = _LogDenominators.apply(scaled, constant, _block_of(z1, block), kept_values).split(
            [a.shape[0], b.shape[0]]
        )
        if common is not None:
            a, b, log_a, log_b = a[common[0]], b[common[1]], log_a[common[0]], log_b[common[1]]
        positive = (a * b).sum(1) / temperature
    return log_a - positive, log_b - positive


def info_nce(
    z1: Float[Tensor, "nodes1 width"],
    z2: Float[Tensor, "nodes2 width"],
    temperature: float = 0.3,
    common: tuple[Int[Tensor, "common"], Int[Tensor, "common"]] | None = None,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """The contrastive loss (NT-Xent over nodes): the mean over anchors of ``(l12 + l21) / 2``; see :func:`info_nce_rows`."""
    forward, backward = info_nce_rows(z1, z2, temperature, common, block)
    return (forward.mean() + backward.mean()) / 2


def _sum_over_blocks(function: Any, a: Tensor, b: Tensor, block: int | None) -> Tensor:
    """``sum_ij function(a_i, b_j)`` by row blocks that the backward pass recomputes."""
    with torch.autocast(a.device.type, enabled=False):
        parts = [checkpoint(function, rows, b, use_reentrant=False) for rows in a.split(_block_of(a, block))]
        return torch.stack(parts).sum()


def _units(z: Tensor) -> Tensor:
    """Rows at unit length, in single precision at least: sums over all pairs need it."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))


def jsd(
    z1: Float[Tensor, "nodes width"], z2: Float[Tensor, "nodes width"], block: int | None = None
) -> Float[Tensor, ""]:
    """The Jensen-Shannon contrast of cosine similarities, averaged over both directions (section 2.4); it has no temperature.

    The inter-view negatives contain the positive pair, as in the released code.
    """
    log2 = math.log(2)
    a, b = _units(z1), _units(z2)
    n = a.shape[0]

    def negative(rows: Tensor, others: Tensor) -> Tensor:
        s = rows @ others.T
        return (F.softplus(-s) + s - log2).sum()

    same = (a * b).sum(1)
    positive = (log2 - F.softplus(-same)).mean()
    inter = _sum_over_blocks(negative, a, b, block)
    total = inter.new_zeros(())
    for view in (a, b):
        own = view.square().sum(1)
        intra = _sum_over_blocks(negative, view, view, block) - (F.softplus(-own) + own - log2).sum()
        total = total + (intra + inter) / (n * (2 * n - 1)) - positive
    return total / 2


def triplet_margin(
    z1: Float[Tensor, "nodes width"],
    z2: Float[Tensor, "nodes width"],
    margin: float = 1.0,
    clip: bool = True,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Mean distance to the positive minus mean distance to the negatives plus ``margin``, both directions averaged (section 2.4).

    Negatives are the other nodes of the own view and of the other view. The hinge clips each direction at 0; the released code's
    never does, which is ``clip=False``.
    """
    a, b = _units(z1), _units(z2)
    n = a.shape[0]
    positive = (a - b + 1e-6).norm(dim=1)

    def distance(rows: Tensor, others: Tensor) -> Tensor:
        return (2 - 2 * rows @ others.T).clamp_min(1e-12).sqrt().sum()

    def diagonal(x: Tensor, y: Tensor) -> Tensor:
        return (2 - 2 * (x * y).sum(1)).clamp_min(1e-12).sqrt().sum()

    inter = _sum_over_blocks(distance, a, b, block) - diagonal(a, b)
    total = inter.new_zeros(())
    for view in (a, b):
        intra = _sum_over_blocks(distance, view, view, block) - diagonal(view, view)
        # A single node has no negative.
        hinge = positive.mean() - (intra + inter) / max(1, n * (2 * n - 2)) + margin
        total = total + (hinge.clamp_min(0) if clip else hinge)
    return total / 2
