"""Contrastive losses between the node representations of two views (section 2.4).

No similarity matrix outlives its block: the denominators of InfoNCE are summed block by block, and the gradient, known in closed form,
recomputes each block instead of storing it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 1024
"""Rows and columns of one block of similarities."""
MIN_TEMPERATURE = 0.002
"""Below it ``exp(1 / t)`` leaves double precision, and the loss is a maximum in all but name."""


def _blocks(rows: int, columns: int, block: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, block):
        for j in range(i if symmetric else 0, columns, block):
            yield slice(i, min(i + block, rows)), slice(j, min(j + block, columns))


class _LogDenominators(torch.autograd.Function):
    """``log sum exp`` of the intra-view similarities (without the diagonal) and of the inter-view ones, for both views.

    A similarity of unit vectors is at most 1, so for the temperatures that come here ``exp(s / t)`` cannot overflow.
    Intra-view blocks are symmetric: only the upper half is computed, and serves both its rows and its columns.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, temperature: float, block: int) -> tuple[Tensor, Tensor]:
        sum_a, sum_b = a.new_zeros(a.shape[0]), b.new_zeros(b.shape[0])
        for left, right, sum_left, sum_right in ((a, a, sum_a, sum_a), (b, b, sum_b, sum_b), (a, b, sum_a, sum_b)):
            same = left is right
            for rows, columns in _blocks(left.shape[0], right.shape[0], block, same):
                e = _exp_block(left[rows], right[columns], temperature, same and rows == columns)
                sum_left[rows] += e.sum(1)
                if not (same and rows == columns):
                    sum_right[columns] += e.sum(0)
        ctx.save_for_backward(a, b, sum_a, sum_b)
        ctx.temperature, ctx.block = temperature, block
        return sum_a.log(), sum_b.log()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b, sum_a, sum_b = ctx.saved_tensors
        t, needs = ctx.temperature, ctx.needs_input_grad
        # d loss / d similarity(i, j) = (c_i + c_j) exp(s_ij / t): each pair is a term of both its rows.
        c_a, c_b = grad_outputs[0] / sum_a / t, grad_outputs[1] / sum_b / t
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        groups = ((a, a, c_a, c_a, grad_a, grad_a), (b, b, c_b, c_b, grad_b, grad_b), (a, b, c_a, c_b, grad_a, grad_b))
        wanted = ((needs[0], False), (needs[1], False), (needs[0], needs[1]))
        for (left, right, c_left, c_right, into_left, into_right), (want_left, want_right) in zip(
            groups, wanted, strict=True
        ):
            if not (want_left or want_right):
                continue
            same = left is right
            for rows, columns in _blocks(left.shape[0], right.shape[0], ctx.block, same):
                diagonal = same and rows == columns
                e = _exp_block(left[rows], right[columns], t, diagonal)
                e.mul_(c_left[rows, None] + c_right[None, columns])
                if want_left:
                    into_left[rows].addmm_(e, right[columns])
                if want_right or (same and not diagonal):
                    into_right[columns].addmm_(e.T, left[rows])
        return grad_a if needs[0] else None, grad_b if needs[1] else None, None, None


def _exp_block(left: Tensor, right: Tensor, temperature: float, diagonal: bool) -> Tensor:
    e = torch.mm(left / temperature, right.T).exp_()
    if diagonal:
        e.fill_diagonal_(0)
    return e


def info_nce_rows(
    z1: Float[Tensor, "nodes1 width"],
    z2: Float[Tensor, "nodes2 width"],
    temperature: float,
    common: tuple[Int[Tensor, "common"], Int[Tensor, "common"]] | None = None,
    block: int = BLOCK,
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
        log_a, log_b = _LogDenominators.apply(a, b, temperature, block)
        if common is not None:
            a, b, log_a, log_b = a[common[0]], b[common[1]], log_a[common[0]], log_b[common[1]]
        positive = (a * b).sum(1) / temperature
    return log_a - positive, log_b - positive


def info_nce(
    z1: Float[Tensor, "nodes1 width"],
    z2: Float[Tensor, "nodes2 width"],
    temperature: float = 0.3,
    common: tuple[Int[Tensor, "common"], Int[Tensor, "common"]] | None = None,
    block: int = BLOCK,
) -> Float[Tensor, ""]:
    """The contrastive loss (NT-Xent over nodes): the mean over anchors of ``(l12 + l21) / 2``; see :func:`info_nce_rows`."""
    forward, backward = info_nce_rows(z1, z2, temperature, common, block)
    return (forward.mean() + backward.mean()) / 2


def _sum_over_blocks(function: Any, a: Tensor, b: Tensor, block: int) -> Tensor:
    """``sum_ij function(a_i, b_j)`` by row blocks that the backward pass recomputes."""
    parts = [checkpoint(function, rows, b, use_reentrant=False) for rows in a.split(block)]
    return torch.stack(parts).sum()


def jsd(z1: Float[Tensor, "nodes width"], z2: Float[Tensor, "nodes width"], block: int = BLOCK) -> Float[Tensor, ""]:
    """The Jensen-Shannon contrast of cosine similarities, averaged over both directions (section 2.4); it has no temperature.

    The inter-view negatives contain the positive pair, as in the released code.
    """
    log2 = torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    a, b = F.normalize(z1), F.normalize(z2)
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
    block: int = BLOCK,
) -> Float[Tensor, ""]:
    """Mean distance to the positive minus mean distance to the negatives plus ``margin``, both directions averaged (section 2.4).

    Negatives are the other nodes of the own view and of the other view. The hinge clips each direction at 0; the released code's
    never does, which is ``clip=False``.
    """
    a, b = F.normalize(z1), F.normalize(z2)
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
        hinge = positive.mean() - (intra + inter) / (n * (2 * n - 2)) + margin
        total = total + (hinge.clamp_min(0) if clip else hinge)
    return total / 2
